// The pixels that a query reads, with their offsets and weights, in LIIF's own float32 arithmetic.
#pragma once

#include "../inr.h"

namespace inr {

struct Neighbours {
  std::int64_t pixel[4];  // flat index into [batch, band_rows, width]
  float rel[4][2];        // (y, x) offset from the pixel's centre, in half pixels of the feature map
  float weight[4];        // sums to 1
  float cell[2];
};

// Finds the neighbours of a query; returns false if one of their rows is outside the band.
bool locate(const LocalImplicit&, std::int64_t query, Neighbours&);

}  // namespace inr
