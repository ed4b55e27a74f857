// Matrix products on the tile unit of x86 (AMX), which adds 16 x 16 sums of 32 products of bfloat16 in 16 cycles.
//
// float32 numbers are split into three bfloat16 numbers. Six of the nine products of these parts are added; the other
// three are below float32's accuracy. With the splitting this takes two thirds of the time of multiply-adds. The tile
// unit adds in float32.
#pragma once

#include "buffer.h"

#if defined(__AMX_BF16__)

namespace inr {
namespace INR_ISA {

constexpr std::int64_t tile_side = 16;  // rows of a tile, and its columns of 4 bytes: sums or pairs of bfloat16

// The sizes of the tile registers, as the processor reads them.
struct alignas(64) TileSizes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
  void set(int tile, std::int64_t count) {
    row_bytes[tile] = count ? 64 : 0;
    rows[tile] = std::uint8_t(count);
  }
};

// Not the compilers' intrinsics: those of GCC 12 do not say that they read memory.
INR_INLINE void use_sizes(const TileSizes& sizes) { asm volatile("ldtilecfg %0" : : "m"(sizes) : "memory"); }
INR_INLINE void release_tiles() { asm volatile("tilerelease" : : : "memory"); }
template <int tile>
INR_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile) : "memory");
}
// row: bytes from one row to the next
template <int tile>
INR_INLINE void load_tile(const void* from, std::int64_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row), "i"(tile) : "memory");
}
template <int tile>
INR_INLINE void store_tile(float* to, std::int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row), "i"(tile) : "memory");
}
template <int tile>
INR_INLINE void store_tile(float (&to)[tile_side][tile_side]) {
  store_tile<tile>(to[0], sizeof to[0]);
}
// sums += a b
template <int sums, int a, int b>
INR_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b) : "memory");
}

// The tile registers: the sums of 32 x 32 elements, and the operands.
enum { upper_left, upper_right, lower_left, lower_right, upper, lower, left, right };

// Uses tiles for `rows` rows, of which at most 16 are in the upper ones.
INR_INLINE void use_rows(std::int64_t rows) {
  const std::int64_t above = rows < tile_side ? rows : tile_side;
  TileSizes sizes;
  for (int tile : {upper_left, upper_right, upper}) sizes.set(tile, above);
  for (int tile : {lower_left, lower_right, lower}) sizes.set(tile, rows - above);
  for (int tile : {left, right}) sizes.set(tile, tile_side);
  use_sizes(sizes);
}
INR_INLINE void clear_sums(bool below) {
  clear_tile<upper_left>(), clear_tile<upper_right>();
  if (below) clear_tile<lower_left>(), clear_tile<lower_right>();
}

// How many bfloat16 numbers a number is the sum of: exactly, unless a part is infinite or below 2^-126.
template <class T>
constexpr int parts = std::is_same<T, float>::value ? 3 : 1;

// Stores v as bfloat16; returns what the rounding leaves.
INR_INLINE Vec<float> take_part(Vec<float> v, bf16* part) {
  store(part, v);
  return v - load(part);
}

constexpr std::int64_t max_rows = 2 * tile_side, tile_inner = 2 * tile_side, tile_columns = 2 * tile_side;
// Elements of one part of the operands of 32 inner elements.
constexpr std::int64_t rows_part = max_rows * tile_inner, columns_part = tile_inner * tile_columns;

// sums += a b, for 32 inner elements a block, without the products of the smallest parts.
// a: [blocks][count][rows][32] with strides a_block, rows_part, a_row; b: [blocks][count][16][32][2], pairs of inner
// elements; below: whether there are more than 16 rows
template <int count>
INR_INLINE void add_products(bool below, std::int64_t blocks, const bf16* a, std::int64_t a_block, std::int64_t a_row,
                             const bf16* b) {
  constexpr std::int64_t size = sizeof(bf16);
  for (std::int64_t k = 0; k < blocks; ++k, a += a_block)
#pragma GCC unroll 3
    for (int j = 0; j < count; ++j, b += columns_part) {
      load_tile<left>(b, 2 * tile_columns * size);
      load_tile<right>(b + 2 * tile_side, 2 * tile_columns * size);
#pragma GCC unroll 3
      for (int i = 0; i + j < count; ++i) {
        const bf16* rows = a + i * rows_part;
        load_tile<upper>(rows, a_row * size);
        multiply_tiles<upper_left, upper, left>();
        multiply_tiles<upper_right, upper, right>();
        if (!below) continue;
        load_tile<lower>(rows + tile_side * a_row, a_row * size);
        multiply_tiles<lower_left, lower, left>();
        multiply_tiles<lower_right, lower, right>();
      }
    }
}

// A matrix [inner, outer] of float32 or bfloat16 as panels of 32 columns, [blocks][parts][16][32][2] each, zero-padded:
// blocks of 32 inner elements, in pairs.
template <class T>
class TileMatrix {
 public:
  // source: B [inner, outer] with strides inner_stride, outer_stride.
  bool pack(const T* source, std::int64_t outer, std::int64_t inner, std::int64_t outer_stride,
            std::int64_t inner_stride) {
    outer_ = outer, inner_ = inner;
    panel_size_ = round_up(inner, tile_inner) / tile_inner * parts<T> * columns_part;
    if (!data_.resize(round_up(outer, tile_columns) / tile_columns * panel_size_)) return false;
    for (std::int64_t n = 0; n < outer; ++n)
      for (std::int64_t k = 0; k < inner; ++k) {
        bf16* to = data_ + n / tile_columns * panel_size_ + k / tile_inner * parts<T> * columns_part +
                   k % tile_inner / 2 * 2 * tile_columns + n % tile_columns * 2 + k % 2;
        T rest = source[n * outer_stride + k * inner_stride];
        if constexpr (parts<T> == 1)
          *to = rest;
        else
          for (int part = 0; part < parts<T>; ++part, to += columns_part) from_real(rest, to), rest -= to_real(*to);
      }
    return true;
  }

  // Calls emit(i, j, vector) for the elements C[i][j ... j + 16) of C = a w, for i < rows and j < round_up(outer, 16).
  // a: [rows, inner] with row stride a_row
  template <class Emit>
  INR_INLINE void multiply(const TileMatrix& w, const T* a, std::int64_t rows, std::int64_t a_row, Emit emit) {
    alignas(64) bf16 stage[max_blocks * parts<T> * rows_part];
    alignas(64) float sums[4][tile_side][tile_side];
    // Whole blocks of bfloat16 are read where they are.
    const std::int64_t direct = parts<T> == 1 ? w.inner_ / tile_inner : 0, first = direct * tile_inner;
    constexpr std::int64_t chunk = max_blocks * tile_inner;
    for (std::int64_t i = 0; i < rows; i += max_rows, a += max_rows * a_row) {
      const std::int64_t count = rows - i < max_rows ? rows - i : max_rows;
      const bool below = count > tile_side;
      use_rows(count);
      for (std::int64_t j = 0; j < w.outer_; j += tile_columns) {
        const bf16* b = w.data_ + j / tile_columns * w.panel_size_;
        clear_sums(below);
        if constexpr (parts<T> == 1) add_products<1>(below, direct, a, tile_inner, a_row, b);
        for (std::int64_t k = first; k < w.inner_; k += chunk) {
          const std::int64_t width = w.inner_ - k < chunk ? w.inner_ - k : chunk;
          if (j == 0 || w.inner_ - first > chunk)
            for (std::int64_t r = 0; r < count; ++r) stage_row(a + r * a_row + k, width, stage + r * tile_inner);
          add_products<parts<T>>(below, (width + tile_inner - 1) / tile_inner, stage, parts<T> * rows_part, tile_inner,
                                 b + k / tile_inner * parts<T> * columns_part);
        }
        store_tile<upper_left>(sums[upper_left]), store_tile<upper_right>(sums[upper_right]);
        if (below) store_tile<lower_left>(sums[lower_left]), store_tile<lower_right>(sums[lower_right]);
        for (std::int64_t r = 0; r < count; ++r) {
          const int tile = r < tile_side ? upper_left : lower_left;
          emit(i + r, j, load(sums[tile][r % tile_side]));
          if (w.outer_ - j > tile_side) emit(i + r, j + tile_side, load(sums[tile + 1][r % tile_side]));
        }
      }
    }
    release_tiles();
  }

 private:
  static constexpr std::int64_t max_blocks = parts<T> == 1 ? 1 : 10;  // 60 KB of the stack

  // Splits `width` elements of a row into parts, zero-padded to whole blocks. to: [blocks][parts][32] with the strides
  // parts rows_part, rows_part
  static void stage_row(const T* from, std::int64_t width, bf16* to) {
    for (std::int64_t k = 0; k < width; k += tile_inner, to += parts<T> * rows_part) {
      const std::int64_t left = width - k;
      Vec<T> v[2] = {load_part_or_all(from + k, left), load_part_or_all(from + k + lanes<T>, left - lanes<T>)};
#pragma GCC unroll 3
      for (int part = 0; part < parts<T>; ++part)
        for (int n = 0; n < 2; ++n) v[n] = take_part(v[n], to + part * rows_part + n * lanes<T>);
    }
  }
  static Vec<T> load_part_or_all(const T* from, std::int64_t count) {
    return count >= lanes<T> ? load(from) : load_part(from, count > 0 ? count : 0);
  }

  Buffer<bf16> data_;
  std::int64_t outer_ = 0, inner_ = 0, panel_size_ = 0;
};

}  // namespace INR_ISA
}  // namespace inr

#endif
