// A 3 x 3 convolution by Winograd's algorithm, which multiplies fewer numbers than the sum.
//
//   tile of outputs = A^T [ (G g G^T) * (B^T d B) ] A,   d: a tile of inputs, g: the kernel, * summed over channels
//
// A tile of outputs is M x 2: F(4 x 2, 3 x 3) takes 24 multiplications for 8 outputs where the sum has 72, and
// F(2 x 2, 3 x 3) 16 for 4 outputs instead of 36. The matrices, along each axis, are in winograd.h.
//
// A task is a panel of neighbouring tiles, which may continue in the next row of tiles. For a chunk of channels, its
// inputs are transformed with vectors across tiles; then for each point of a tile the register micro-kernel multiplies
// [outputs, channels] by [channels, tiles].
#include "../../common/pages.h"
#include "../entries.h"
#include "../common/row_panels.h"
#include "../common/tasks.h"
#include "tile_inputs.h"
#include "weights.h"

namespace inr {
namespace INR_ISA {
namespace {

// Channels and blocks of outputs that are computed at a time, so that their points stay in the cache of a core: 0.6 and
// 1.1 MB. With more channels, all outputs of a task are computed at a time.
constexpr std::int64_t max_channels = 128, max_blocks = 240 / block_rows;
constexpr std::int64_t few_channels = 16;  // below, a direct sum has fewer rounding errors than tiles of 4 x 2
constexpr std::int64_t product_run = 16;  // channels that are added before the others, for smaller rounding errors

int threads_of(const Conv3x3& p) {
  return useful_threads(
      8.0 * double((p.channels[0] + p.channels[1]) * p.outputs) * double(p.batch * p.height * p.width), p.threads);
}

// M: rows of outputs of a tile, 2 or 4
template <class T, int M>
class Winograd {
  using Inputs = TileInputs<T, M, panel<T>>;
  static constexpr int tall = Inputs::tall, points = Inputs::points;

 public:
  explicit Winograd(const Conv3x3& p)
      : p_(p), inputs_(p), channels_(p.channels[0] + p.channels[1]), blocks_(p.outputs) {
    tile_rows_ = divide_up(p.height, M), tile_columns_ = divide_up(p.width, 2);
    maps_ = divide_up(tile_rows_ * tile_columns_, panel<T>);
    group_blocks_ = blocks_of_group(p.batch * maps_, blocks_.count(), threads_of(p));
    groups_ = divide_up(blocks_.count(), group_blocks_);
    // The inputs of several chunks of channels are not kept, so all outputs are computed from each.
    kept_blocks_ = channels_ > max_channels ? group_blocks_ : smaller(group_blocks_, max_blocks);
  }

  // Elements of the transformed weights; consecutive points fall into different cache sets.
  std::int64_t weight_size() const { return points * weight_stride(); }
  void use_weights(T* transformed) {
    for (int point = 0; point < points; ++point)
      weight_[point] = {transformed + point * weight_stride(), p_.outputs, channels_};
  }
  std::int64_t blocks() const { return blocks_.count(); }
  // Transforms the kernels of a block of outputs to the points.
  void transform_weights(std::int64_t block) {
    // A run of channels is transposed first: a vector that is loaded right after its elements were stored one by one
    // would wait for them.
    constexpr std::int64_t run = 32;
    Rows<T> kernels[run][9] = {};
    const std::int64_t o = blocks_.first(block), height = blocks_.height(block), rows = smaller(p_.outputs - o, height);
    for (std::int64_t first = 0; first < channels_; first += run) {
      const std::int64_t count = channels_ - first < run ? channels_ - first : run;
      for (std::int64_t r = 0; r < rows; ++r) {
        const T* w = static_cast<const T*>(p_.weight) + ((o + r) * channels_ + first) * 9;
        for (std::int64_t c = 0; c < count; ++c, w += 9)
          for (int j = 0; j < 9; ++j) kernels[c][j][r] = w[j];
      }
      for (std::int64_t c = 0; c < count; ++c) {
        const Rows<T>(&g)[9] = kernels[c];
        Rows<T> half[tall][3], transformed[4];
        for (int j = 0; j < 3; ++j) {
          Rows<T> column[tall];
          transform_kernel<T>(g[j], g[3 + j], g[6 + j], column);
          for (int i = 0; i < tall; ++i) std::memcpy(half[i][j], column[i], sizeof column[i]);
        }
        for (int i = 0; i < tall; ++i) {
          transform_kernel<T>(half[i][0], half[i][1], half[i][2], transformed);
          for (int k = 0; k < 4; ++k)
            std::memcpy(weight_[4 * i + k].block(block, first + c), transformed[k], sizeof(T) * std::size_t(height));
        }
      }
    }
  }

  std::int64_t tasks() const { return p_.batch * maps_ * groups_; }
  std::int64_t stage_size() const { return Inputs::stage_size(); }
  std::int64_t inputs_size() const { return points * inputs_stride(); }
  std::int64_t products_size() const { return points * products_stride(); }

  // stage: [stage_size()], a work buffer; inputs: [points][a chunk of channels][row()] and products: [points][a chunk of
  // outputs][row()], with the strides inputs_stride() and products_stride(); out: [batch, outputs, height, width]
  void run(std::int64_t task, T* stage, T* inputs, T* products, T* out) const {
    const std::int64_t begin = task % groups_ * group_blocks_, end = smaller(begin + group_blocks_, blocks_.count());
    const std::int64_t image = task / groups_ / maps_, tile = task / groups_ % maps_ * panel<T>;
    const auto for_segments = [&](auto&& work) { for_each_segment(tile, panel<T>, tile_rows_, tile_columns_, work); };
    for (std::int64_t block = begin; block < end; block += kept_blocks_) {
      const std::int64_t last = smaller(block + kept_blocks_, end);
      for (std::int64_t c = 0; c < channels_; c += max_channels) {
        const std::int64_t count = smaller(channels_ - c, max_channels);
        if (block == begin) for_segments([&](const Segment& s) { load_inputs(image, s, c, count, stage, inputs); });
        multiply(c, block, last, tile_rows_ * tile_columns_ - tile, inputs, products);
      }
      for_segments([&](const Segment& s) { store_outputs(image, s, block, last, products, out); });
    }
  }

 private:
  // A row of a point's inputs or products; the last vector of a segment may exceed the panel.
  static constexpr std::int64_t row() { return panel<T> + lanes<T>; }
  std::int64_t weight_stride() const { return RowPanels<T>::size(p_.outputs, channels_) + lanes<T>; }
  std::int64_t inputs_stride() const { return point_stride<T>(smaller(channels_, max_channels) * row()); }
  std::int64_t products_stride() const { return point_stride<T>(kept_blocks_ * block_rows * row()); }

  // Transforms the inputs of a segment, `count` channels from the channel `first` on.
  void load_inputs(std::int64_t image, const Segment& s, std::int64_t first, std::int64_t count, T* stage,
                   T* inputs) const {
    for (std::int64_t c = 0; c < count; ++c)
      inputs_.transform(image, first + c, s, stage, inputs_stride(), inputs + c * row() + s.index);
  }

  // Adds the products of the chunk of channels from `first` on to those of the blocks [begin, end); sets them if first
  // is 0. tiles: how many of the panel exist, or more
  void multiply(std::int64_t first, std::int64_t begin, std::int64_t end, std::int64_t tiles, const T* inputs,
                T* products) const {
    for (int point = 0; point < points; ++point)
      for (std::int64_t block = begin; block < end; ++block) {
        T* to = products + point * products_stride() + (blocks_.first(block) - blocks_.first(begin)) * row();
        const auto add = [&](std::int64_t, const auto& sums) { add_sums(sums, first > 0, to, row()); };
        const T* from = inputs + point * inputs_stride();
        const auto weight = weight_[point].chunk(first);
        if (tiles > lanes<T>)
          RowPanels<T>::template multiply<product_run>(weight, block, from, row(), panel<T>, add);
        else
          RowPanels<T>::template multiply<product_run, 1>(weight, block, from, row(), lanes<T>, add);
      }
  }

  // Stores the outputs of the blocks [begin, end), of a segment.
  void store_outputs(std::int64_t image, const Segment& s, std::int64_t begin, std::int64_t end, const T* products,
                     T* out) const {
    const std::int64_t first = blocks_.first(begin), last = smaller(blocks_.first(end), p_.outputs);
    for (std::int64_t o = first; o < last; ++o)
      for (std::int64_t t = 0; t < s.count; t += lanes<T>)
        transform_outputs(image, o, M * s.row, 2 * (s.column + t), products + (o - first) * row() + s.index + t,
                          s.count - t, out);
  }

  // Transforms a vector of at most `tiles` tiles to M rows of output o, and finishes them: see Conv3x3.
  // from: [points][lanes] with the stride products_stride(); out: [batch, outputs, height, width]
  void transform_outputs(std::int64_t image, std::int64_t o, std::int64_t y, std::int64_t x, const T* from,
                         std::int64_t tiles, T* out) const {
    const std::int64_t step = products_stride();
    const T bias = p_.bias ? static_cast<const T*>(p_.bias)[o] : T(0);
    Vec<T> m[M][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Vec<T> column[tall], outputs[M];
#pragma GCC unroll 6
      for (int i = 0; i < tall; ++i) column[i] = load(from + (4 * i + j) * step);
      transform_products(column, outputs);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) m[i][j] = outputs[i];
    }
    const std::int64_t at = ((image * p_.outputs + o) * p_.height + y) * p_.width + x;
    const std::int64_t rows = smaller(p_.height - y, M), columns = smaller(p_.width - x, 2 * smaller(tiles, lanes<T>));
    if (rows == M && columns == 2 * lanes<T>)
      store_rows<true>(m, rows, columns, bias, at, out);
    else
      store_rows<false>(m, rows, columns, bias, at, out);
  }

  // Transforms the rows of a vector of tiles, finishes them and stores them from out[at]. all: whether the tiles have all
  // of their rows and columns inside the image
  template <bool all>
  void store_rows(const Vec<T> (&m)[M][4], std::int64_t rows, std::int64_t columns, T bias, std::int64_t at,
                  T* out) const {
    // Read once: stores to out may alias p_.
    const std::int64_t width = p_.width, plane = p_.height * width;
    const bool rectified = p_.relu;
    const T *add = static_cast<const T*>(p_.add), *residual = static_cast<const T*>(p_.residual);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i, at += width) {
      if (!all && i >= rows) break;
      Vec<T> sums[2], pair[2];
      transform_products(m[i], sums);
      interleave(sums[0] + bias, sums[1] + bias, pair[0], pair[1], std::make_index_sequence<lanes<T>>{});
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const std::int64_t to = at + v * lanes<T>, count = all ? lanes<T> : columns - v * lanes<T>;
        if (!all && count <= 0) break;
        if (add) pair[v] += load_next(add + to, plane, count);
        if (rectified) pair[v] = relu(pair[v]);
        if (residual) pair[v] += load_next(residual + to, plane, count);
        store_up_to<T>(pair[v], count, out + to);
      }
    }
  }

  // Loads at most n elements, and prefetches those of the next output, which the processor does not foresee.
  INR_INLINE Vec<T> load_next(const T* from, std::int64_t plane, std::int64_t n) {
    __builtin_prefetch(from + plane);
    return load_up_to(from, n);
  }

  const Conv3x3& p_;
  Inputs inputs_;
  std::int64_t channels_;
  RowBlocks blocks_;                           // of outputs
  std::int64_t tile_rows_, tile_columns_;      // of an image
  std::int64_t maps_, groups_, group_blocks_;  // tasks of an image; groups of blocks that split each
  std::int64_t kept_blocks_;                   // whose products are kept at a time
  ChunkedRowPanels<T, max_channels> weight_[points];        // [outputs, channels_]
};

// Calls work(algorithm) with the form of the algorithm for the problem. Larger tiles have larger rounding errors: with
// few channels the direct sum has fewer roundings, too. The border that add_reflected adds to has tiles of 2 x 2.
template <class T, class F>
Status with_algorithm(const Conv3x3& p, F&& work) {
  if (!p.transposed && p.channels[0] + p.channels[1] >= few_channels) {
    Winograd<T, 4> algorithm(p);
    return work(algorithm);
  }
  Winograd<T, 2> algorithm(p);
  return work(algorithm);
}

// out: [batch, outputs, height, width]
template <class T, int M>
Status convolve(Winograd<T, M>& winograd, const Conv3x3& p, T* out) {
  struct Worker {
    explicit Worker(const Winograd<T, M>& w)
        : stage(w.stage_size(), false), inputs(w.inputs_size(), false), products(w.products_size(), false) {}
    explicit operator bool() const { return stage && inputs && products; }
    Buffer<T> stage, inputs, products;
  };
  large_pages(out, std::size_t(p.batch * p.outputs * p.height * p.width) * sizeof(T));
  return with_weights<T>(winograd, p.prepared, threads_of(p), [&] {
    return for_each_task(
        threads_of(p), winograd.tasks(), [&] { return Worker(winograd); },
        [&](Worker& worker, std::int64_t task) {
          winograd.run(task, worker.stage, worker.inputs, worker.products, out);
          return Status::ok;
        });
  });
}

template <class T>
Status convolve(const Conv3x3& p, T* out) {
  return with_algorithm<T>(p, [&](auto& winograd) { return convolve(winograd, p, out); });
}

template <class T>
Status prepare(const Conv3x3& p, T* prepared, std::int64_t* size) {
  return with_algorithm<T>(p, [&](auto& winograd) { return prepare_weights(winograd, p.threads, prepared, size); });
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
