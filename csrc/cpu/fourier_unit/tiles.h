// How the convolutions divide their work into tasks, pad their inputs and store their outputs.
#pragma once

#include "../../inr.h"
#include "../common/row_panels.h"
#include "../common/transpose.h"

namespace inr {
namespace INR_ISA {

// Neighbouring tiles of one row of tiles.
struct Segment {
  std::int64_t row, column, count;
  std::int64_t index;  // of the first, in the task
};
// Calls work with the segments of the task of at most `count` tiles from the tile `first` on.
template <class F>
INR_INLINE void for_each_segment(std::int64_t first, std::int64_t count, std::int64_t tile_rows,
                                 std::int64_t tile_columns, F&& work) {
  const std::int64_t end = smaller(first + count, tile_rows * tile_columns);
  for (std::int64_t t = first; t < end;) {
    const std::int64_t column = t % tile_columns, tiles = smaller(tile_columns - column, end - t);
    work(Segment{t / tile_columns, column, tiles, t - first});
    t += tiles;
  }
}

// How many of the blocks of outputs a task computes: not all where there are fewer than two tasks for a thread.
INR_INLINE std::int64_t blocks_of_group(std::int64_t tasks, std::int64_t blocks, std::int64_t threads) {
  return divide_up(blocks, tasks < 2 * threads ? smaller(blocks, divide_up(2 * threads, tasks)) : 1);
}

// A stride of at least n, for which several points fall into different cache sets.
template <class T>
INR_INLINE std::int64_t point_stride(std::int64_t n) {
  constexpr std::int64_t step = 64 * lanes<T>;
  return (n + step - 1) / step * step + lanes<T>;
}

// The index in [0, n) of the value that the padding, one pixel wide, puts at index v; -1 for zero. Values past n are not
// used.
INR_INLINE std::int64_t source_index(Padding padding, std::int64_t v, std::int64_t n) {
  if (v >= 0 && v < n) return v;
  if (padding == Padding::zeros || v > n) return -1;
  return v < 0 ? -v : 2 * (n - 1) - v;
}

// Stores, or adds to what is stored, the sums of a block of outputs. sums: [rows][V]; to: [rows][V lanes] with row
// stride `row`
template <class T, class Sums>
INR_INLINE void add_sums(const Sums& sums, bool add, T* to, std::int64_t row) {
#pragma GCC unroll 12
  for (int r = 0; r < int(sizeof sums / sizeof *sums); ++r)
#pragma GCC unroll 2
    for (int v = 0; v < int(sizeof *sums / sizeof **sums); ++v) {
      T* at = to + r * row + v * lanes<T>;
      store(at, add ? load(at) + sums[r][v] : sums[r][v]);
    }
}

// Scales the first min(n, lanes) sums of output o, adds bias and `add`, applies the ReLU and stores them from out[at].
// streams: see store_up_to
template <class T>
INR_INLINE void finish(const Conv2d& p, Vec<T> sum, std::int64_t o, std::int64_t at, std::int64_t n, bool streams,
                       T* out) {
  if (n <= 0) return;
  if (p.scale) sum *= static_cast<const T*>(p.scale)[o];
  if (p.bias) sum += static_cast<const T*>(p.bias)[o];
  if (p.add) sum += load_up_to(static_cast<const T*>(p.add) + at, n);
  store_up_to<T>(p.relu ? relu(sum) : sum, n, out + at, streams);
}

}  // namespace INR_ISA
}  // namespace inr
