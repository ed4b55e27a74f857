// Which pixels a query reads, and with what offsets and weights: LIIF's own float32 arithmetic.
#pragma once

#include "../inr.h"

namespace inr {

struct Neighbours {
  std::int64_t pixel[4];  // flat index into [batch, band_rows, width]
  float rel[4][2];        // (y, x), in half pixels of the feature map
  float weight[4];        // sums to 1
  float cell[2];
};

// False when a neighbour's row lies outside the band.
bool locate(const LocalImplicit&, std::int64_t query, Neighbours&);

}  // namespace inr
