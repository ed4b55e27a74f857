// The inputs of a 3 x 3 convolution in Winograd's form: tiles of M x 2 outputs, at 4 (M + 2) points each.
#pragma once

#include "../../inr.h"
#include "tiles.h"
#include "winograd.h"

namespace inr {
namespace INR_ISA {

// Copies n elements, in vectors of which the last may overlap the one before: faster than a call of memcpy.
template <class T>
INR_INLINE void copy(T* to, const T* from, std::int64_t n) {
  if (n < lanes<T>) return void(std::memcpy(to, from, std::size_t(n) * sizeof(T)));
  for (std::int64_t i = 0; i < n - lanes<T>; i += lanes<T>) store(to + i, load(from + i));
  store(to + n - lanes<T>, load(from + n - lanes<T>));
}

// M: rows of outputs of a tile, 2 or 4; max_tiles: the most tiles of a segment
template <class T, int M, std::int64_t max_tiles>
class TileInputs {
 public:
  static constexpr int tall = M + 2, points = 4 * tall;  // rows of inputs, and points, of a tile

  explicit TileInputs(const Conv3x3& p) : p_(p) {}
  static constexpr std::int64_t line = 2 * (max_tiles + lanes<T>) + 2;  // the last vector may exceed the tiles
  static constexpr std::int64_t stage_size() { return tall * line; }

  // Transforms a segment's tiles of one channel. stage: [stage_size()], a work buffer; to: [points][s.count]
  // with the stride `step`, and a vector more
  void transform(std::int64_t image, std::int64_t channel, const Segment& s, T* stage, std::int64_t step, T* to) const {
    const int part = channel >= p_.channels[0];
    const std::int64_t plane = image * p_.batch_stride[part] +
                               (part ? channel - p_.channels[0] : channel) * p_.height * p_.width;
    const std::int64_t y = M * s.row, x = 2 * s.column;
    load_rows(static_cast<const T*>(p_.x[part]) + plane, y, x, s.count, stage);
    for (std::int64_t t = 0; t < s.count; t += lanes<T>)
      transform_tiles(y, x + 2 * t, stage + 2 * t, step, to + t);
  }

 private:
  // Loads the padded plane from row y - 1 and column x - 1 on, for `tiles` tiles. plane: [height, width];
  // stage: [tall][line]
  void load_rows(const T* plane, std::int64_t y, std::int64_t x, std::int64_t tiles, T* stage) const {
    const std::int64_t columns = 2 * tiles + 2, left = x == 0, inside = smaller(p_.width - x + 1, columns);
    for (std::int64_t i = 0; i < tall; ++i, stage += line) {
      const std::int64_t row = source_index(p_.padding, y + i - 1, p_.height);
      if (row < 0) {
        std::memset(static_cast<void*>(stage), 0, std::size_t(columns) * sizeof(T));
        continue;
      }
      const T* from = plane + row * p_.width;
      // The next channel's row, which the processor does not foresee.
      for (std::int64_t j = left; j < inside; j += 64 / std::int64_t(sizeof(T)))
        __builtin_prefetch(from + p_.height * p_.width + x - 1 + j);
      copy(stage + left, from + x - 1 + left, inside - left);
      const auto pad = [&](std::int64_t j) {
        const std::int64_t col = source_index(p_.padding, x + j - 1, p_.width);
        stage[j] = col < 0 ? T(0) : from[col];
      };
      if (left) pad(0);
      for (std::int64_t j = inside; j < columns; ++j) pad(j);
    }
  }

  // Transforms the inputs of a vector of tiles, the first of which starts at row y and column x.
  // stage: [tall][line]; to: [points][lanes] with the stride `step`
  void transform_tiles(std::int64_t y, std::int64_t x, const T* stage, std::int64_t step, T* to) const {
    Vec<T> d[4][tall];  // by columns
#pragma GCC unroll 6
    for (int i = 0; i < tall; ++i) {
      load_pairs(stage + i * line, d[0][i], d[1][i]);
      load_pairs(stage + i * line + 2, d[2][i], d[3][i]);
    }
    if constexpr (M == 2)
      if (p_.transposed) add_reflected(y, x, d);
#pragma GCC unroll 6
    for (int i = 0; i < tall; ++i) {
      Vec<T> row[4] = {d[0][i], d[1][i], d[2][i], d[3][i]};
      transform_inputs(row);
      for (int j = 0; j < 4; ++j) d[j][i] = row[j];
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      transform_inputs(d[j]);
#pragma GCC unroll 6
      for (int i = 0; i < tall; ++i) store(to + (4 * i + j) * step, d[j][i]);
    }
  }

  // Adds to the inputs of tiles at the border what the transpose of a reflect padding multiplies by the same weights.
  // Its second row of outputs has the products of the first row of inputs with the kernel's last row, too. In a tile,
  // no other output uses the input that has these weights. So in the columns, and at the other two sides.
  void add_reflected(std::int64_t y, std::int64_t x, Vec<T> (&d)[4][tall]) const {
    static_assert(M == 2);
    for (int j = 0; j < 4; ++j) {
      if (y == 0) d[j][3] += d[j][1];
      if (y + 2 == p_.height) d[j][0] += d[j][2];
    }
    const std::int64_t last = (p_.width - x) / 2 - 1;
    for (int i = 0; i < 4; ++i) {
      if (x == 0) d[3][i][0] += d[1][i][0];
      if (last >= 0 && last < lanes<T>) d[0][i][last] += d[2][i][last];
    }
  }

  const Conv3x3& p_;
};

}  // namespace INR_ISA
}  // namespace inr
