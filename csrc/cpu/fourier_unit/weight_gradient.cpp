// The gradient of a 3 x 3 convolution's weight by Winograd's algorithm, on tiles of 4 x 2 outputs (see conv3x3.cpp).
//
//   G^T [ sum over tiles (A e A^T) * (B^T d B) ] G,   e: a tile of the output's gradient, d: a tile of inputs
//
// A task is a block of outputs and a block of channels, on a part of the tiles. Some tiles at a time, it transforms its
// gradients and inputs, with vectors across tiles, and transposes them; then for each point the register micro-kernel
// adds [outputs, tiles] times [tiles, channels] to the task's sums.
#include "../entries.h"
#include "../common/tasks.h"
#include "tile_inputs.h"

namespace inr {
namespace INR_ISA {
namespace {

template <class T>
class WeightGradient {
  static constexpr int M = 4;
  // Of a task: outputs, channels, and tiles at a time. Its sums and its two operands take 0.5 MB each.
  static constexpr std::int64_t block = 64, tiles = 64;
  using Inputs = TileInputs<T, M, tiles>;
  static constexpr int points = Inputs::points;
  static constexpr std::int64_t row = block + lanes<T>;          // of the transposed operands, and of the sums
  static constexpr std::int64_t planes_row = tiles + lanes<T>;   // of the planes before they are transposed
  static constexpr std::int64_t part_tiles = 1024, most_tasks = 8;  // few blocks are divided

 public:
  explicit WeightGradient(const Conv3x3& p, const T* grad)
      : p_(p), inputs_(p), grad_(grad), channels_(p.channels[0] + p.channels[1]) {
    tile_rows_ = divide_up(p.height, M), tile_columns_ = divide_up(p.width, 2);
    groups_ = divide_up(tile_rows_ * tile_columns_, tiles);  // of an image
    output_blocks_ = divide_up(p.outputs, block), channel_blocks_ = divide_up(channels_, block);
    const std::int64_t pairs = output_blocks_ * channel_blocks_;
    parts_ = clamp(p.batch * groups_ * tiles / part_tiles, 1, pairs < most_tasks ? most_tasks / pairs : 1);
  }

  std::int64_t tasks() const { return output_blocks_ * channel_blocks_ * parts_; }
  std::int64_t sums_size() const { return tasks() * task_size(); }
  static constexpr std::int64_t stage_size() { return Inputs::stage_size(); }
  static constexpr std::int64_t planes_size() { return points * planes_stride(); }
  static constexpr std::int64_t operand_size() { return points * operand_stride(); }

  // stage: [stage_size()], planes: [planes_size()], a, b: [operand_size()], work buffers;
  // sums: [tasks()][points][block][row]
  void run(std::int64_t task, T* stage, T* planes, T* a, T* b, T* sums) const {
    const std::int64_t part = task % parts_, pair = task / parts_;
    const std::int64_t o = pair / channel_blocks_ * block, c = pair % channel_blocks_ * block;
    const std::int64_t outputs = smaller(p_.outputs - o, block), channels = smaller(channels_ - c, block);
    sums += task * task_size();
    const std::int64_t all = p_.batch * groups_, begin = all * part / parts_, end = all * (part + 1) / parts_;
    for (std::int64_t group = begin; group < end; ++group) {
      const std::int64_t image = group / groups_, first = group % groups_ * tiles;
      const std::int64_t count = smaller(tile_rows_ * tile_columns_ - first, tiles);
      transpose_planes(first, outputs, planes, a, [&](const Segment& s, std::int64_t i, T* to) {
        transform_gradients(image, o + i, s, stage, to);
      });
      transpose_planes(first, channels, planes, b, [&](const Segment& s, std::int64_t i, T* to) {
        inputs_.transform(image, c + i, s, stage, planes_stride(), to);
      });
      multiply(outputs, channels, count, a, b, group > begin, sums);
    }
  }

  // Adds the sums of all parts, and transforms them to the gradient of output o. out: [outputs, channels, 3, 3]
  void finish(std::int64_t o, const T* sums, T* out) const {
    for (std::int64_t c = 0; c < channels_; c += lanes<T>) {
      const std::int64_t pair = o / block * channel_blocks_ + c / block;
      const T* from = sums + pair * parts_ * task_size() + o % block * row + c % block;
      Vec<T> half[3][4], g[3];
      for (int j = 0; j < 4; ++j) {
        Vec<T> m[6];
        for (int i = 0; i < 6; ++i) {
          const T* at = from + (4 * i + j) * sums_stride();
          m[i] = load(at);
          for (std::int64_t part = 1; part < parts_; ++part) m[i] += load(at + part * task_size());
        }
        transform_sums(m, g);
        for (int i = 0; i < 3; ++i) half[i][j] = g[i];
      }
      T values[9][lanes<T>];
      for (int i = 0; i < 3; ++i) {
        transform_sums(half[i], g);
        for (int j = 0; j < 3; ++j) store(values[3 * i + j], g[j]);
      }
      for (std::int64_t l = 0; l < smaller(channels_ - c, lanes<T>); ++l)
        for (int k = 0; k < 9; ++k) out[((o * channels_) + c + l) * 9 + k] = values[k][l];
    }
  }

 private:
  static constexpr std::int64_t planes_stride() { return lanes<T> * planes_row + lanes<T>; }
  static constexpr std::int64_t operand_stride() { return tiles * row + lanes<T>; }
  static constexpr std::int64_t sums_stride() { return block * row + lanes<T>; }
  static constexpr std::int64_t task_size() { return points * sums_stride(); }

  // Transforms `count` planes at the tiles from `first` on by transform(segment, plane, to), and transposes them.
  // planes: [points][lanes][planes_row], a work buffer; to: [points][tiles][row]
  template <class F>
  void transpose_planes(std::int64_t first, std::int64_t count, T* planes, T* to, F&& transform) const {
    for (std::int64_t i = 0; i < count; i += lanes<T>) {
      for_each_segment(first, tiles, tile_rows_, tile_columns_, [&](const Segment& s) {
        for (std::int64_t k = i; k < smaller(i + lanes<T>, count); ++k)
          transform(s, k, planes + (k - i) * planes_row + s.index);
      });
      for (int point = 0; point < points; ++point)
        for (std::int64_t t = 0; t < tiles; t += lanes<T>) {
          Vec<T> tile[lanes<T>];
#pragma GCC unroll 16
          for (int k = 0; k < lanes<T>; ++k) tile[k] = load(planes + point * planes_stride() + k * planes_row + t);
          transpose<T>(tile);
#pragma GCC unroll 16
          for (int k = 0; k < lanes<T>; ++k) store(to + point * operand_stride() + (t + k) * row + i, tile[k]);
        }
    }
  }

  // Transforms the output's gradients of a segment: A e A^T. stage: [M][2 (s.count + lanes)], a work buffer;
  // to: [points][s.count] with the stride planes_stride()
  void transform_gradients(std::int64_t image, std::int64_t o, const Segment& s, T* stage, T* to) const {
    const std::int64_t line = 2 * (s.count + lanes<T>), x = 2 * s.column, y = M * s.row;
    const T* plane = grad_ + (image * p_.outputs + o) * p_.height * p_.width;
    const std::int64_t used = smaller(p_.width - x, 2 * s.count);
    for (int i = 0; i < M; ++i) {
      const std::int64_t inside = y + i < p_.height ? used : 0;
      if (inside) std::memcpy(stage + i * line, plane + (y + i) * p_.width + x, std::size_t(inside) * sizeof(T));
      std::memset(static_cast<void*>(stage + i * line + inside), 0, std::size_t(line - inside) * sizeof(T));
    }
    for (std::int64_t t = 0; t < s.count; t += lanes<T>) {
      Vec<T> e[2][M], m[2][6];
      for (int i = 0; i < M; ++i) load_pairs(stage + i * line + 2 * t, e[0][i], e[1][i]);
      transform_outputs_gradient(e[0], m[0]);
      transform_outputs_gradient(e[1], m[1]);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        const Vec<T> point[4] = {m[0][i], m[0][i] + m[1][i], m[0][i] - m[1][i], -m[1][i]};
        for (int j = 0; j < 4; ++j) store(to + (4 * i + j) * planes_stride() + t, point[j]);
      }
    }
  }

  // Adds to the sums, or sets them, the products of `count` tiles. a, b: [points][tiles][row];
  // sums: [points][block][row]
  void multiply(std::int64_t outputs, std::int64_t channels, std::int64_t count, const T* a, const T* b, bool add,
                T* sums) const {
    const RowBlocks blocks(outputs);
    for (int point = 0; point < points; ++point)
      for (std::int64_t c = 0; c < channels; c += panel<T>)
        for (std::int64_t i = 0; i < blocks.count(); ++i) {
          const T* a_block = a + point * operand_stride() + blocks.first(i);
          const T* b_panel = b + point * operand_stride() + c;
          T* to = sums + point * sums_stride() + blocks.first(i) * row + c;
          if (blocks.height(i) == block_rows)
            multiply_block<block_rows>(count, a_block, b_panel, add, to);
          else
            multiply_block<RowBlocks::small_height>(count, a_block, b_panel, add, to);
        }
  }
  template <int R>
  INR_NOINLINE void multiply_block(std::int64_t count, const T* a, const T* b, bool add, T* to) const {
    Vec<T> acc[R][2];
    multiply_rows<T, R>(count, a, row, b, row, acc);
    add_sums(acc, add, to, row);
  }

  const Conv3x3& p_;
  Inputs inputs_;
  const T* grad_;  // [batch, outputs, height, width]
  std::int64_t channels_, tile_rows_, tile_columns_, groups_;
  std::int64_t output_blocks_, channel_blocks_, parts_;
};

// grad: [batch, outputs, height, width]; out: [outputs, channels, 3, 3]
template <class T>
Status compute(const Conv3x3& p, const T* grad, T* out) {
  const WeightGradient<T> gradient(p, grad);
  Buffer<T> sums(gradient.sums_size(), false);
  if (!sums) return Status::out_of_memory;
  struct Worker {
    using G = WeightGradient<T>;
    // Outputs and channels after the last are computed, too: from numbers, not from what the memory held.
    Worker() : stage(G::stage_size()), planes(G::planes_size()), a(G::operand_size()), b(G::operand_size()) {}
    explicit operator bool() const { return stage && planes && a && b; }
    Buffer<T> stage, planes, a, b;
  };
  const std::int64_t channels = p.channels[0] + p.channels[1];
  const int threads =
      useful_threads(6.0 * double(channels * p.outputs) * double(p.batch * p.height * p.width), p.threads);
  const Status status = for_each_task(
      threads, gradient.tasks(), [] { return Worker(); },
      [&](Worker& w, std::int64_t task) {
        gradient.run(task, w.stage, w.planes, w.a, w.b, sums);
        return Status::ok;
      });
  if (status != Status::ok) return status;
  return for_each_task(
      threads, p.outputs, [] { return true; },
      [&](bool, std::int64_t o) {
        gradient.finish(o, sums, out);
        return Status::ok;
      });
}

}  // namespace

Status conv3x3_weight_gradient(Type type, const Conv3x3& p, const void* grad, void* out) {
  switch (type) {
    case Type::float32: return compute(p, static_cast<const float*>(grad), static_cast<float*>(out));
    case Type::float64: return compute(p, static_cast<const double*>(grad), static_cast<double*>(out));
    default: return Status::unsupported_type;
  }
}

}  // namespace INR_ISA
}  // namespace inr
