// The forward of elementwise_filter in float32, bfloat16 and float16; not with one softmax over all groups.
//
// A thread computes four adjacent pixels of an output row, in up to eight channels of a group. The nine weights of a
// 3 x 3 kernel are kept in registers after their softmax; other kernels are read tap by tap, with an online softmax.
#include "cuda/elementwise_filter.cuh"

namespace inr {
namespace cuda {
namespace {

constexpr int threads = 128;

template <Type type>
struct Filter : Problem<type> {
  using Problem<type>::Problem;
  Plane4<type> out;  // of one dilation
  int dilation, part, parts;  // channels of a thread; threads of a pixel of a group
  unsigned stride, upscale;
  int origin_y, origin_x;     // the input pixel on which output (0, 0) is centred
};

// What a thread computes.
template <Type type>
struct Quad {
  std::int64_t image, group;
  int Y, X, count;       // of the first pixel; how many of the four exist
  int first, last;       // channels of the group
  bool exists;

  __device__ __forceinline__ explicit Quad(const Filter<type>& p) {
    const unsigned quads = (p.out_width + pixels - 1) / pixels, rows = p.out_height;
    const unsigned blocks = (quads * rows + threads - 1) / threads;
    const unsigned quad = blockIdx.x % blocks * threads + threadIdx.x;
    unsigned unit = blockIdx.x / blocks;
    first = int(unit % p.parts) * p.part, last = min(first + p.part, p.channels);
    unit /= p.parts;
    group = unit % p.groups, image = unit / p.groups;
    Y = int(quad / quads), X = int(quad % quads) * pixels;
    count = min(pixels, p.out_width - X);
    exists = Y < p.out_height;
  }
  // The plane of a channel of the group: [height, width] of x, or [out_height, out_width].
  __device__ __forceinline__ std::int64_t plane(const Filter<type>& p, int channel) const {
    return (image * p.groups + group) * p.channels + channel;
  }
  __device__ __forceinline__ void load_logits(const Filter<type>& p, int tap, float (&v)[pixels]) const {
    p.logits.load(p.logits.place(image, group, Y, X), tap, count, v);
  }
  // Stores the sum of the terms, where `filtered` is still to be multiplied by `factor`.
  __device__ __forceinline__ void store(const Filter<type>& p, int channel, const float (&centre)[pixels],
                                        const float (&box)[pixels], const float (&filtered)[pixels],
                                        const float (&factor)[pixels]) const {
    float v[pixels];
#pragma unroll
    for (int i = 0; i < pixels; ++i) v[i] = p.terms.sum(centre[i], box[i], filtered[i] * factor[i]);
    p.out.store(v, (plane(p, channel) * p.out_height + Y) * p.out_width + X, count);
  }
};

// 3 x 3, without stride, upscaling and dilation: the weights in registers, and rows of six pixels for three taps.
template <Type type>
__global__ void __launch_bounds__(threads) filter_3x3(const Filter<type> p) {
  const Quad<type> quad(p);
  if (!quad.exists) return;
  float weights[9][pixels];
#pragma unroll
  for (int t = 0; t < 9; ++t) quad.load_logits(p, t, weights[t]);
  float inverse[pixels] = {1, 1, 1, 1};  // of the softmax's sums
#pragma unroll
  for (int i = 0; i < pixels; ++i)
    if (p.softmax) inverse[i] = exponentials(weights, i);
  const int y = quad.Y + p.origin_y, x = quad.X + p.origin_x;
  const int left = padded_index(p.padding, x - 1, p.width);
  int rows[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) rows[i] = padded_index(p.padding, y + i - 1, p.height);
  for (int c = quad.first; c < quad.last; ++c) {
    const std::int64_t plane = quad.plane(p, c) * p.height;
    float filtered[pixels] = {}, box[pixels] = {}, centre[pixels];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const std::int64_t row = (plane + rows[i]) * p.width;
      const bool exists = rows[i] >= 0;
      float inner[pixels], z[pixels + 2];
      p.x.load(row + x, 1, exists ? min(p.width - x, pixels) : 0, inner);
      z[0] = exists && left >= 0 ? Stored<type>::load(p.x.data + row + left) : 0;
#pragma unroll
      for (int j = 1; j < pixels + 2; ++j) {
        if (j <= pixels) z[j] = inner[j - 1];
        if (j <= pixels && x + j <= p.width) continue;
        const int at = x + j <= p.width + 1 ? padded_index(p.padding, x + j - 1, p.width) : -1;  // one beyond the map
        z[j] = exists && at >= 0 ? Stored<type>::load(p.x.data + row + at) : 0;
      }
#pragma unroll
      for (int k = 0; k < pixels; ++k) {
        if (i == 1) centre[k] = z[k + 1];
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          box[k] += z[k + j];
          filtered[k] = fmaf(weights[3 * i + j][k], z[k + j], filtered[k]);
        }
      }
    }
    quad.store(p, c, centre, box, filtered, inverse);
  }
}

// Any kernel and geometry.
template <Type type, int C>
__global__ void __launch_bounds__(threads) filter_taps(const Filter<type> p) {
  const Quad<type> quad(p);
  if (!quad.exists) return;
  float filtered[C][pixels] = {}, box[C][pixels] = {}, centre[C][pixels] = {};
  float largest[pixels], total[pixels] = {};
  int x[pixels];  // the centres
#pragma unroll
  for (int i = 0; i < pixels; ++i) {
    largest[i] = -INFINITY;
    x[i] = int(unsigned(quad.X + i) * p.stride / p.upscale) + p.origin_x;
  }
  const int y = int(unsigned(quad.Y) * p.stride / p.upscale) + p.origin_y;
  const int taps = p.kernel_height * p.kernel_width;
  for (int t = 0; t < taps; ++t) {
    float weights[pixels];
    quad.load_logits(p, t, weights);
    if (p.softmax) {
#pragma unroll
      for (int i = 0; i < pixels; ++i) {
        const float most = fmaxf(largest[i], weights[i]), shift = most == -INFINITY ? 0.f : most;
        const float rescale = exp_fast(largest[i] - shift);
        weights[i] = exp_fast(weights[i] - shift);
        total[i] = fmaf(total[i], rescale, weights[i]);
        largest[i] = most;
#pragma unroll
        for (int c = 0; c < C; ++c) filtered[c][i] *= rescale;
      }
    }
    const int row = t / p.kernel_width, column = t - row * p.kernel_width;
    const int from_y = padded_index(p.padding, y + (row - p.kernel_height / 2) * p.dilation, p.height);
#pragma unroll
    for (int i = 0; i < pixels; ++i) {
      const int to_x = x[i] + (column - p.kernel_width / 2) * p.dilation;
      const int from_x = i < quad.count ? padded_index(p.padding, to_x, p.width) : -1;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int channel = quad.first + c;
        const bool exists = channel < quad.last && from_y >= 0 && from_x >= 0;
        const std::int64_t at = (quad.plane(p, channel) * p.height + from_y) * p.width + from_x;
        const float z = exists ? Stored<type>::load(p.x.data + at) : 0;
        if (t == taps / 2) centre[c][i] = z;
        box[c][i] += z;
        filtered[c][i] = fmaf(weights[i], z, filtered[c][i]);
      }
    }
  }
  float inverse[pixels];
#pragma unroll
  for (int i = 0; i < pixels; ++i) inverse[i] = p.softmax ? 1 / total[i] : 1;
#pragma unroll
  for (int c = 0; c < C; ++c)
    if (quad.first + c < quad.last) quad.store(p, quad.first + c, centre[c], box[c], filtered[c], inverse);
}

template <Type type>
Status forward(const ElementwiseFilter& p, const float* log_window, void* out, void* stream) {
  using Value = typename Stored<type>::Value;
  const std::int64_t dilated = p.batch * p.channels * p.out_height * p.out_width;  // values of a dilation's output
  const bool valid = p.padding == Padding::valid, plain = p.stride == 1 && p.upscale == 1;
  for (std::int64_t i = 0; i < p.dilation_count; ++i) {
    const int dilation = int(p.dilations[i]);
    const int reach_y = int(p.kernel_height / 2) * dilation, reach_x = int(p.kernel_width / 2) * dilation;
    const bool is_3x3 = plain && p.kernel_height == 3 && p.kernel_width == 3 && dilation == 1;
    Value* to = static_cast<Value*>(out) + i * dilated;
    Filter<type> f(p, log_window);
    f.x.vectors &= !valid;
    f.out = plane<type>(to, p.out_width);
    f.dilation = dilation, f.part = is_3x3 ? 8 : f.channels > 1 ? 4 : 1, f.parts = (f.channels + f.part - 1) / f.part;
    f.stride = unsigned(p.stride), f.upscale = unsigned(p.upscale);
    f.origin_y = valid ? reach_y : 0, f.origin_x = valid ? reach_x : 0;
    const std::int64_t quads = (p.out_width + pixels - 1) / pixels * p.out_height;
    const std::int64_t blocks = (quads + threads - 1) / threads * p.batch * p.groups * f.parts;
    const auto run = is_3x3 ? filter_3x3<type> : f.part == 1 ? filter_taps<type, 1> : filter_taps<type, 4>;
    const Status launched = launch(run, row_of(blocks), threads, 0, stream, f);
    if (launched != Status::ok) return launched;
  }
  return Status::ok;
}

}  // namespace
}  // namespace cuda

Status elementwise_filter_forward_cuda(Type type, const ElementwiseFilter& p, const float* log_window, void* out,
                                       void* stream) {
  if (p.normalize == Normalize::all) return Status::unsupported_type;
  switch (type) {
    case Type::float32: return cuda::forward<Type::float32>(p, log_window, out, stream);
    case Type::bfloat16: return cuda::forward<Type::bfloat16>(p, log_window, out, stream);
    case Type::float16: return cuda::forward<Type::float16>(p, log_window, out, stream);
    default: return Status::unsupported_type;
  }
}

}  // namespace inr
