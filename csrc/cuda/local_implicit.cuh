// What the tensor-core kernels of local_implicit share: the problem on the device, and where a row lies on the map.
//
// A row is one evaluation of the MLP: a query and a neighbour (row T q + t, T = 4 or 1) or, with the ensemble First,
// a query alone. The hidden state is padded to W channels. In a fragment, lane 4 g + t of a warp holds of every 32
// channels the eight 8 t ... 8 t + 7 of rows g and g + 8: as the order of a product's inner dimension is free, its
// left fragments are filled by 16-byte loads, and column 2 t + e of result tile n is channel `channel(n, 2 t + e)`.
//
// csrc/cuda is compiled without contraction: the arithmetic of the coordinates is LIIF's, rounding by rounding.
// Where a fused multiply-add is wanted, it is written.
#pragma once

#include "cuda/ptx.cuh"

namespace inr {
namespace cuda {

// One axis of the map; the floats are computed in double precision and rounded once.
struct MapAxis {
  int size;
  float low, high;     // what moves a coordinate towards the lower and the upper neighbour
  float centre, step;  // of the first pixel, and between pixels
};

// The queries in the order of [batch, rows, cols], and the band of the map that they read.
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
  const uint4* stages;           // the weights as `pack` orders them
  const float* position;         // [4, W]: columns of the position weight, zeros where there are none
  const float* bias;             // [hidden + 1, padded]
  const float* late_cell;        // [2, padded]: the cell's columns of the Linear after the first; or nullptr
  std::uint16_t* out;            // [queries, outputs]
  int channels, outputs, padded;
  int hidden;                    // Linears between the first and the last
  bool whole;                    // the map's rows are whole 16 bytes, and aligned
};

__device__ __forceinline__ int channel(int tile, int column) {
  return tile / 4 * 32 + column / 2 * 8 + tile % 4 * 2 + column % 2;
}

// Where a row reads the map: its samples are the query's neighbours, or the one neighbour that the row is for.
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

struct Place {
  int index;
  float rel;
};

// The pixel nearest to coord + shift (ties to even, NaN to 0), and the distance to it in half pixels.
__device__ __forceinline__ Place nearest(float coord, float shift, const MapAxis& axis) {
  constexpr float low = float(-1 + 1e-6), high = float(1 - 1e-6);
  const float size = float(axis.size);
  float moved = coord + shift;
  if (moved < low) moved = low;
  if (moved > high) moved = high;
  const float u = rintf(((moved + 1) * size - 1) * 0.5f);
  const int index = u >= 0 ? (u < size ? int(u) : axis.size - 1) : 0;
  return {index, (coord - (axis.centre + axis.step * float(index))) * size};
}

__device__ __forceinline__ float area(const Place& y, const Place& x) { return fabsf(y.rel * x.rel) + 1e-9f; }

// Row i of those that begin with query `first`. Queries past the last are the last; a row of the map outside the
// band is moved into it, so that no read leaves the map.
template <bool First>
__device__ __forceinline__ Row<First> locate(const Queries& q, std::int64_t first, int i) {
  const bool spread = !First && q.ensemble;  // a query over four rows
  first = first < q.count ? first : q.count - 1;
  const std::int64_t left = q.count - 1 - first;
  unsigned col = unsigned(first % q.cols) + unsigned(min(left, std::int64_t(spread ? i / 4 : i)));
  const std::int64_t line = first / q.cols + col / q.cols;
  const std::int64_t batch = line / q.rows, row = line % q.rows;
  col %= q.cols;
  const auto at = [&](const Plane& p) { return p.data[batch * p.batch + row * p.row + col * p.col]; };
  const float y = at(q.y), x = at(q.x);
  const Place top = nearest(y, q.vertical.low, q.vertical), left_ = nearest(x, q.horizontal.low, q.horizontal);
  const Place bottom = q.ensemble ? nearest(y, q.vertical.high, q.vertical) : top;
  const Place right = q.ensemble ? nearest(x, q.horizontal.high, q.horizontal) : left_;
  float total = area(top, left_);
  if (q.ensemble) total = total + area(top, right) + area(bottom, left_) + area(bottom, right);
  Row<First> out;
#pragma unroll
  for (int s = 0; s < Row<First>::samples; ++s) {
    const int t = First ? s : spread ? i % 4 : 0;
    const Place v = t & 2 ? bottom : top, h = t & 1 ? right : left_;
    const int line_in_band = min(max(v.index - q.band_start, 0), q.band_rows - 1);
    out.pixel[s] = (unsigned(batch) * q.band_rows + line_in_band) * q.horizontal.size + h.index;
    out.rel_y[s / Row<First>::sides] = v.rel;
    out.rel_x[s % Row<First>::sides] = h.rel;
    out.weight[s] = area(t & 2 ? top : bottom, t & 1 ? left_ : right) / total;  // the opposite corner's
  }
  out.cell_y = q.cell_y.data ? at(q.cell_y) * float(q.vertical.size) : 0.f;
  out.cell_x = q.cell_x.data ? at(q.cell_x) * float(q.horizontal.size) : 0.f;
  return out;
}

}  // namespace cuda
}  // namespace inr
