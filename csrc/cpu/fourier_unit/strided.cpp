// A 3 x 3 convolution with stride 2 and padding 1, also transposed, in 49 multiplications where the sum has 81.
//
// Along one axis, the taps split into a pair that meets every second number, and a single one. A tile is 3 neighbouring
// pixels of the grid: 3 outputs, or, transposed, 6, of which the odd ones have the pair.
//
//                d: numbers that the pair g meets     e: numbers of the single tap s
//   convolution  x[-1], x[1], x[3], x[5]; (w0, w2)    x[0], x[2], x[4]; w1
//   transposed   x[0], x[1], x[2], x[3]; (w2, w0)     x[0], x[1], x[2]; w1
//
//   pair:   A^T [(G g) * (B^T d)]   B^T = 1  0 -1  0      G = 1    0      A^T = 1  1  1  0
//   single: s e                           0  1  1  0          1/2  1/2          0  1 -1  0
//                                         0 -1  1  0          1/2 -1/2          0  1  1 -1
//                                         0  1  0 -1          0    1
//
// These are 7 points for 3 x 3 numbers, and 49 in two dimensions: (0..3 for the pair, 4..6 for the single tap) by axis.
// The convolution adds what the pair and the single tap give; the transposed one has them side by side.
//
// A task is a panel of neighbouring tiles, which may continue in the next row of tiles. For a chunk of channels, its
// inputs are transformed with vectors across tiles; then for each point the register micro-kernel multiplies
// [outputs, channels] by [channels, tiles].
#include "strided.h"

#include "../../common/pages.h"
#include "../common/tasks.h"
#include "tiles.h"
#include "weights.h"

namespace inr {
namespace INR_ISA {
namespace {

constexpr int side = 3, axis_points = 7, points = axis_points * axis_points, matrices = 25;
constexpr std::int64_t max_channels = 64;  // that are computed at a time: their inputs take 0.4 MB

// Points 4 to 6 of an axis have the same weight.
constexpr int matrix_of(int point) {
  const int i = point / axis_points, j = point % axis_points;
  return (i < 4 ? i : 4) * 5 + (j < 4 ? j : 4);
}

// out[l] = the element 3 l + K of a, b, c in a row
template <int K, class V, std::size_t... I>
INR_INLINE V every_third(V a, V b, V c, std::index_sequence<I...>) {
  constexpr int n = int(sizeof...(I));
  const V ab = __builtin_shufflevector(a, b, (3 * int(I) + K < 2 * n ? 3 * int(I) + K : 0)...);
  return __builtin_shufflevector(ab, c, (3 * int(I) + K < 2 * n ? int(I) : 3 * int(I) + K - n)...);
}
// Vector number K of a[0], b[0], c[0], a[1], b[1], c[1], ...
template <int K, class V, std::size_t... I>
INR_INLINE V in_turn(V a, V b, V c, std::index_sequence<I...>) {
  constexpr int n = int(sizeof...(I));
  const V ab = __builtin_shufflevector(a, b, ((K * n + int(I)) % 3 * n % (2 * n) + (K * n + int(I)) / 3)...);
  return __builtin_shufflevector(ab, c,
                                 ((K * n + int(I)) % 3 < 2 ? int(I) : n + (K * n + int(I)) / 3)...);
}

template <class T, bool transposed>
class Strided {
  using All = std::make_index_sequence<lanes<T>>;

 public:
  explicit Strided(const Conv2d& p) : p_(p), blocks_(p.outputs) {
    constexpr std::int64_t outputs = transposed ? 2 * side : side;  // of a tile, along an axis
    tile_rows_ = divide_up(p.out_height, outputs), tile_columns_ = divide_up(p.out_width, outputs);
    maps_ = divide_up(tile_rows_ * tile_columns_, panel<T>);
    group_blocks_ = blocks_of_group(p.batch * maps_, blocks_.count(), threads());
    groups_ = divide_up(blocks_.count(), group_blocks_);
    chunk_ = smaller(p.channels, max_channels);
    streams_ = is_streamed(std::size_t(p.batch * p.outputs * p.out_height * p.out_width) * sizeof(T));
  }

  static T* elements(void* data) { return static_cast<T*>(data); }
  // Multiplications for each pair of channel and output.
  double multiplications() const { return double(points) * double(maps_ * panel<T>); }
  int threads() const {
    return useful_threads(2.0 * multiplications() * double(p_.batch * p_.channels * p_.outputs), p_.threads);
  }
  std::int64_t weight_size() const { return matrices * weight_stride(); }
  void use_weights(T* transformed) {
    for (int m = 0; m < matrices; ++m) weight_[m] = {transformed + m * weight_stride(), p_.outputs, p_.channels};
  }
  std::int64_t blocks() const { return blocks_.count(); }
  // Transforms the kernels of a block of outputs.
  void transform_weights(std::int64_t block) {
    const std::int64_t i = blocks_.first(block), height = blocks_.height(block), rows = smaller(p_.outputs - i, height);
    const std::int64_t row_stride = 9 * (transposed ? 1 : p_.channels);
    const std::int64_t channel_stride = 9 * (transposed ? p_.outputs : 1);
    constexpr std::int64_t run = 16;  // see Winograd::transform_weights
    Rows<T> kernels[run][9] = {};
    constexpr int first = transposed ? 2 : 0, second = 2 - first;
    for (std::int64_t begin = 0; begin < p_.channels; begin += run) {
      const std::int64_t count = smaller(p_.channels - begin, run);
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = 0; c < count; ++c) {
          const T* w = static_cast<const T*>(p_.weight) + (i + r) * row_stride + (begin + c) * channel_stride;
          for (int j = 0; j < 9; ++j) kernels[c][j][r] = w[j];
        }
      for (std::int64_t c = 0; c < count; ++c) {
        const Rows<T>(&g)[9] = kernels[c];
        Rows<T> half[5][3], whole[5];
        for (int j = 0; j < 3; ++j) {
          Rows<T> column[5];
          transform_kernel(g[3 * first + j], g[3 * second + j], g[3 + j], column);
          for (int k = 0; k < 5; ++k) std::memcpy(half[k][j], column[k], sizeof column[k]);
        }
        for (int k = 0; k < 5; ++k) {
          transform_kernel(half[k][first], half[k][second], half[k][1], whole);
          for (int m = 0; m < 5; ++m)
            std::memcpy(weight_[5 * k + m].block(block, begin + c), whole[m], sizeof(T) * std::size_t(height));
        }
      }
    }
  }

  std::int64_t tasks() const { return p_.batch * maps_ * groups_; }
  std::int64_t stage_size() const { return line_size() + axis_points * 6 * phase_size(); }
  std::int64_t inputs_size() const { return points * inputs_stride(); }
  std::int64_t products_size() const { return points * products_stride(); }

  // stage: [stage_size()]; inputs: [points][a chunk of channels][row()] and products: [points][outputs of a group]
  // [row()], with the strides inputs_stride() and products_stride(); out: [batch, outputs, out_height, out_width]
  void run(std::int64_t task, T* stage, T* inputs, T* products, T* out) const {
    const std::int64_t begin = task % groups_ * group_blocks_, end = smaller(begin + group_blocks_, blocks_.count());
    const std::int64_t first_output = blocks_.first(begin), last_output = smaller(blocks_.first(end), p_.outputs);
    const std::int64_t image = task / groups_ / maps_, first = task / groups_ % maps_ * panel<T>;
    const auto for_segments = [&](auto&& work) { for_each_segment(first, panel<T>, tile_rows_, tile_columns_, work); };
    for (std::int64_t c = 0; c < p_.channels; c += max_channels) {
      const std::int64_t count = smaller(p_.channels - c, max_channels);
      for_segments([&](const Segment& s) { load_inputs(image, s, c, count, stage, inputs); });
      for (int point = 0; point < points; ++point)
        for (std::int64_t block = begin; block < end; ++block) {
          T* to = products + point * products_stride() + (blocks_.first(block) - first_output) * row();
          RowPanels<T>::multiply(weight_[matrix_of(point)].chunk(c), block, inputs + point * inputs_stride(), row(),
                                 panel<T>,
                                 [&](std::int64_t, const auto& sums) { add_sums(sums, c > 0, to, row()); });
        }
    }
    for (std::int64_t o = first_output; o < last_output; ++o)
      for_segments([&](const Segment& s) {
        for (std::int64_t t = 0; t < s.count; t += lanes<T>)
          store_tiles(image, o, s, t, products + (o - first_output) * row() + s.index + t, out);
      });
    if (streams_) stream_fence();
  }

 private:
  static constexpr std::int64_t step = transposed ? 1 : 2;  // of x's pixels from one of the grid to the next

  // A row of a point's inputs or products; the last vector of a segment may exceed the panel.
  static constexpr std::int64_t row() { return panel<T> + lanes<T>; }
  std::int64_t weight_stride() const { return RowPanels<T>::size(p_.outputs, p_.channels) + lanes<T>; }
  std::int64_t inputs_stride() const { return point_stride<T>(chunk_ * row()); }
  std::int64_t products_stride() const { return point_stride<T>(group_blocks_ * block_rows * row()); }
  static constexpr std::int64_t line_size() { return 6 * panel<T> + 8 * lanes<T>; }  // of a padded row of the image
  static constexpr std::int64_t phase_size() { return panel<T> + 2 * lanes<T>; }     // one phase of it

  // a, b: the pair; s: the single tap; to: the 5 distinct weights of an axis
  INR_INLINE void transform_kernel(const Rows<T>& a, const Rows<T>& b, const Rows<T>& s, Rows<T> (&to)[5]) {
    for (int r = 0; r < block_rows; r += lanes<T>) {
      const Vec<T> va = load(a + r), vb = load(b + r);
      store(to[0] + r, va);
      store(to[1] + r, (va + vb) * T(0.5));
      store(to[2] + r, (va - vb) * T(0.5));
      store(to[3] + r, vb);
      store(to[4] + r, load(s + r));
    }
  }

  // Loads the numbers of a segment's tiles from one row of the image: the 3 phases of d, then those of e.
  // plane: [height, width]; line: [line_size()]; to: [6][phase_size()]
  void load_row(const T* plane, std::int64_t v, const Segment& s, T* line, T* to) const {
    const std::int64_t row = source_index(p_.padding, v, p_.height);
    if (row < 0) return void(std::memset(static_cast<void*>(to), 0, sizeof(T) * std::size_t(6 * phase_size())));
    const T* from = plane + row * p_.width;
    const std::int64_t left = step * side * s.column - (step - 1), used = step * side * s.count + 1;
    const std::int64_t begin = left < 0, end = clamp(p_.width - left, begin, used);
    for (std::int64_t j = begin; j < end; j += 64 / std::int64_t(sizeof(T)))  // the next channel's row
      __builtin_prefetch(from + p_.height * p_.width + left + j);
    std::memcpy(line + begin, from + left + begin, std::size_t(end - begin) * sizeof(T));
    const auto pad = [&](std::int64_t j) {
      const std::int64_t column = source_index(p_.padding, left + j, p_.width);
      line[j] = column < 0 ? T(0) : from[column];
    };
    if (begin) pad(0);
    for (std::int64_t j = end; j < used; ++j) pad(j);
    for (std::int64_t t = 0; t <= s.count; t += lanes<T>) {  // one more tile: its first number is d[3] of the last
      const T* at = line + step * side * t;
      Vec<T> d[3], e[3];
      for (int k = 0; k < 3; ++k)
        if (transposed)
          d[k] = load(at + k * lanes<T>);
        else
          load_pairs(at + 2 * k * lanes<T>, d[k], e[k]);
      store_phases(d, to + t);
      if (!transposed) store_phases(e, to + 3 * phase_size() + t);
    }
  }
  INR_INLINE void store_phases(const Vec<T> (&v)[3], T* to) {
    store(to, every_third<0>(v[0], v[1], v[2], All{}));
    store(to + phase_size(), every_third<1>(v[0], v[1], v[2], All{}));
    store(to + 2 * phase_size(), every_third<2>(v[0], v[1], v[2], All{}));
  }

  // Transforms the inputs of a segment, `count` channels from the channel `first` on.
  void load_inputs(std::int64_t image, const Segment& s, std::int64_t first, std::int64_t count, T* stage,
                   T* inputs) const {
    const std::int64_t top = step * side * s.row - (step - 1);
    T* const rows = stage + line_size();
    for (std::int64_t c = 0; c < count; ++c) {
      const T* plane = static_cast<const T*>(p_.x) + (image * p_.channels + first + c) * p_.height * p_.width;
      for (int i = 0; i < (transposed ? 4 : axis_points); ++i)
        load_row(plane, top + i, s, stage, rows + i * 6 * phase_size());
      for (std::int64_t t = 0; t < s.count; t += lanes<T>) transform(rows + t, inputs + c * row() + s.index + t);
    }
  }

  // Transforms the inputs of a vector of tiles. rows: [4 or 7][6][phase_size()], of the first tile; to: [points][lanes]
  // with the stride inputs_stride()
  INR_NOINLINE void transform(const T* rows, T* to) const {
    Vec<T> values[axis_points][axis_points];  // [row][point along x]
    constexpr int count = transposed ? 4 : axis_points;
#pragma GCC unroll 7
    for (int i = 0; i < count; ++i, rows += 6 * phase_size()) {
      const T* e = transposed ? rows : rows + 3 * phase_size();
      Vec<T> d[4] = {load(rows), load(rows + phase_size()), load(rows + 2 * phase_size()), load(rows + 1)};
      transform_inputs(d);
      for (int k = 0; k < 4; ++k) values[i][k] = d[k];
      for (int k = 0; k < 3; ++k) values[i][4 + k] = load(e + k * phase_size());
    }
    constexpr int d = transposed ? 1 : 2, first_e = transposed ? 0 : 1;
#pragma GCC unroll 7
    for (int j = 0; j < axis_points; ++j) {
      Vec<T> v[4] = {values[0][j], values[d][j], values[2 * d][j], values[3 * d][j]};
      transform_inputs(v);
      for (int i = 0; i < 4; ++i) store(to + (i * axis_points + j) * inputs_stride(), v[i]);
      for (int i = 0; i < 3; ++i) store(to + ((4 + i) * axis_points + j) * inputs_stride(), values[first_e + i * d][j]);
    }
  }

  // A^T m of the pair.
  INR_INLINE void transform_pair(Vec<T> m0, Vec<T> m1, Vec<T> m2, Vec<T> m3, Vec<T> (&to)[3]) {
    const Vec<T> sum = m1 + m2;
    to[0] = m0 + sum, to[1] = m1 - m2, to[2] = sum - m3;
  }

  // The outputs of an axis from those of its points, 3, or 6 of the transposed convolution.
  void transform_axis(const Vec<T> (&m)[axis_points], Vec<T> (&to)[6]) const {
    Vec<T> pair[3];
    transform_pair(m[0], m[1], m[2], m[3], pair);
    for (int k = 0; k < 3; ++k) {
      if (transposed) to[2 * k] = m[4 + k];
      to[transposed ? 2 * k + 1 : k] = transposed ? pair[k] : pair[k] + m[4 + k];
    }
  }

  // Stores the outputs of a vector of tiles from the tile t of a segment on, of output o.
  // from: [points][lanes] with the stride products_stride(); out: [batch, outputs, out_height, out_width]
  INR_NOINLINE void store_tiles(std::int64_t image, std::int64_t o, const Segment& s, std::int64_t t, const T* from,
                                T* out) const {
    constexpr int count = transposed ? 6 : 3;  // outputs of a tile along an axis
    Vec<T> rows[6][axis_points];
#pragma GCC unroll 7
    for (int j = 0; j < axis_points; ++j) {
      Vec<T> m[axis_points], to[6];
#pragma GCC unroll 7
      for (int i = 0; i < axis_points; ++i) m[i] = load(from + (i * axis_points + j) * products_stride());
      transform_axis(m, to);
      for (int i = 0; i < count; ++i) rows[i][j] = to[i];
    }
    const std::int64_t y = s.row * count, x = (s.column + t) * count;
    const std::int64_t width = smaller(smaller(s.count - t, lanes<T>) * count, p_.out_width - x);
    for (int i = 0; i < count && y + i < p_.out_height; ++i) {
      Vec<T> v[6];
      transform_axis(rows[i], v);
      const std::int64_t at = ((image * p_.outputs + o) * p_.out_height + y + i) * p_.out_width + x;
      if constexpr (!transposed) {
        const Vec<T> whole[3] = {in_turn<0>(v[0], v[1], v[2], All{}), in_turn<1>(v[0], v[1], v[2], All{}),
                                 in_turn<2>(v[0], v[1], v[2], All{})};
        for (int k = 0; k < 3; ++k) finish<T>(p_, whole[k], o, at + k * lanes<T>, width - k * lanes<T>, streams_, out);
      } else {
        const Vec<T> even[3] = {in_turn<0>(v[0], v[2], v[4], All{}), in_turn<1>(v[0], v[2], v[4], All{}),
                                in_turn<2>(v[0], v[2], v[4], All{})};
        const Vec<T> odd[3] = {in_turn<0>(v[1], v[3], v[5], All{}), in_turn<1>(v[1], v[3], v[5], All{}),
                               in_turn<2>(v[1], v[3], v[5], All{})};
        for (int k = 0; k < 3; ++k) {
          Vec<T> pair[2];
          interleave(even[k], odd[k], pair[0], pair[1], All{});
          finish<T>(p_, pair[0], o, at + 2 * k * lanes<T>, width - 2 * k * lanes<T>, streams_, out);
          finish<T>(p_, pair[1], o, at + (2 * k + 1) * lanes<T>, width - (2 * k + 1) * lanes<T>, streams_, out);
        }
      }
    }
  }

  const Conv2d& p_;
  RowBlocks blocks_;                           // of outputs
  std::int64_t tile_rows_, tile_columns_;      // of an image
  std::int64_t maps_, groups_, group_blocks_;  // tasks of an image; groups of blocks that split each
  std::int64_t chunk_;
  bool streams_;
  ChunkedRowPanels<T, max_channels> weight_[matrices];  // [outputs, channels]
};

// Calls work(algorithm) with the algorithm of the problem, of float32 or float64.
template <class F>
auto with_algorithm(Type type, const Conv2d& p, F&& work) {
  const auto run = [&](auto algorithm) { return work(algorithm); };
  if (type == Type::float64) return p.transposed ? run(Strided<double, true>(p)) : run(Strided<double, false>(p));
  return p.transposed ? run(Strided<float, true>(p)) : run(Strided<float, false>(p));
}

// out: [batch, outputs, out_height, out_width]
template <class T, bool transposed>
Status convolve(Strided<T, transposed>& strided, const Conv2d& p, T* out) {
  struct Worker {
    explicit Worker(const Strided<T, transposed>& s)
        : stage(s.stage_size(), false), inputs(s.inputs_size(), false), products(s.products_size(), false) {}
    explicit operator bool() const { return stage && inputs && products; }
    Buffer<T> stage, inputs, products;
  };
  large_pages(out, std::size_t(p.batch * p.outputs * p.out_height * p.out_width) * sizeof(T));
  return with_weights<T>(strided, p.prepared, strided.threads(), [&] {
    return for_each_task(
        strided.threads(), strided.tasks(), [&] { return Worker(strided); },
        [&](Worker& worker, std::int64_t task) {
          strided.run(task, worker.stage, worker.inputs, worker.products, out);
          return Status::ok;
        });
  });
}

}  // namespace

bool is_strided_winograd(Type type, const Conv2d& p) {
  const bool fits = p.kernel[0] == 3 && p.kernel[1] == 3 && p.stride[0] == 2 && p.stride[1] == 2 && p.pad[0] == 1 &&
                    p.pad[1] == 1 && p.channels >= 16 && p.outputs >= block_rows;
  if (!fits) return false;
  const std::int64_t pixels = p.transposed ? p.height * p.width : p.out_height * p.out_width;
  return with_algorithm(type, p, [](auto& strided) { return strided.multiplications(); }) < 0.75 * 9 * double(pixels);
}

Status convolve_strided(Type type, const Conv2d& p, void* out) {
  return with_algorithm(type, p, [&](auto& strided) { return convolve(strided, p, strided.elements(out)); });
}

Status prepare_strided(Type type, const Conv2d& p, void* prepared, std::int64_t* size) {
  return with_algorithm(type, p, [&](auto& strided) {
    return prepare_weights(strided, p.threads, strided.elements(prepared), size);
  });
}

}  // namespace INR_ISA
}  // namespace inr
