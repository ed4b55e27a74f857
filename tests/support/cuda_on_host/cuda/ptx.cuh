// Replaces csrc/cuda/ptx.cuh on the host: each instruction as the PTX manual defines it.
#pragma once

#include "inr.h"
#include "machine.h"

namespace inr {
namespace cuda {

inline char* shared_memory() { return machine::shared_memory(); }

template <Type type>
float to_float(unsigned bits) {
  if (type == Type::bfloat16) {
    bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = int(bits >> 10 & 31), fraction = int(bits & 1023);
  float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                : exponent     ? std::ldexp(float(fraction + 1024), exponent - 25)
                               : std::ldexp(float(fraction), -24);
  return bits >> 15 & 1 ? -value : value;
}

template <Type type>
unsigned to_half(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  if (type == Type::bfloat16) return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const unsigned sign = bits >> 16 & 0x8000;
  value = std::fabs(value);
  if (value >= 65520.f) return sign | 0x7c00;
  if (value < 6.103515625e-5f) return sign | unsigned(std::nearbyint(value * 16777216.f));  // subnormal
  std::memcpy(&bits, &value, 4);
  return sign | ((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}

template <Type type>
float2 unpack(unsigned pair) {
  return {to_float<type>(pair & 0xffff), to_float<type>(pair >> 16)};
}

template <Type type>
unsigned pack(float low, float high) {
  return to_half<type>(low) | to_half<type>(high) << 16;
}

template <Type type>
unsigned pack_relu(float low, float high) {
  return pack<type>(low < 0 ? 0 : low, high < 0 ? 0 : high);
}

// mma.sync.aligned.m16n8k16.row.col: lane 4 g + t holds, of A [16, 16], rows g (a[0], a[2]) and g + 8 (a[1], a[3]),
// columns 2 t, 2 t + 1 (a[0], a[1]) and 2 t + 8, 2 t + 9; of B [16, 8] rows 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of
// column g; of C and D [16, 8] columns 2 t, 2 t + 1 of rows g and g + 8.
struct Mma {
  float* d;
  const unsigned* a;
  unsigned b[2];

  template <Type type>
  static void work(machine::Lanes& lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Mma& m = *static_cast<Mma*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const float2 v = unpack<type>(m.a[i]);
        float* at = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
        at[0] = v.x, at[1] = v.y;
      }
      for (int i = 0; i < 2; ++i) {
        const float2 v = unpack<type>(m.b[i]);
        b[2 * t + 8 * i][g] = v.x, b[2 * t + 8 * i + 1][g] = v.y;
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* d = static_cast<Mma*>(lanes[lane])->d;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        d[i] = machine::add_products(d[i], a[row], &b[0][column], 8, 16);
      }
    }
  }
};

template <Type type>
void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  Mma m{d, a, {b0, b1}};
  machine::warp_synchronize("mma", &m, Mma::work<type>);
}

// ldmatrix.m8n8.x4.trans: lanes 8 i ... 8 i + 7 have the rows of matrix i; lane 4 g + t gets rows 2 t, 2 t + 1 of column g.
struct LoadMatrices {
  unsigned* d;
  const void* row;

  static void work(machine::Lanes& lanes) {
    const auto element = [&](int matrix, int row, int column) {
      const void* from = static_cast<LoadMatrices*>(lanes[8 * matrix + row])->row;
      return unsigned(static_cast<const std::uint16_t*>(from)[column]);
    };
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int g = lane / 4, t = lane % 4;
        static_cast<LoadMatrices*>(lanes[lane])->d[i] = element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16;
      }
  }
};

inline void load_transposed(unsigned (&d)[4], const void* row) {
  machine::check_shared(row, 16);
  if (reinterpret_cast<std::uintptr_t>(row) % 16) machine::fail("a misaligned row of a matrix");
  LoadMatrices m{d, row};
  machine::warp_synchronize("ldmatrix", &m, LoadMatrices::work);
}

inline float exp2_fast(float x) {
  x = std::exp2(x);
  return x < 1.17549435e-38f ? 0 : x;
}

inline void copy_async(void* shared, const void* global) { machine::copy_async(shared, global, 16); }
inline void commit_copies() { machine::commit_copies(); }
template <int groups>
void wait_for_copies() { machine::wait_for_copies(groups); }

}  // namespace cuda
}  // namespace inr
