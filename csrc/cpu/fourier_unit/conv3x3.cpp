// A 3 x 3 convolution by Winograd's F(2 x 2, 3 x 3), which takes 16 multiplications for 4 outputs instead of 36.
//
//   tile of outputs = A^T [ (G g G^T) * (B^T d B) ] A,   d: 4 x 4 inputs, g: the kernel, * summed over channels
//
//   B^T = 1  0 -1  0      G = 1    0    0       A^T = 1  1  1  0
//         0  1  1  0          1/2  1/2  1/2           0  1 -1 -1
//         0 -1  1  0          1/2 -1/2  1/2
//         0  1  0 -1          0    0    1
//
// A task is some rows of tiles. Its inputs are transformed channel by channel, with vectors across tiles; then for each
// of the 16 points the register micro-kernel multiplies [outputs, channels] by [channels, tiles].
#include "../entries.h"
#include "../common/row_panels.h"
#include "../common/tasks.h"
#include "winograd.h"

namespace inr {
namespace INR_ISA {
namespace {

constexpr int points = 16;
constexpr std::int64_t max_tiles = 64;  // tiles of a task
// Channels and outputs that are computed at a time, so that their 16 points stay in the cache of a core: 0.6 MB each.
constexpr std::int64_t max_channels = 128, max_outputs = 120;

// G g of (g0, g1, g2), for a block of rows. to: 4 blocks, `step` apart
template <class T>
INR_INLINE void transform_kernel(const Rows<T>& g0, const Rows<T>& g1, const Rows<T>& g2, Rows<T>* to, int step) {
  for (int r = 0; r < block_rows; r += lanes<T>) {
    const Vec<T> first = load(g0 + r), last = load(g2 + r);
    const Vec<T> sum = (first + last) * T(0.5), middle = load(g1 + r) * T(0.5);
    store(to[0] + r, first);
    store(to[step] + r, sum + middle);
    store(to[2 * step] + r, sum - middle);
    store(to[3 * step] + r, last);
  }
}

template <class T>
class Winograd {
 public:
  explicit Winograd(const Conv3x3& p) : p_(p), channels_(p.channels[0] + p.channels[1]) {
    const std::int64_t tile_rows = divide_up(p.height, 2), tile_columns = divide_up(p.width, 2);
    columns_ = divide_up(tile_columns, divide_up(tile_columns, max_tiles));
    column_tasks_ = divide_up(tile_columns, columns_);
    // The number of rows whose tiles fill whole panels best.
    rows_ = 1;
    for (std::int64_t r = 2; r * columns_ <= max_tiles && r <= tile_rows; ++r)
      if (r * columns_ * padded_tiles(rows_) >= rows_ * columns_ * padded_tiles(r)) rows_ = r;
    row_tasks_ = divide_up(tile_rows, rows_);
    // One more vector: consecutive rows fall into different cache sets, and the last vector may exceed the row.
    tiles_ = padded_tiles(rows_) + lanes<T>;
    // The inputs of several chunks of channels are not kept, so all outputs are computed from each.
    outputs_ = channels_ > max_channels || p.outputs < max_outputs ? p.outputs : max_outputs;
    line_ = round_up(2 * columns_, 2 * lanes<T>) + 2 + 2 * lanes<T>;
  }

  // Elements of the transformed weights; consecutive points fall into different cache sets.
  std::int64_t weight_size() const { return points * weight_stride(); }
  void use_weights(T* transformed) {
    for (int point = 0; point < points; ++point)
      weight_[point] = {transformed + point * weight_stride(), p_.outputs, channels_};
  }
  // Transforms the kernels of the outputs [i, i + block_rows) to the 16 points.
  void transform_weights(std::int64_t i) {
    // A run of channels is transposed first: a vector that is loaded right after its elements were stored one by one
    // would wait for them.
    constexpr std::int64_t run = 32;
    Rows<T> kernels[run][9] = {}, half[12];
    const std::int64_t rows = p_.outputs - i < block_rows ? p_.outputs - i : block_rows;
    for (std::int64_t first = 0; first < channels_; first += run) {
      const std::int64_t count = channels_ - first < run ? channels_ - first : run;
      for (std::int64_t r = 0; r < rows; ++r) {
        const T* w = static_cast<const T*>(p_.weight) + ((i + r) * channels_ + first) * 9;
        for (std::int64_t c = 0; c < count; ++c, w += 9)
          for (int j = 0; j < 9; ++j) kernels[c][j][r] = w[j];
      }
      for (std::int64_t c = 0; c < count; ++c) {
        const Rows<T>(&g)[9] = kernels[c];
        for (int j = 0; j < 3; ++j) transform_kernel<T>(g[j], g[3 + j], g[6 + j], half + j, 3);
        for (int j = 0; j < 4; ++j) {
          Rows<T> transformed[4];
          transform_kernel<T>(half[3 * j], half[3 * j + 1], half[3 * j + 2], transformed, 1);
          for (int k = 0; k < 4; ++k)
            std::memcpy(weight_[4 * j + k].block(i, first + c), transformed[k], sizeof(T) * block_rows);
        }
      }
    }
  }

  std::int64_t tasks() const { return p_.batch * row_tasks_ * column_tasks_; }
  std::int64_t stage_size() const { return (2 * rows_ + 2) * line_; }
  std::int64_t inputs_size() const { return points * inputs_stride(); }
  std::int64_t products_size() const { return points * products_stride(); }

  // stage: [2 rows_ + 2][line_]; inputs: [16][a chunk of channels][tiles_] and products: [16][a chunk of outputs]
  // [tiles_], with the strides inputs_stride() and products_stride(); out: [batch, outputs, height, width]
  void run(std::int64_t task, T* stage, T* inputs, T* products, T* out) const {
    const std::int64_t image = task / (row_tasks_ * column_tasks_);
    const std::int64_t y = task / column_tasks_ % row_tasks_ * 2 * rows_, x = task % column_tasks_ * 2 * columns_;
    for (std::int64_t o = 0; o < p_.outputs; o += outputs_) {
      const std::int64_t end = o + outputs_ < p_.outputs ? o + outputs_ : p_.outputs;
      for (std::int64_t c = 0; c < channels_; c += max_channels) {
        const std::int64_t count = channels_ - c < max_channels ? channels_ - c : max_channels;
        if (o == 0) load_inputs(image, y, x, c, count, stage, inputs);
        multiply(c, o, end, inputs, products);
      }
      store_outputs(image, y, x, o, end, products, out);
    }
  }

 private:
  std::int64_t weight_stride() const { return round_up(p_.outputs, block_rows) * channels_ + lanes<T>; }
  std::int64_t inputs_stride() const {
    return point_stride<T>((channels_ < max_channels ? channels_ : max_channels) * tiles_);
  }
  std::int64_t products_stride() const { return point_stride<T>(round_up(outputs_, block_rows) * tiles_); }
  std::int64_t padded_tiles(std::int64_t rows) const { return round_up(rows * columns_, panel<T>); }

  // Loads the padded plane from row y - 1 and column x - 1 on. plane: [height, width]; stage: [2 rows_ + 2][line_]
  void load_rows(const T* plane, std::int64_t y, std::int64_t x, T* stage) const {
    const std::int64_t columns = 2 * columns_ + 2, left = x == 0;
    const std::int64_t inside = p_.width - x + 1 < columns ? p_.width - x + 1 : columns;
    for (std::int64_t i = 0; i < 2 * rows_ + 2; ++i, stage += line_) {
      const std::int64_t row = source_index(p_.padding, y + i - 1, p_.height);
      if (row < 0) {
        std::memset(static_cast<void*>(stage), 0, std::size_t(columns) * sizeof(T));
        continue;
      }
      const T* from = plane + row * p_.width;
      // The next channel's row, which the processor does not foresee.
      for (std::int64_t j = left; j < inside; j += 64 / std::int64_t(sizeof(T)))
        __builtin_prefetch(from + p_.height * p_.width + x - 1 + j);
      std::memcpy(stage + left, from + x - 1 + left, std::size_t(inside - left) * sizeof(T));
      const auto pad = [&](std::int64_t j) {
        const std::int64_t col = source_index(p_.padding, x + j - 1, p_.width);
        stage[j] = col < 0 ? T(0) : from[col];
      };
      if (left) pad(0);
      for (std::int64_t j = inside; j < columns; ++j) pad(j);
    }
  }

  // Transforms the inputs of a task's tiles, `count` channels from the channel `first` on.
  void load_inputs(std::int64_t image, std::int64_t y, std::int64_t x, std::int64_t first, std::int64_t count, T* stage,
                   T* inputs) const {
    for (std::int64_t c = 0; c < count; ++c) {
      const int part = first + c >= p_.channels[0];
      const std::int64_t channel = part ? first + c - p_.channels[0] : first + c;
      const T* plane =
          static_cast<const T*>(p_.x[part]) + image * p_.batch_stride[part] + channel * p_.height * p_.width;
      load_rows(plane, y, x, stage);
      for (std::int64_t r = 0; r < rows_; ++r)
        for (std::int64_t t = 0; t < columns_; t += lanes<T>)  // values past the row are overwritten by the next
          transform(y + 2 * r, x + 2 * t, stage + 2 * r * line_ + 2 * t, inputs + c * tiles_ + r * columns_ + t);
    }
  }

  // Adds the products of the chunk of channels from `first` on to those of the outputs [begin, end); sets them if first
  // is 0.
  void multiply(std::int64_t first, std::int64_t begin, std::int64_t end, const T* inputs, T* products) const {
    for (int point = 0; point < points; ++point)
      for (std::int64_t j = 0; j < rows_ * columns_; j += panel<T>)  // a panel of inputs stays in the first cache
        for (std::int64_t i = begin; i < end; i += block_rows) {
          T* to = products + point * products_stride() + (i - begin) * tiles_ + j;
          RowPanels<T>::multiply(weight_[point].chunk(first), i, inputs + point * inputs_stride() + j, tiles_, panel<T>,
                                 [&](std::int64_t, const auto& sums) {
#pragma GCC unroll 12
                                   for (int r = 0; r < block_rows; ++r)
#pragma GCC unroll 2
                                     for (int v = 0; v < 2; ++v) {
                                       T* at = to + r * tiles_ + v * lanes<T>;
                                       store(at, first ? load(at) + sums[r][v] : sums[r][v]);
                                     }
                                 });
        }
  }

  void store_outputs(std::int64_t image, std::int64_t y, std::int64_t x, std::int64_t begin, std::int64_t end,
                     const T* products, T* out) const {
    for (std::int64_t o = begin; o < end; ++o)
      for (std::int64_t r = 0; r < rows_ && y + 2 * r < p_.height; ++r)
        for (std::int64_t t = 0; t < columns_ && x + 2 * t < p_.width; t += lanes<T>)
          transform_outputs(image, o, y + 2 * r, x + 2 * t, products + (o - begin) * tiles_ + r * columns_ + t,
                            columns_ - t, out);
  }

  // Transforms the inputs of a vector of tiles, the first of which starts at row y and column x.
  // stage: [4][line_]; to: [16][lanes] with the stride inputs_stride()
  void transform(std::int64_t y, std::int64_t x, const T* stage, T* to) const {
    Vec<T> d[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      load_pairs(stage + i * line_, d[i][0], d[i][1]);
      load_pairs(stage + i * line_ + 2, d[i][2], d[i][3]);
    }
    if (p_.transposed) add_reflected(y, x, d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) transform_inputs(d[i][0], d[i][1], d[i][2], d[i][3]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      transform_inputs(d[0][j], d[1][j], d[2][j], d[3][j]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store(to + (4 * i + j) * inputs_stride(), d[i][j]);
    }
  }

  // Adds to the inputs of tiles at the border what the transpose of a reflect padding multiplies by the same weights.
  // Its second row of outputs has the products of the first row of inputs with the kernel's last row, too. In a tile,
  // no other output uses the input that has these weights. So in the columns, and at the other two sides.
  void add_reflected(std::int64_t y, std::int64_t x, Vec<T> (&d)[4][4]) const {
    for (int j = 0; j < 4; ++j) {
      if (y == 0) d[3][j] += d[1][j];
      if (y + 2 == p_.height) d[0][j] += d[2][j];
    }
    const std::int64_t last = (p_.width - x) / 2 - 1;
    for (int i = 0; i < 4; ++i) {
      if (x == 0) d[i][3][0] += d[i][1][0];
      if (last >= 0 && last < lanes<T>) d[i][0][last] += d[i][2][last];
    }
  }

  // Transforms a vector of at most `tiles` tiles to two rows of output o, adds bias and `add`, and applies the ReLU.
  // from: [16][lanes] with the stride products_stride(); out: [batch, outputs, height, width]
  void transform_outputs(std::int64_t image, std::int64_t o, std::int64_t y, std::int64_t x, const T* from,
                         std::int64_t tiles, T* out) const {
    const std::int64_t step = products_stride();
    const T bias = p_.bias ? static_cast<const T*>(p_.bias)[o] : T(0);
    Vec<T> m[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec<T> a = load(from + j * step), b = load(from + (4 + j) * step), c = load(from + (8 + j) * step);
      m[0][j] = a + b + c;
      m[1][j] = b - c - load(from + (12 + j) * step);
    }
    const std::int64_t left = p_.width - x, max_count = 2 * (tiles < lanes<T> ? tiles : lanes<T>);
    const std::int64_t count = left < max_count ? left : max_count;
    const std::int64_t at = ((image * p_.outputs + o) * p_.height + y) * p_.width + x;
    for (int i = 0; i < 2 && y + i < p_.height; ++i) {
      const T* add = p_.add ? static_cast<const T*>(p_.add) + at + i * p_.width : nullptr;
      T* to = out + at + i * p_.width;
      Vec<T> pair[2];
      interleave(m[i][0] + m[i][1] + m[i][2] + bias, m[i][1] - m[i][2] - m[i][3] + bias, pair[0], pair[1],
                 std::make_index_sequence<lanes<T>>{});
      T rest[2 * lanes<T>] = {};
      const bool whole = count == 2 * lanes<T>;
      if (add && !whole) std::memcpy(rest, add, std::size_t(count) * sizeof(T)), add = rest;
      for (int v = 0; v < 2; ++v) {
        if (add) pair[v] += load(add + v * lanes<T>);
        if (p_.relu) pair[v] = relu(pair[v]);
        store((whole ? to : rest) + v * lanes<T>, pair[v]);
      }
      if (!whole) std::memcpy(to, rest, std::size_t(count) * sizeof(T));
    }
  }

  const Conv3x3& p_;
  std::int64_t channels_;
  std::int64_t columns_, column_tasks_, rows_, row_tasks_;  // tiles of a task, and tasks, along each axis
  std::int64_t tiles_, line_;                               // row strides of points and of the stage
  std::int64_t outputs_;                                    // whose products are kept at a time
  ChunkedRowPanels<T, max_channels> weight_[points];        // [outputs, channels_]
};

template <class T>
int threads_of(const Conv3x3& p) {
  return useful_threads(
      8.0 * double((p.channels[0] + p.channels[1]) * p.outputs) * double(p.batch * p.height * p.width), p.threads);
}

template <class T>
Status transform_weights(Winograd<T>& winograd, const Conv3x3& p, T* transformed) {
  winograd.use_weights(transformed);
  return for_each_task(
      threads_of<T>(p), divide_up(p.outputs, block_rows), [] { return true; },
      [&](bool, std::int64_t task) {
        winograd.transform_weights(task * block_rows);
        return Status::ok;
      });
}

// out: [batch, outputs, height, width]
template <class T>
Status convolve(const Conv3x3& p, T* out) {
  Winograd<T> winograd(p);
  Buffer<T> transformed;
  if (p.prepared) {
    winograd.use_weights(static_cast<T*>(const_cast<void*>(p.prepared)));
  } else {
    if (!transformed.resize(winograd.weight_size())) return Status::out_of_memory;
    const Status status = transform_weights<T>(winograd, p, transformed);
    if (status != Status::ok) return status;
  }
  struct Worker {
    explicit Worker(const Winograd<T>& w)
        : stage(w.stage_size()), inputs(w.inputs_size()), products(w.products_size()) {}
    explicit operator bool() const { return stage && inputs && products; }
    Buffer<T> stage, inputs, products;
  };
  return for_each_task(
      threads_of<T>(p), winograd.tasks(), [&] { return Worker(winograd); },
      [&](Worker& worker, std::int64_t task) {
        winograd.run(task, worker.stage, worker.inputs, worker.products, out);
        return Status::ok;
      });
}

template <class T>
Status prepare(const Conv3x3& p, T* prepared, std::int64_t* size) {
  Winograd<T> winograd(p);
  *size = winograd.weight_size();
  return prepared ? transform_weights<T>(winograd, p, prepared) : Status::ok;
}

}  // namespace

Status conv3x3(Type type, const Conv3x3& p, void* out) {
  switch (type) {
    case Type::float32: return convolve(p, static_cast<float*>(out));
    case Type::float64: return convolve(p, static_cast<double*>(out));
    default: return Status::unsupported_type;
  }
}

Status prepare_conv3x3(Type type, const Conv3x3& p, void* prepared, std::int64_t* size) {
  switch (type) {
    case Type::float32: return prepare(p, static_cast<float*>(prepared), size);
    case Type::float64: return prepare(p, static_cast<double*>(prepared), size);
    default: return Status::unsupported_type;
  }
}

}  // namespace INR_ISA
}  // namespace inr
