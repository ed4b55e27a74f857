// NATTEN's window rule, and which lanes of a vector of columns have a neighbour at which offset.
#pragma once

#include "../../inr.h"
#include "../common/buffer.h"

namespace inr {
namespace INR_ISA {
namespace {

template <class T>
using Mask = decltype(Vec<T>{} < Vec<T>{});

// Positions [begin, end) within a residue class.
struct Window {
  std::int64_t begin, end;
};

// NATTEN's rule: the keys of the query at position i of its residue class, which has n positions.
inline Window window(const Axis& a, std::int64_t i, std::int64_t n) {
  const std::int64_t group = i / a.stride * a.stride;
  if (a.causal) {
    const std::int64_t leader = clamp(group + a.stride - 1, 0, n - 1);
    return {clamp(leader - a.kernel + 1, 0, n), i + 1};
  }
  const std::int64_t leader = clamp(group + a.stride / 2, 0, n - 1);
  const std::int64_t begin = clamp(leader - a.kernel / 2, 0, n - a.kernel);
  return {begin, begin + a.kernel};
}

// The inverse: the queries whose window contains the key at position i. It is an interval, because each window contains
// its query and both ends of the window increase with the query.
inline Window queries_of_key(const Axis& a, std::int64_t i, std::int64_t n) {
  Window w{i, i + 1};
  while (w.begin > 0 && window(a, w.begin - 1, n).end > i) --w.begin;
  while (w.end < n && window(a, w.end, n).begin <= i) ++w.end;
  return w;
}

// Positions of a residue class.
INR_INLINE std::int64_t class_size(const Axis& a, std::int64_t residue) {
  return (a.length - residue + a.dilation - 1) / a.dilation;
}

// The offsets at which any lane of a vector has a neighbour, and for each the lanes that have one.
template <class T>
struct Neighbours {
  std::int64_t first = 0, count = 0;
  const Mask<T>* masks = nullptr;  // [count]
  bool uniform = false;            // whether all lanes have one at each of the offsets
};

// The neighbours of every vector of columns: the keys of queries, or for_keys the queries of keys.
template <class T>
class ColumnNeighbours {
 public:
  ColumnNeighbours(const Axis& a, bool for_keys) : axis_(a), reach_(a.kernel - 1) {
    const std::int64_t vectors = round_up(a.length, lanes<T>) / lanes<T>;
    neighbours_.resize(vectors);
    masks_.resize(vectors * (2 * reach_ + 1));
    if (!*this) return;
    for (std::int64_t v = 0; v < vectors; ++v) find(v, for_keys);
  }
  explicit operator bool() const { return neighbours_ && masks_; }
  const Neighbours<T>& operator[](std::int64_t v) const { return neighbours_[v]; }

  // The vectors of the columns of the neighbours of vectors [v.begin, v.end); for_keys: as in the constructor.
  Window reached(Window v, bool for_keys) const {
    std::int64_t begin = v.begin * lanes<T>, end = v.end * lanes<T>;
    for (std::int64_t i = v.begin; i < v.end; ++i) {
      const std::int64_t low = neighbours_[i].first, high = low + neighbours_[i].count - 1;
      const std::int64_t first = i * lanes<T> + (for_keys ? -high : low) * axis_.dilation;
      const std::int64_t last = (i + 1) * lanes<T> + (for_keys ? -low : high) * axis_.dilation;
      begin = first < begin ? first : begin;
      end = last > end ? last : end;
    }
    return {clamp(begin, 0, axis_.length) / lanes<T>, round_up(clamp(end, 0, axis_.length), lanes<T>) / lanes<T>};
  }

 private:
  void find(std::int64_t v, bool for_keys) {
    Mask<T>* masks = masks_ + v * (2 * reach_ + 1);
    std::int64_t first = reach_ + 1, last = -reach_;
    for (std::int64_t lane = 0; lane < lanes<T> && v * lanes<T> + lane < axis_.length; ++lane) {
      const std::int64_t x = v * lanes<T> + lane, i = x / axis_.dilation, n = class_size(axis_, x % axis_.dilation);
      const Window w = for_keys ? queries_of_key(axis_, i, n) : window(axis_, i, n);
      const std::int64_t low = for_keys ? i - w.end + 1 : w.begin - i, high = low + w.end - w.begin;
      for (std::int64_t offset = low; offset < high; ++offset) masks[offset + reach_][lane] = -1;
      first = low < first ? low : first;
      last = high > last ? high : last;
    }
    neighbours_[v].first = first;
    neighbours_[v].count = last - first;
    neighbours_[v].masks = masks + first + reach_;
    neighbours_[v].uniform = true;  // Buffer does not run constructors
    for (std::int64_t offset = first; offset < last; ++offset)
      for (int lane = 0; lane < lanes<T>; ++lane) neighbours_[v].uniform &= masks[offset + reach_][lane] != 0;
  }

  const Axis& axis_;
  std::int64_t reach_;
  Buffer<Neighbours<T>> neighbours_;  // [vectors]
  Buffer<Mask<T>> masks_;         // [vectors][2 kernel - 1]
};

}  // namespace
}  // namespace INR_ISA
}  // namespace inr
