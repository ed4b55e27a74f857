// Transposes square tiles in registers; loads and stores partial vectors.
#pragma once

#include <utility>

#include "buffer.h"

namespace inr {
namespace INR_ISA {

// One of the two rows of a transposition step, which swaps blocks of Half lanes.
template <int Half, int High, class V, std::size_t... L>
INR_INLINE V exchange(V a, V b, std::index_sequence<L...>) {
  constexpr int n = sizeof...(L);
  return __builtin_shufflevector(a, b,
                                 (int(L) & Half ? n + int(L) - (High ? 0 : Half) : int(L) + (High ? Half : 0))...);
}
// Transposes a square tile. tile: [lanes]
template <class T, int Half = lanes<T> / 2>
INR_INLINE void transpose(Vec<T>* tile) {
  constexpr auto all = std::make_index_sequence<std::size_t(lanes<T>)>{};
#pragma GCC unroll 16
  for (int i = 0; i < lanes<T>; ++i) {
    if (i & Half) continue;
    const Vec<T> low = exchange<Half, 0>(tile[i], tile[i + Half], all);
    tile[i + Half] = exchange<Half, 1>(tile[i], tile[i + Half], all);
    tile[i] = low;
  }
  if constexpr (Half > 1) transpose<T, Half / 2>(tile);
}

// The first min(n, lanes) elements; load_up_to sets the other lanes to zero. from, to: [n]
template <class T>
INR_INLINE Vec<T> load_up_to(const T* from, std::int64_t n) {
  return n >= lanes<T> ? load(from) : load_part(from, n);
}
template <class T>
INR_INLINE void store_up_to(Vec<T> v, std::int64_t n, T* to) {
  n >= lanes<T> ? store(to, v) : store_part(to, v, n);
}

// The same; streams: whether to bypass the caches, for outputs that are too large to stay there until they are read.
// Call stream_fence at the end of a task.
template <class T>
INR_INLINE void store_up_to(Vec<T> v, std::int64_t n, T* to, bool streams) {
  if (streams && n >= lanes<T> && reinterpret_cast<std::uintptr_t>(to) % vector_bytes == 0) return stream_store(to, v);
  store_up_to<T>(v, n, to);
}
// Whether an output of that many bytes should bypass the caches.
INR_INLINE bool is_streamed(std::size_t bytes) { return bytes > std::size_t(32) << 20; }

// Transposes the first min(rows, lanes) rows of min(n, lanes) elements, each times its lane of `scale`, to rows of
// min(width, lanes) elements; those beyond `rows` are zero. from: [rows], rows from_step apart; to: [n], to_step apart
template <class T, class From, class To>
INR_INLINE void transpose_tile(const From* from, std::int64_t from_step, std::int64_t rows, std::int64_t n,
                               Vec<T> scale, To* to, std::int64_t to_step, std::int64_t width) {
  constexpr int most = lanes<T>;
  Vec<T> tile[most]{};
  if (rows >= most && n >= most && width >= most) {
#pragma GCC unroll 16
    for (int k = 0; k < most; ++k) tile[k] = load(from + k * from_step) * scale;
    transpose<T>(tile);
#pragma GCC unroll 16
    for (int k = 0; k < most; ++k) store(to + k * to_step, tile[k]);
    return;
  }
  Vec<T> part[most]{};  // not `tile`: indexed by variables, it is not in registers
  for (std::int64_t k = 0; k < clamp(rows, 0, most); ++k) part[k] = load_up_to(from + k * from_step, n) * scale;
  transpose<T>(part);
  for (std::int64_t k = 0; k < clamp(n, 0, most); ++k) store_up_to(part[k], width, to + k * to_step);
}

}  // namespace INR_ISA
}  // namespace inr
