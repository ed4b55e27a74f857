// A convolution by its sum, without a matrix of patches: inputs and outputs are planes of pixels, and the multiply-adds
// take vectors of neighbouring pixels of one row.
//
// A pixel of the grid stands for out_step x out_step outputs, its phases: 1 for a convolution, stride^2 for a
// transposed one. Each phase is a sum over channels and its own taps (a weight of the kernel, and the input that it
// multiplies):
//
//   out[o, Y out_step + phase] = sum over c, taps  weight[o, c, tap] x[c, Y in_step + tap's offset]
//
// A task is some pixels of the grid. It loads its inputs for a chunk of channels, with the padding, the columns
// separated by their index modulo in_step, so that a tap reads consecutive numbers. Then a micro-kernel adds all steps
// (channel, tap) for block_rows outputs x 2 vectors of pixels in registers.
#include "../../common/pages.h"
#include "../entries.h"
#include "../common/offset_kernel.h"
#include "../common/tasks.h"
#include "pointwise.h"
#include "strided.h"
#include "tiles.h"
#include "weights.h"

namespace inr {
namespace INR_ISA {
namespace {

template <class T>
class DirectConvolution {
 public:
  explicit DirectConvolution(const Conv2d& problem) : p_(problem), blocks_(problem.outputs) {
    const std::int64_t taps = p_.kernel[0] * p_.kernel[1];
    for (int i = 0; i < 2; ++i) {
      in_step_[i] = p_.transposed ? 1 : p_.stride[i];
      out_step_[i] = p_.transposed ? p_.stride[i] : 1;
    }
    phases_ = out_step_[0] * out_step_[1];
    grid_[0] = divide_up(p_.out_height, out_step_[0]);
    grid_[1] = divide_up(p_.out_width, out_step_[1]);
    const std::int64_t chunks = divide_up(p_.channels, clamp(320 * phases_ / taps, 1, p_.channels));
    chunk_ = divide_up(p_.channels, chunks);
    streams_ = is_streamed(std::size_t(p_.batch * p_.outputs * p_.out_height * p_.out_width) * sizeof(T));
  }

  // Finds the phases and inputs of the kernel's elements, before anything else is called.
  bool find_taps() {
    if (!taps_.resize(kernel_size()) || !phase_count_.resize(phases_) || !phase_begin_.resize(phases_)) return false;
    for (std::int64_t i = 0; i < kernel_size(); ++i) {
      Tap& tap = taps_[i];
      std::int64_t phase[2];
      find_axis(0, i / p_.kernel[1], phase[0], tap.offset[0]);
      find_axis(1, i % p_.kernel[1], phase[1], tap.offset[1]);
      tap.phase = phase[0] * out_step_[1] + phase[1];
      tap.index = phase_count_[tap.phase]++;
      for (int axis = 0; axis < 2; ++axis) {
        if (!i || tap.offset[axis] < first_[axis]) first_[axis] = tap.offset[axis];
        if (!i || tap.offset[axis] > last_[axis]) last_[axis] = tap.offset[axis];
      }
    }
    for (std::int64_t i = 1; i < phases_; ++i) phase_begin_[i] = phase_begin_[i - 1] + phase_count_[i - 1];
    return true;
  }

  // Chooses the size of a task, for `threads` threads, after find_taps.
  bool prepare(int threads) {
    // All products of a task, and the inputs of a chunk, stay in the cache of a core: at most 0.25 and 0.5 MB.
    constexpr std::int64_t max_products = (1 << 18) / sizeof(float), max_inputs = (1 << 19) / sizeof(float);
    const std::int64_t pixels = clamp(max_products / (p_.outputs * phases_), 2 * panel<T>, 16384);
    columns_ = even_part(grid_[1], pixels < 512 ? pixels : 512);
    rows_ = clamp(pixels / columns_, 1, grid_[0]);
    while (rows_ > 1 && chunk_ * in_rows() * row_size() > max_inputs) rows_ = divide_up(rows_, 2);
    const auto maps = [&] { return p_.batch * divide_up(grid_[0], rows_) * divide_up(grid_[1], columns_); };
    const auto is_coarse = [&] { return threads > 1 && maps() < 4 * threads; };
    while (is_coarse() && rows_ > 1) rows_ = divide_up(rows_, 2);
    while (is_coarse() && columns_ > 2 * panel<T>) columns_ = even_part(grid_[1], columns_ / 2);
    row_tasks_ = divide_up(grid_[0], rows_);
    column_tasks_ = divide_up(grid_[1], columns_);
    group_blocks_ = blocks_of_group(maps(), blocks(), threads);
    groups_ = divide_up(blocks(), group_blocks_);
    return find_offsets();
  }

  std::int64_t weight_size() const { return blocks_.first(blocks()) * p_.channels * kernel_size(); }
  void use_weights(T* packed) { weight_ = packed; }

  std::int64_t blocks() const { return blocks_.count(); }
  std::int64_t tasks() const { return p_.batch * row_tasks_ * column_tasks_ * groups_; }
  std::int64_t line_buffer_size() const { return in_step_[1] * line() + 2 * lanes<T>; }
  std::int64_t inputs_size() const { return chunk_ * in_rows() * row_size() + panel<T>; }
  std::int64_t products_size() const { return phases_ * group_blocks_ * block_rows * map_size(); }

  // Packs the weights of a block of outputs: for each phase [channels][taps][height of the block].
  void transform_weights(std::int64_t block) {
    const std::int64_t first = blocks_.first(block), height = block_height(block);
    const std::int64_t rows = smaller(p_.outputs - first, height), count = kernel_size();
    const std::int64_t row_stride = p_.transposed ? count : p_.channels * count;
    const std::int64_t channel_stride = p_.transposed ? p_.outputs * count : count;
    T* to = weight_ + first * p_.channels * count;
    std::memset(static_cast<void*>(to), 0, std::size_t(height * p_.channels * count) * sizeof(T));
    constexpr std::int64_t run = 16;  // channels whose packed weights stay in the first cache
    for (std::int64_t begin = 0; begin < p_.channels; begin += run)
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = begin; c < begin + run && c < p_.channels; ++c) {
          const T* from = static_cast<const T*>(p_.weight) + (first + r) * row_stride + c * channel_stride;
          for (std::int64_t i = 0; i < count; ++i) {
            const Tap& tap = taps_[i];
            to[(p_.channels * phase_begin_[tap.phase] + c * phase_count_[tap.phase] + tap.index) * height + r] = from[i];
          }
        }
  }

  // line: [line_buffer_size()], inputs: [inputs_size()], products: [products_size()], work buffers;
  // out: [batch, outputs, out_height, out_width]
  void run(std::int64_t task, T* line, T* inputs, T* products, T* out) const {
    const std::int64_t group = task % groups_, map = task / groups_;
    const std::int64_t image = map / (row_tasks_ * column_tasks_);
    const std::int64_t y = map / column_tasks_ % row_tasks_ * rows_, x = map % column_tasks_ * columns_;
    const std::int64_t begin = group * group_blocks_, end = smaller(begin + group_blocks_, blocks());
    for (std::int64_t c = 0; c < p_.channels; c += chunk_) {
      const std::int64_t count = smaller(p_.channels - c, chunk_);
      load_inputs(image, y, x, c, count, line, inputs);
      // The weights of a block stay in the first cache, and rows of outputs are written from left to right.
      const std::int64_t width = smaller(columns_, grid_[1] - x);
      for (std::int64_t b = begin; b < end; ++b) {
        T* to = products + (blocks_.first(b) - blocks_.first(begin)) * map_size();
        for (std::int64_t row = 0; row < rows_ && y + row < grid_[0]; ++row)
          for (std::int64_t j = 0; j < width;) {
            const std::int64_t left = divide_up(width - j, lanes<T>);
            const Place place{image, y + row, x + j, width - j, row * padded_columns() + j, c, count};
            const T* from = inputs + row * in_step_[0] * row_size() + j;
            if (has_few_outputs() && left > 2)
              multiply<4>(place, b, from, to, out), j += 4 * lanes<T>;
            else if (left > 1)
              multiply<2>(place, b, from, to, out), j += 2 * lanes<T>;
            else
              multiply<1>(place, b, from, to, out), j += lanes<T>;
          }
      }
    }
    if (phases_ > 1)
      store_outputs(image, y, x, blocks_.first(begin), smaller(blocks_.first(end), p_.outputs), products, out);
    if (streams_) stream_fence();
  }

 private:
  struct Tap {
    std::int64_t phase;
    std::int64_t index;      // among the phase's taps
    std::int64_t offset[2];  // of the input that it multiplies
  };

  // The numbers of one axis that the elements of the kernel lead to: the phase, and the input's offset.
  void find_axis(int axis, std::int64_t k, std::int64_t& phase, std::int64_t& offset) const {
    if (!p_.transposed) {
      phase = 0, offset = k - p_.pad[axis];
      return;
    }
    // out index = in index * stride - pad + k
    const std::int64_t step = out_step_[axis], at = k - p_.pad[axis];
    phase = (at % step + step) % step;
    offset = (phase - at) / step;
  }

  // Where the steps of a phase read the inputs of a task: [phase][a chunk of channels][taps of the phase]
  bool find_offsets() {
    if (!offsets_.resize(chunk_ * kernel_size())) return false;
    for (std::int64_t c = 0; c < chunk_; ++c)
      for (std::int64_t i = 0; i < kernel_size(); ++i) {
        const Tap& tap = taps_[i];
        const std::int64_t y = tap.offset[0] - first_[0], x = tap.offset[1] - first_[1];
        offsets_[chunk_ * phase_begin_[tap.phase] + c * phase_count_[tap.phase] + tap.index] =
            (c * in_rows() + y) * row_size() + x % in_step_[1] * line() + x / in_step_[1];
      }
    return true;
  }

  // Divides n columns evenly into parts of at most `most`, in whole panels if there are several.
  static std::int64_t even_part(std::int64_t n, std::int64_t most) {
    const std::int64_t parts = divide_up(n, most);
    return parts == 1 ? n : round_up(divide_up(n, parts), panel<T>);
  }

  // Few outputs are one block of at most a third of block_rows.
  bool has_few_outputs() const { return p_.outputs <= block_rows / 3; }
  std::int64_t block_height(std::int64_t block) const {
    return has_few_outputs() ? block_rows / 3 - (p_.outputs < block_rows / 3) : blocks_.height(block);
  }
  std::int64_t kernel_size() const { return p_.kernel[0] * p_.kernel[1]; }
  std::int64_t padded_columns() const { return round_up(columns_, panel<T>); }
  std::int64_t map_size() const { return rows_ * padded_columns(); }
  // Rows of inputs of a task; the length of a line, of one of a row's in_step lines, and of all.
  std::int64_t in_rows() const { return (rows_ - 1) * in_step_[0] + last_[0] - first_[0] + 1; }
  std::int64_t line() const { return padded_columns() + (last_[1] - first_[1]) / in_step_[1] + lanes<T>; }
  std::int64_t row_size() const { return in_step_[1] * line(); }

  // The index in [0, n) of the value that the padding, of any width, puts at index v; -1 for zero.
  std::int64_t padded_index(std::int64_t v, std::int64_t n) const {
    if (v >= 0 && v < n) return v;
    if (p_.padding == Padding::zeros) return -1;
    v = v < 0 ? -v : 2 * (n - 1) - v;
    return v >= 0 && v < n ? v : -1;  // values farther away are not used
  }

  // to: [count][in_rows()][in_step][line()], from the pixel (y, x) of the grid on
  void load_inputs(std::int64_t image, std::int64_t y, std::int64_t x, std::int64_t first, std::int64_t count,
                   T* line_buffer, T* to) const {
    const std::int64_t left = x * in_step_[1] + first_[1], step = in_step_[1], length = row_size();
    // Columns [begin, end) of the line are inside the image; those from `used` on are not used.
    const std::int64_t used = smaller(length, (columns_ - 1) * step + last_[1] - first_[1] + 1);
    const std::int64_t begin = clamp(-left, 0, used), end = clamp(p_.width - left, begin, used);
    for (std::int64_t c = 0; c < count; ++c) {
      const T* plane = static_cast<const T*>(p_.x) + (image * p_.channels + first + c) * p_.height * p_.width;
      for (std::int64_t i = 0; i < in_rows(); ++i, to += length) {
        const std::int64_t row = padded_index(y * in_step_[0] + first_[0] + i, p_.height);
        if (row < 0) {
          std::memset(static_cast<void*>(to), 0, std::size_t(length) * sizeof(T));
          continue;
        }
        const T* from = plane + row * p_.width;
        T* padded = step == 1 ? to : line_buffer;
        if (end > begin) std::memcpy(padded + begin, from + left + begin, std::size_t(end - begin) * sizeof(T));
        const auto pad = [&](std::int64_t j) {
          const std::int64_t col = padded_index(left + j, p_.width);
          padded[j] = col < 0 ? T(0) : from[col];
        };
        for (std::int64_t j = 0; j < begin; ++j) pad(j);
        for (std::int64_t j = end; j < used; ++j) pad(j);
        if (step == 2)
          for (std::int64_t j = 0; j < used; j += 2 * lanes<T>) {
            Vec<T> even, odd;
            load_pairs(line_buffer + j, even, odd);
            store(to + j / 2, even);
            store(to + line() + j / 2, odd);
          }
        else if (step > 2)
          for (std::int64_t j = 0; j < used; ++j) to[j % step * line() + j / step] = line_buffer[j];
      }
    }
  }

  // Some neighbouring pixels of the grid, and the channels that are added.
  struct Place {
    std::int64_t image, y, x;   // of the first
    std::int64_t width;         // pixels up to the end of the task's row
    std::int64_t index;         // of the first among the task's products
    std::int64_t first, count;  // channels
  };

  // Adds to the products of V vectors of pixels, of a block of outputs; sets them with the first channels. Finishes the
  // outputs of a convolution with the last channels. inputs: those of the first pixel; products: [phase][...]
  template <int V>
  void multiply(const Place& place, std::int64_t block, const T* inputs, T* products, T* out) const {
    switch (block_height(block)) {
      case block_rows / 3: return multiply_block<block_rows / 3, V>(place, block, inputs, products, out);
      case block_rows / 3 - 1: return multiply_block<block_rows / 3 - 1, V>(place, block, inputs, products, out);
      case block_rows: return multiply_block<block_rows, V < 2 ? V : 2>(place, block, inputs, products, out);
      default: multiply_block<2 * block_rows / 3, V < 2 ? V : 2>(place, block, inputs, products, out);
    }
  }
  template <int R, int V>
  INR_NOINLINE void multiply_block(const Place& place, std::int64_t block, const T* inputs, T* products, T* out) const {
    const T* packed = weight_ + blocks_.first(block) * p_.channels * kernel_size();
    const bool finishes = place.first + place.count == p_.channels && phases_ == 1;
    for (std::int64_t phase = 0; phase < phases_; ++phase) {
      const std::int64_t taps = phase_count_[phase];
      const T* weight = packed + (p_.channels * phase_begin_[phase] + place.first * taps) * R;
      Vec<T> sums[R][V];
      accumulate<T, R, V>(place.count * taps, weight, inputs, offsets_ + chunk_ * phase_begin_[phase], sums);
      T* to = products + phase * group_blocks_ * block_rows * map_size() + place.index;
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          T* at = to + r * map_size() + v * lanes<T>;
          const Vec<T> sum = place.first ? load(at) + sums[r][v] : sums[r][v];
          const std::int64_t o = blocks_.first(block) + r;
          if (!finishes)
            store(at, sum);
          else if (o < p_.outputs)
            store_finished(sum, place.image, o, place.y, place.x + v * lanes<T>, place.width - v * lanes<T>, out);
        }
    }
  }

  // Finishes the first min(n, lanes) sums and stores them in a row of output o.
  void store_finished(Vec<T> sum, std::int64_t image, std::int64_t o, std::int64_t y, std::int64_t x, std::int64_t n,
                      T* out) const {
    finish<T>(p_, sum, o, ((image * p_.outputs + o) * p_.out_height + y) * p_.out_width + x, n, streams_, out);
  }

  // Stores the outputs [begin, end) of all phases. products: [phase][..., map_size()]
  void store_outputs(std::int64_t image, std::int64_t y, std::int64_t x, std::int64_t begin, std::int64_t end,
                     const T* products, T* out) const {
    const std::int64_t step = out_step_[1], phase_size = group_blocks_ * block_rows * map_size();
    const std::int64_t width = smaller(columns_ * step, p_.out_width - x * step);
    for (std::int64_t o = begin; o < end; ++o)
      for (std::int64_t row = 0; row < rows_ * out_step_[0]; ++row) {
        const std::int64_t out_y = y * out_step_[0] + row, phase = row % out_step_[0] * step;
        if (out_y >= p_.out_height) break;
        const T* from = products + phase * phase_size + (o - begin) * map_size();
        from += row / out_step_[0] * padded_columns();
        for (std::int64_t j = 0; j < width; j += 2 * lanes<T>) {
          Vec<T> pair[2];
          if (step == 2) {
            interleave(load(from + j / 2), load(from + phase_size + j / 2), pair[0], pair[1],
                       std::make_index_sequence<lanes<T>>{});
          } else {
            T values[2 * lanes<T>] = {};
            for (std::int64_t i = 0; i < 2 * lanes<T> && j + i < width; ++i)
              values[i] = from[(j + i) % step * phase_size + (j + i) / step];
            pair[0] = load(values), pair[1] = load(values + lanes<T>);
          }
          for (int v = 0; v < 2; ++v)
            store_finished(pair[v], image, o, out_y, x * step + j + v * lanes<T>, width - j - v * lanes<T>, out);
        }
      }
  }

  Conv2d p_;
  std::int64_t in_step_[2], out_step_[2], phases_, grid_[2], chunk_;
  std::int64_t first_[2] = {}, last_[2] = {};  // the taps' smallest and largest offsets
  Buffer<Tap> taps_;                                      // of the elements of the kernel
  Buffer<std::int64_t> phase_count_, phase_begin_;        // taps of a phase, and of all before
  Buffer<std::int64_t> offsets_;
  std::int64_t columns_ = 0, rows_ = 0, row_tasks_ = 0, column_tasks_ = 0;  // pixels of a task, and tasks, by axis
  RowBlocks blocks_;                             // of outputs
  std::int64_t groups_ = 0, group_blocks_ = 0;  // groups of blocks, and the blocks of one
  bool streams_;
  T* weight_ = nullptr;
};

// out: [batch, outputs, out_height, out_width]
template <class T>
Status convolve(const Conv2d& p, T* out) {
  DirectConvolution<T> convolution(p);
  const double pixels = double(p.batch * (p.transposed ? p.height * p.width : p.out_height * p.out_width));
  const int threads =
      useful_threads(2.0 * double(p.channels * p.outputs * p.kernel[0] * p.kernel[1]) * pixels, p.threads);
  if (!convolution.find_taps() || !convolution.prepare(threads)) return Status::out_of_memory;
  struct Worker {
    explicit Worker(const DirectConvolution<T>& c)
        : line(c.line_buffer_size()), inputs(c.inputs_size()), products(c.products_size()) {}
    explicit operator bool() const { return line && inputs && products; }
    Buffer<T> line, inputs, products;
  };
  large_pages(out, std::size_t(p.batch * p.outputs * p.out_height * p.out_width) * sizeof(T));
  return with_weights<T>(convolution, p.prepared, threads, [&] {
    return for_each_task(
        threads, convolution.tasks(), [&] { return Worker(convolution); },
        [&](Worker& worker, std::int64_t task) {
          convolution.run(task, worker.line, worker.inputs, worker.products, out);
          return Status::ok;
        });
  });
}

template <class T>
Status prepare(const Conv2d& p, T* prepared, std::int64_t* size) {
  DirectConvolution<T> convolution(p);
  return convolution.find_taps() ? prepare_weights(convolution, p.threads, prepared, size) : Status::out_of_memory;
}

}  // namespace

Status conv2d(Type type, const Conv2d& p, void* out) {
  if (type != Type::float32 && type != Type::float64) return Status::unsupported_type;
  if (is_pointwise(p)) return convolve_pointwise(type, p, out);
  if (is_strided_winograd(type, p)) return convolve_strided(type, p, out);
  return type == Type::float32 ? convolve(p, static_cast<float*>(out)) : convolve(p, static_cast<double*>(out));
}

Status prepare_conv2d(Type type, const Conv2d& p, void* prepared, std::int64_t* size) {
  *size = 0;
  if (type != Type::float32 && type != Type::float64) return Status::unsupported_type;
  if (is_pointwise(p)) return prepare_pointwise(type, p, prepared, size);
  if (is_strided_winograd(type, p)) return prepare_strided(type, p, prepared, size);
  return type == Type::float32 ? prepare(p, static_cast<float*>(prepared), size)
                               : prepare(p, static_cast<double*>(prepared), size);
}

}  // namespace INR_ISA
}  // namespace inr
