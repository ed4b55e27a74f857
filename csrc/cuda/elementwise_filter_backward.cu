// The backward of elementwise_filter in float32, bfloat16 and float16, in one pass: up to 25 taps, at stride and upscale
// 1, not with one softmax over all groups.
//
// A block has the gradients of a rectangle of pixels in one group of one image. In shared memory it keeps the weights,
// the input and the gradient of the output, of these pixels and a halo as wide as the kernel's reach: the gradient of a
// pixel is a sum over the outputs that read it. A thread has four adjacent pixels. No kernel uses atomics.
#include "cuda/elementwise_filter.cuh"

namespace inr {
namespace cuda {
namespace {

constexpr int max_threads = 256;
constexpr int max_taps = 25, max_dilations = 8;  // the same in inr_kernels/elementwise_filter/op.py

// How the pixels that get a gradient are divided: (y, x), in output pixels.
struct Rectangles {
  int reach[2], halo[2];     // of the kernel; the latter in whole quads along x
  int first[2], last[2];     // of these pixels: beyond the output where the input is larger
  int size[2], counts[2];    // of a rectangle without its halo; how many
  int threads;

  __host__ __device__ int rows() const { return size[0] + 2 * halo[0]; }
  __host__ __device__ int pitch() const { return size[1] + 2 * halo[1]; }
  // Bytes of shared memory of a block.
  std::size_t shared(int taps) const { return std::size_t(taps + 2) * rows() * pitch() * sizeof(float); }
};

template <Type type>
struct Backward : Problem<type> {
  using Problem<type>::Problem;
  Plane4<type> grad;         // [dilations, batch, channels, out_height, out_width], of the output
  Plane4<type> grad_x;       // [batch, channels, height, width]; data == nullptr: not computed, like the next
  Plane4<type> grad_kernel;  // [batch, groups, taps, out_height, out_width]
  Rectangles rectangles;
  std::int64_t step;  // from the gradient of one dilation's output to the next, in elements
  int dilations[max_dilations], dilation_count;
  int origin[2];      // the input pixel on which output (0, 0) is centred
};

__device__ __forceinline__ void copy(const float (&v)[pixels], float* shared) {
  *reinterpret_cast<float4*>(shared) = {v[0], v[1], v[2], v[3]};
}

// Four values in shared memory, `o` columns after those of a quad. With a constant o the loads of a row are shared.
template <bool is_constant>
__device__ __forceinline__ void load_shifted(const float* quad, int o, float (&v)[pixels]) {
  float inner[pixels];
  if (is_constant) Stored<Type::float32>::load(reinterpret_cast<const float4*>(quad), inner);
#pragma unroll
  for (int i = 0; i < pixels; ++i) v[i] = is_constant && i + o >= 0 && i + o < pixels ? inner[i + o] : quad[i + o];
}

// What a block computes, and a thread of it.
template <Type type>
struct Place {
  std::int64_t image, group;
  int top, left;       // of the rectangle with its halo
  int y, x, at;        // the thread's first pixel; its place in shared memory
  int outputs;         // how many of the four are output pixels
  bool is_own;         // whether the block has their gradients

  __device__ __forceinline__ explicit Place(const Backward<type>& p) {
    const Rectangles& r = p.rectangles;
    const unsigned rectangle = blockIdx.x % (r.counts[0] * r.counts[1]), unit = blockIdx.x / (r.counts[0] * r.counts[1]);
    group = unit % p.groups, image = unit / p.groups;
    const int own_y = r.first[0] + int(rectangle / r.counts[1]) * r.size[0];
    const int own_x = r.first[1] + int(rectangle % r.counts[1]) * r.size[1];
    top = own_y - r.halo[0], left = own_x - r.halo[1];
    // Threads take the part of the rectangle in which there are pixels.
    const int begin_y = max(top, r.first[0]), end_y = min(top + r.rows(), r.last[0]);
    const int begin_x = max(left, r.first[1]), end_x = min(left + r.pitch(), r.last[1]);
    const int quads = (end_x - begin_x + pixels - 1) / pixels;
    y = begin_y + int(threadIdx.x) / quads, x = begin_x + int(threadIdx.x) % quads * pixels;
    at = (y - top) * r.pitch() + x - left;
    outputs = y < end_y ? count_outputs(p, y, x) : 0;
    is_own = y < end_y && y >= own_y && y < own_y + r.size[0] && x >= own_x && x < own_x + r.size[1];
  }
  // How many of four pixels are in the output; x: a multiple of four.
  static __device__ __forceinline__ int count_outputs(const Backward<type>& p, int y, int x) {
    return y >= 0 && y < p.out_height && x >= 0 ? max(0, min(pixels, p.out_width - x)) : 0;
  }
  // The index of a channel of the group among those of all images.
  __device__ __forceinline__ std::int64_t channel(const Backward<type>& p, int c) const {
    return (image * p.groups + group) * p.channels + c;
  }
};

// The index in [0, n) of the value at index i with its padding, of which a pixel's taps read at most `reach`; else -1.
template <Type type>
__device__ __forceinline__ int read_index(const Backward<type>& p, int i, int n, int reach) {
  return i >= -reach && i < n + reach ? padded_index(p.padding, i, n) : -1;
}

// Copies a dilation's gradient of the output, and the input with its padding, to shared memory: [rows, pitch] each.
template <bool whole, Type type>
__device__ __forceinline__ void fill(const Backward<type>& p, const Place<type>& place, int c, int dilation, float* grad,
                                     float* x) {
  const Rectangles& r = p.rectangles;
  const int quads = r.pitch() / pixels;
  const std::int64_t channel = place.channel(p, c), image = channel * p.height;
  for (int i = threadIdx.x; i < r.rows() * quads; i += blockDim.x) {
    const int row = i / quads, column = (i - row * quads) * pixels, Y = place.top + row, X = place.left + column;
    const int outputs = Place<type>::count_outputs(p, Y, X);
    float v[pixels];
    p.grad.template load<whole>(dilation * p.step + (channel * p.out_height + Y) * p.out_width + X, 1, outputs, v);
    copy(v, grad + i * pixels);
    if (dilation > 0 || !p.grad_kernel.data) continue;
    const int from_y = read_index(p, Y + p.origin[0], p.height, r.reach[0]), from_x = X + p.origin[1];
    const std::int64_t from = (image + from_y) * p.width;
    const bool inside = from_x >= 0 && from_x + pixels <= p.width;
    p.x.template load<whole>(from + from_x, 1, inside && from_y >= 0 ? pixels : 0, v);
    copy(v, x + i * pixels);
#pragma unroll 1
    for (int k = 0; !whole && !inside && from_y >= 0 && k < pixels; ++k) {
      const int index = read_index(p, from_x + k, p.width, r.reach[1]);
      if (index >= 0) x[i * pixels + k] = Stored<type>::load(p.x.data + from + index);
    }
  }
}

// The sums over the taps that read a pixel (y, x) through the padding: weighted, and of the gradient alone.
// weights: [taps, rows, pitch]; grad: [rows, pitch].
template <Type type>
__device__ __forceinline__ float2 sum_folded(const Backward<type>& p, const Place<type>& place, int y, int x,
                                             int dilation, const float* weights, const float* grad) {
  float2 sums = {0, 0};
  const Rectangles& r = p.rectangles;
  const int plane = r.rows() * r.pitch();
  // Of an axis: the pixel itself, then those before the first one, and those after the last one.
  const auto nth = [](int n, int i, int size, int reach) { return n == 0 ? i : n <= reach ? -n : size - 1 + n - reach; };
  for (int n = 0; n <= 2 * r.reach[0]; ++n) {
    const int to_y = nth(n, y, p.height, r.reach[0]);
    if (padded_index(p.padding, to_y, p.height) != y) continue;
    for (int m = 0; m <= 2 * r.reach[1]; ++m) {
      const int to_x = nth(m, x, p.width, r.reach[1]);
      if ((n == 0 && m == 0) || padded_index(p.padding, to_x, p.width) != x) continue;
      for (int t = 0; t < p.logits.taps; ++t) {
        const int row = t / p.kernel_width, column = t - row * p.kernel_width;
        const int Y = to_y - (row - p.kernel_height / 2) * dilation, X = to_x - (column - p.kernel_width / 2) * dilation;
        if (Y < 0 || Y >= p.height || X < 0 || X >= p.width) continue;
        const int at = (Y - place.top) * r.pitch() + X - place.left;
        sums.x = fmaf(weights[t * plane + at], grad[at], sums.x);
        sums.y += grad[at];
      }
    }
  }
  return sums;
}

// K: the side of the kernel at a dilation of 1, or 0 for any. whole: rows are aligned, and of whole
// quads; padding repeats no pixels.
template <Type type, int K, bool whole>
__global__ void __launch_bounds__(max_threads, K == 3 ? 2 : 1) gradients(const Backward<type> p) {
  constexpr int T = K == 3 ? 9 : max_taps;
  constexpr bool is_constant = K > 0;
  const int kernel_height = K ? K : p.kernel_height, kernel_width = K ? K : p.kernel_width;
  const int taps = kernel_height * kernel_width;
  const Rectangles& r = p.rectangles;
  const Place<type> place(p);
  const int plane = r.rows() * r.pitch();
  float* weights = reinterpret_cast<float*>(shared_memory());  // [taps, rows, pitch]
  float* grad = weights + taps * plane;                        // [rows, pitch], like the next
  float* x = grad + plane;

  float v[T][pixels] = {};  // the weights, and then the sums of gradient times input
  if (place.outputs > 0) {
    const std::int64_t from = p.logits.place(place.image, place.group, place.y, place.x);
#pragma unroll
    for (int t = 0; t < T; ++t)
      if (t < taps) p.logits.template load<whole>(from, t, place.outputs, v[t]);
  }
  // Quads without output pixels have zero weights; in the others the gradient is zero.
  for (int i = threadIdx.x; i < taps * plane / pixels; i += blockDim.x) copy({0, 0, 0, 0}, weights + i * pixels);
  __syncthreads();

  float filtered[pixels] = {}, box[pixels] = {}, centre[pixels] = {};
  for (int c = 0, n = 0;;) {  // a channel, and a dilation
    fill<whole>(p, place, c, n, grad, x);
    if (c == 0 && n == 0) {
      float inverse[pixels] = {1, 1, 1, 1};
#pragma unroll
      for (int i = 0; i < pixels; ++i)
        if (p.softmax) inverse[i] = exponentials(v, i, taps);
#pragma unroll
      for (int t = 0; t < T; ++t)
        if (t < taps) {
#pragma unroll
          for (int i = 0; i < pixels; ++i) v[t][i] *= inverse[i];
          if (place.outputs > 0) copy(v[t], weights + t * plane + place.at);
#pragma unroll
          for (int i = 0; i < pixels; ++i) v[t][i] = 0;
        }
    }
    __syncthreads();  // the copies and the weights are complete
    const int dilation = is_constant ? 1 : p.dilations[n];
    if (p.grad_kernel.data && place.is_own) {
      float g[pixels], z[pixels];
      load_shifted<true>(grad + place.at, 0, g);
      int row = 0, column = 0;
#pragma unroll
      for (int t = 0; t < T; ++t) {
        if (t >= taps) break;
        if (is_constant) row = t / kernel_width, column = t % kernel_width;
        const int step = (row - kernel_height / 2) * dilation * r.pitch();
        load_shifted<is_constant>(x + place.at + step, (column - kernel_width / 2) * dilation, z);
#pragma unroll
        for (int i = 0; i < pixels; ++i) v[t][i] = fmaf(g[i], z[i], v[t][i]);
        if (++column == kernel_width) column = 0, ++row;
      }
    }
    if (p.grad_x.data && place.is_own) {
      float g[pixels], weight[pixels];
      int row = 0, column = 0;
#pragma unroll(is_constant ? T : 1)
      for (int t = 0; t < taps; ++t) {
        if (is_constant) row = t / kernel_width, column = t % kernel_width;
        // The pixels that read these with tap t.
        const int from = place.at - (row - kernel_height / 2) * dilation * r.pitch();
        const int o = -(column - kernel_width / 2) * dilation;
        load_shifted<is_constant>(grad + from, o, g);
        load_shifted<is_constant>(weights + t * plane + from, o, weight);
#pragma unroll
        for (int i = 0; i < pixels; ++i) {
          filtered[i] = fmaf(weight[i], g[i], filtered[i]);
          box[i] += g[i];
          if (t == taps / 2) centre[i] += g[i];
        }
        if (++column == kernel_width) column = 0, ++row;
      }
      if (!whole && (p.padding == Padding::replicate || p.padding == Padding::reflect)) {
        const bool border_y = place.y <= r.reach[0] || place.y >= p.height - 1 - r.reach[0];
#pragma unroll 1
        for (int i = 0; i < pixels; ++i) {
          const int X = place.x + i;
          if (X >= p.width || !(border_y || X <= r.reach[1] || X >= p.width - 1 - r.reach[1])) continue;
          const float2 sums = sum_folded(p, place, place.y, X, dilation, weights, grad);
#pragma unroll
          for (int k = 0; k < pixels; ++k) filtered[k] += k == i ? sums.x : 0, box[k] += k == i ? sums.y : 0;
        }
      }
      if (n == p.dilation_count - 1) {
        const int Y = place.y + p.origin[0], X = place.x + p.origin[1];
        float sums[pixels];
#pragma unroll
        for (int i = 0; i < pixels; ++i) {
          sums[i] = p.terms.sum(centre[i], box[i], filtered[i]);
          filtered[i] = box[i] = centre[i] = 0;
        }
        const std::int64_t to = (place.channel(p, c) * p.height + Y) * p.width;
        if (X >= 0) p.grad_x.template store<whole>(sums, to + X, min(pixels, p.width - X));
#pragma unroll
        for (int i = 0; i < pixels; ++i)  // the first column of the input is not that of a quad
          if (!whole && X < 0 && X + i >= 0 && X + i < p.width) Stored<type>::store(sums[i], p.grad_x.data + to + X + i);
      }
    }
    if (++n == p.dilation_count) n = 0, ++c;
    if (c == p.channels) break;
    __syncthreads();  // all threads have read the copies
  }
  if (!p.grad_kernel.data || !place.is_own || place.outputs == 0) return;

  float mean[pixels] = {}, weight[pixels];
#pragma unroll
  for (int t = 0; t < T; ++t) {
    if (t >= taps || !p.softmax) break;
    load_shifted<true>(weights + t * plane + place.at, 0, weight);
#pragma unroll
    for (int i = 0; i < pixels; ++i) mean[i] = fmaf(weight[i], v[t][i], mean[i]);
  }
  const std::int64_t size = std::int64_t(p.out_height) * p.out_width;
  std::int64_t to = (place.image * p.groups + place.group) * taps * size +
                    std::int64_t(place.y) * p.out_width + place.x;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    if (t >= taps) break;
    if (p.softmax) load_shifted<true>(weights + t * plane + place.at, 0, weight);
#pragma unroll
    for (int i = 0; i < pixels; ++i) {
      v[t][i] = p.terms.gamma != 0 ? p.terms.gamma * (v[t][i] - mean[i]) : 0;
      if (p.softmax) v[t][i] *= weight[i];
    }
    p.grad_kernel.template store<whole>(v[t], to, place.outputs);
    to += size;
  }
}

int divide_up(int n, int by) { return (n + by - 1) / by; }

// The rectangles that need the fewest threads, with their halos; 0 rows where none fits.
Rectangles cover(const int (&reach)[2], const int (&margin)[2], const int (&out)[2], int taps) {
  Rectangles r{}, best{};
  const std::size_t limit = (taps <= 9 ? 48 : 96) << 10;  // of shared memory: for two blocks of a multiprocessor, or one
  std::int64_t least = 0;
  for (int axis = 0; axis < 2; ++axis) {
    const int unit = axis == 0 ? 1 : pixels;
    r.reach[axis] = reach[axis], r.halo[axis] = divide_up(reach[axis], unit) * unit;
    r.first[axis] = -divide_up(margin[axis], unit) * unit, r.last[axis] = out[axis] + margin[axis];
  }
  const int height = r.last[0] - r.first[0], width = divide_up(r.last[1] - r.first[1], pixels) * pixels;
  for (r.size[1] = pixels; r.size[1] <= min(width, max_threads * pixels); r.size[1] += pixels) {
    const int quads = min(r.pitch(), width) / pixels;
    // As many rows as threads and shared memory allow, in equal parts.
    int rows = max_threads / quads;
    if (rows < height) rows -= 2 * r.halo[0];
    const int fit = int(limit / (std::size_t(taps + 2) * r.pitch() * sizeof(float))) - 2 * r.halo[0];
    rows = min(min(rows, fit), height);
    if (rows <= 0) continue;
    r.counts[0] = divide_up(height, rows), r.counts[1] = divide_up(width, r.size[1]);
    r.size[0] = divide_up(height, r.counts[0]);
    r.threads = divide_up(min(r.rows(), height) * quads, 32) * 32;
    const std::int64_t all = std::int64_t(r.counts[0]) * r.counts[1] * r.threads;
    if (least == 0 || all <= least) least = all, best = r;
  }
  return best;
}

template <Type type>
Status backward(const ElementwiseFilter& p, const float* log_window, const void* grad_out, void* grad_x,
                void* grad_kernel, void* stream) {
  int longest = 1;
  for (std::int64_t i = 0; i < p.dilation_count; ++i) longest = max(longest, int(p.dilations[i]));
  const int reach[2] = {int(p.kernel_height / 2) * longest, int(p.kernel_width / 2) * longest};
  const bool valid = p.padding == Padding::valid;
  const int margin[2] = {valid ? reach[0] : 0, valid ? reach[1] : 0};
  const Rectangles rectangles = cover(reach, margin, {int(p.out_height), int(p.out_width)}, int(p.taps()));
  if (rectangles.size[0] == 0) return Status::unsupported_type;
  Backward<type> b(p, log_window);
  b.grad = plane<type>(grad_out, p.out_width), b.grad_kernel = plane<type>(grad_kernel, p.out_width);
  b.grad_x = plane<type>(grad_x, p.width);
  b.x.vectors &= margin[1] % pixels == 0, b.grad_x.vectors &= margin[1] % pixels == 0;
  b.rectangles = rectangles;
  b.step = p.batch * p.channels * p.out_height * p.out_width;
  b.dilation_count = int(p.dilation_count);
  b.origin[0] = margin[0], b.origin[1] = margin[1];
  for (std::int64_t i = 0; i < p.dilation_count; ++i) b.dilations[i] = int(p.dilations[i]);
  const int side = longest == 1 && p.kernel_height == p.kernel_width ? int(p.kernel_width) : 0;
  const bool whole = b.x.vectors && b.grad.vectors && b.grad_x.vectors && b.grad_kernel.vectors &&
                     b.logits.values.vectors && (valid || p.padding == Padding::zeros);
  const auto run = side == 3 ? (whole ? gradients<type, 3, true> : gradients<type, 3, false>)
                   : side == 5 ? (whole ? gradients<type, 5, true> : gradients<type, 5, false>)
                               : gradients<type, 0, false>;
  const std::int64_t blocks = std::int64_t(rectangles.counts[0]) * rectangles.counts[1] * p.batch * p.groups;
  return launch(run, row_of(blocks), unsigned(rectangles.threads), rectangles.shared(int(p.taps())), stream, b);
}

}  // namespace
}  // namespace cuda

Status elementwise_filter_backward_cuda(Type type, const ElementwiseFilter& p, const float* log_window,
                                        const void* grad_out, void* grad_x, void* grad_kernel, void* stream) {
  const bool plain = p.stride == 1 && p.upscale == 1 && p.normalize != Normalize::all;
  if (!plain || p.taps() > cuda::max_taps || p.dilation_count > cuda::max_dilations) return Status::unsupported_type;
  const auto run = [&](auto backward) { return backward(p, log_window, grad_out, grad_x, grad_kernel, stream); };
  switch (type) {
    case Type::float32: return run(cuda::backward<Type::float32>);
    case Type::bfloat16: return run(cuda::backward<Type::bfloat16>);
    case Type::float16: return run(cuda::backward<Type::float16>);
    default: return Status::unsupported_type;
  }
}

}  // namespace inr
