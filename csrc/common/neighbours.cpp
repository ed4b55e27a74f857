// Compiled with -ffp-contract=off: at odd scales a single fused multiply-add changes LIIF's neighbours and weights.
#include "neighbours.h"

#include <cmath>

namespace inr {
namespace {

struct NearestPixel {
  std::int64_t index;
  float rel;
};

// Finds the nearest of n pixels to coord + shift, and the distance from coord to its centre. centre: [n]
NearestPixel nearest(float coord, float shift, const float* centre, std::int64_t n) {
  constexpr float low = float(-1 + 1e-6), high = float(1 - 1e-6);
  float moved = coord + shift;
  if (moved < low) moved = low;
  if (moved > high) moved = high;
  const float u = std::nearbyint(((moved + 1) * float(n) - 1) / 2);  // rounds half to even, like grid_sample
  const std::int64_t index = u >= 0 ? (u < float(n) ? std::int64_t(u) : n - 1) : 0;  // NaN: 0
  return {index, (coord - centre[index]) * float(n)};
}

float at(const Plane& p, std::int64_t b, std::int64_t r, std::int64_t c) {
  return p.data[b * p.batch + r * p.row + c * p.col];
}

}  // namespace

bool locate(const LocalImplicit& p, std::int64_t query, Neighbours& out) {
  const std::int64_t b = query / (p.rows * p.cols), r = query / p.cols % p.rows, c = query % p.cols;
  const float y = at(p.y, b, r, c), x = at(p.x, b, r, c);
  const int sides = p.local_ensemble ? 2 : 1;
  NearestPixel pixel[2][2];
  for (int side = 0; side < sides; ++side) {
    const double sign = p.local_ensemble ? 2 * side - 1 : 0, eps = p.local_ensemble ? 1e-6 : 0;
    pixel[0][side] = nearest(y, float(sign * (2.0 / double(p.height) / 2) + eps), p.centre_y, p.height);
    pixel[1][side] = nearest(x, float(sign * (2.0 / double(p.width) / 2) + eps), p.centre_x, p.width);
  }
  float area[4], total = 0;
  bool inside = true;
  for (int t = 0; t < sides * sides; ++t) {
    const NearestPixel &py = pixel[0][t / sides], &px = pixel[1][t % sides];
    const std::int64_t row = py.index - p.band_start;
    inside = inside && row >= 0 && row < p.band_rows;
    out.pixel[t] = (b * p.band_rows + row) * p.width + px.index;
    out.rel[t][0] = py.rel;
    out.rel[t][1] = px.rel;
    area[t] = std::fabs(py.rel * px.rel) + 1e-9f;
    total += area[t];
  }
  const int last = sides * sides - 1;
  for (int t = 0; t <= last; ++t) out.weight[t] = area[last - t] / total;  // the area of the opposite corner
  if (p.cell_y.data) {
    out.cell[0] = at(p.cell_y, b, r, c) * float(p.height);
    out.cell[1] = at(p.cell_x, b, r, c) * float(p.width);
  }
  return inside;
}

}  // namespace inr
