// Shared by the tensor-core kernels of local_implicit: the problem on the device, and the pixels that a row reads.
//
// A row is one evaluation of the MLP: a query and a neighbour (row T q + t, T = 4 or 1) or, with the ensemble First,
// a query alone. The hidden state is padded to W channels. In a fragment, lane 4 g + t of a warp holds the channels
// 8 t ... 8 t + 7 of every 32, of rows g and g + 8. The order of a product's inner dimension is arbitrary; this one
// allows 16-byte loads of the left fragments, and column 2 t + e of result tile n is channel `channel(n, 2 t + e)`.
//
// csrc/cuda is compiled with --fmad=false, so that coordinates are rounded exactly like LIIF's. Fused multiply-adds are
// written explicitly.
#pragma once

#include "cuda/ptx.cuh"

namespace inr {
namespace cuda {

// One axis of the feature map; the floats are computed in double precision and rounded once.
struct MapAxis {
  int size;
  float low, high;     // shifts of a coordinate towards the lower and the upper neighbour
  float centre, step;  // of the first pixel, and between pixels
};

// The queries, in the order of [batch, rows, cols], and the band of the feature map that they read.
struct Queries {
  Plane y, x, cell_y, cell_x;  // cell_y.data == nullptr: no cell
  MapAxis vertical, horizontal;
  std::int64_t count;
  unsigned rows, cols;
  int band_start, band_rows;
  bool ensemble;
};

struct Decoder {
  Queries queries;
  const std::uint16_t* hoisted;  // [batch, band_rows, width, channels]
  const uint4* stages;           // [number of stages, stage]: the weights as packed by `pack`
  const float* position;         // [4, W]: columns of the position weight, zero for a missing cell
  const float* bias;             // [hidden + 1, padded]
  const float* late_cell;        // [2, padded]: the cell's columns of the layer after the ensemble, or nullptr
  std::uint16_t* out;            // [queries, outputs]
  int channels, outputs, padded;
  int hidden;                    // number of Linear layers between the first and the last
  bool aligned;                  // every pixel of `hoisted` is aligned to 16 bytes
};

__device__ __forceinline__ int channel(int tile, int column) {
  return tile / 4 * 32 + column / 2 * 8 + tile % 4 * 2 + column % 2;
}

// What a row reads from the feature map: samples of all neighbours of the query, or of the row's own neighbour.
template <bool First>
struct Row {
  static constexpr int sides = First ? 2 : 1, samples = sides * sides;
  unsigned pixel[samples];
  float weight[samples], rel_y[sides], rel_x[sides];  // of sample s: rel_y[s / sides], rel_x[s % sides]
  float cell_y, cell_x;

  __device__ __forceinline__ Row of_lane(int lane) const {
    Row other;
    for (int s = 0; s < samples; ++s) {
      other.pixel[s] = __shfl_sync(~0u, pixel[s], lane);
      other.weight[s] = __shfl_sync(~0u, weight[s], lane);
    }
    for (int side = 0; side < sides; ++side) {
      other.rel_y[side] = __shfl_sync(~0u, rel_y[side], lane);
      other.rel_x[side] = __shfl_sync(~0u, rel_x[side], lane);
    }
    other.cell_y = __shfl_sync(~0u, cell_y, lane);
    other.cell_x = __shfl_sync(~0u, cell_x, lane);
    return other;
  }
};

struct NearestPixel {
  int index;
  float rel;
};

// The pixel nearest to coord + shift (ties to even, NaN to 0), and the offset from its centre in half pixels.
__device__ __forceinline__ NearestPixel nearest(float coord, float shift, const MapAxis& axis) {
  constexpr float low = float(-1 + 1e-6), high = float(1 - 1e-6);
  const float size = float(axis.size);
  float moved = coord + shift;
  if (moved < low) moved = low;
  if (moved > high) moved = high;
  const float u = rintf(((moved + 1) * size - 1) * 0.5f);
  const int index = u >= 0 ? (u < size ? int(u) : axis.size - 1) : 0;
  return {index, (coord - (axis.centre + axis.step * float(index))) * size};
}

__device__ __forceinline__ float area(const NearestPixel& y, const NearestPixel& x) {
  return fabsf(y.rel * x.rel) + 1e-9f;
}

// Locates row i of the rows that begin with query `first`. Indices of queries and of rows of the feature map are
// clamped to the last query and to the band, which keeps all reads in bounds.
template <bool First>
__device__ __forceinline__ Row<First> locate(const Queries& q, std::int64_t first, int i) {
  const bool four_rows = !First && q.ensemble;  // per query
  first = first < q.count ? first : q.count - 1;
  const std::int64_t left = q.count - 1 - first;
  unsigned col = unsigned(first % q.cols) + unsigned(min(left, std::int64_t(four_rows ? i / 4 : i)));
  const std::int64_t line = first / q.cols + col / q.cols;
  const std::int64_t batch = line / q.rows, row = line % q.rows;
  col %= q.cols;
  const auto at = [&](const Plane& p) { return p.data[batch * p.batch + row * p.row + col * p.col]; };
  const float y = at(q.y), x = at(q.x);
  const NearestPixel top = nearest(y, q.vertical.low, q.vertical), left_ = nearest(x, q.horizontal.low, q.horizontal);
  const NearestPixel bottom = q.ensemble ? nearest(y, q.vertical.high, q.vertical) : top;
  const NearestPixel right = q.ensemble ? nearest(x, q.horizontal.high, q.horizontal) : left_;
  float total = area(top, left_);
  if (q.ensemble) total = total + area(top, right) + area(bottom, left_) + area(bottom, right);
  Row<First> out;
#pragma unroll
  for (int s = 0; s < Row<First>::samples; ++s) {
    const int t = First ? s : four_rows ? i % 4 : 0;
    const NearestPixel v = t & 2 ? bottom : top, h = t & 1 ? right : left_;
    const int line_in_band = min(max(v.index - q.band_start, 0), q.band_rows - 1);
    out.pixel[s] = (unsigned(batch) * q.band_rows + line_in_band) * q.horizontal.size + h.index;
    out.rel_y[s / Row<First>::sides] = v.rel;
    out.rel_x[s % Row<First>::sides] = h.rel;
    out.weight[s] = area(t & 2 ? top : bottom, t & 1 ? left_ : right) / total;  // the area of the opposite corner
  }
  out.cell_y = q.cell_y.data ? at(q.cell_y) * float(q.vertical.size) : 0.f;
  out.cell_x = q.cell_x.data ? at(q.cell_x) * float(q.horizontal.size) : 0.f;
  return out;
}

}  // namespace cuda
}  // namespace inr
