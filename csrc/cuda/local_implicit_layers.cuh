// The first and the last layer of local_implicit for the 16 rows of a warp: from the feature map to the left fragments
// of the first hidden layer, and from the fragments after the last hidden layer to the output.
#pragma once

#include "cuda/local_implicit.cuh"

namespace inr {
namespace cuda {

// Eight consecutive channels of rows g and g + 8.
struct EightChannels {
  float v[2][8];

  // Adds factor * by to row g and factor_below * by to row g + 8. by: [8], aligned to 16 bytes
  __device__ __forceinline__ void add(float factor, float factor_below, const float* by) {
    const float4 a = *reinterpret_cast<const float4*>(by), b = *reinterpret_cast<const float4*>(by + 4);
    const float eight[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[0][i] = fmaf(factor, eight[i], v[0][i]);
      v[1][i] = fmaf(factor_below, eight[i], v[1][i]);
    }
  }
};

// Reads the feature map at a pixel: eight channels from each of c, c + 32, ..., in pairs; zeros past the last channel.
// All loads are issued before their values are used.
template <int count>
__device__ __forceinline__ void read_map(const Decoder& p, unsigned pixel, int c, unsigned (&pairs)[count][4]) {
  const std::uint16_t* from = p.hoisted + std::size_t(pixel) * p.channels;
  if (p.aligned) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int at = c + 32 * k;
      uint4 v = {0, 0, 0, 0};
      if (at < p.channels) v = *reinterpret_cast<const uint4*>(from + at);
      pairs[k][0] = v.x, pairs[k][1] = v.y, pairs[k][2] = v.z, pairs[k][3] = v.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < count * 4; ++i) {
    const int at = c + i / 4 * 32 + i % 4 * 2;
    unsigned pair = at < p.channels ? from[at] : 0;
    if (at + 1 < p.channels) pair |= unsigned(from[at + 1]) << 16;
    pairs[i / 4][i % 4] = pair;
  }
}

// The first layer's output for rows g and g + 8, as left fragments of the next layer. batch: the number of 32-channel
// groups that are read together.
template <Type type, int W, int batch, bool First>
__device__ __forceinline__ void first_layer(const Decoder& p, const Row<First> (&rows)[2], int t,
                                            unsigned (&state)[W / 16][4]) {
  constexpr int sides = Row<First>::sides;
#pragma unroll
  for (int begin = 0; begin < W / 32; begin += batch) {
    const int c = 32 * begin + 8 * t;
    EightChannels sum[batch] = {};
#pragma unroll
    for (int s = 0; s < Row<First>::samples; ++s) {
      if (s > 0 && !p.queries.ensemble) break;
      unsigned map[2][batch][4];
      read_map(p, rows[0].pixel[s], c, map[0]);
      read_map(p, rows[1].pixel[s], c, map[1]);
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const float* position = p.position + c + 32 * k;
        EightChannels one;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float2 two = unpack<type>(map[i / 4][k][i % 4]);
          one.v[i / 4][i % 4 * 2] = two.x, one.v[i / 4][i % 4 * 2 + 1] = two.y;
        }
        one.add(rows[0].rel_y[s / sides], rows[1].rel_y[s / sides], position);
        one.add(rows[0].rel_x[s % sides], rows[1].rel_x[s % sides], position + W);
        if (!First) {
          one.add(rows[0].cell_y, rows[1].cell_y, position + 2 * W);
          one.add(rows[0].cell_x, rows[1].cell_x, position + 3 * W);
          sum[k] = one;
        } else {
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            const float v = one.v[i / 8][i % 8];
            sum[k].v[i / 8][i % 8] = fmaf(v < 0 ? 0.f : v, rows[i / 8].weight[s], sum[k].v[i / 8][i % 8]);
          }
        }
      }
    }
    // With the ensemble First the sum of ReLUs is not negative, so that the ReLU of pack_relu does not change it.
#pragma unroll
    for (int i = 0; i < batch * 8; ++i) {
      const float* pair = &sum[i / 8].v[i % 2][i / 2 % 4 * 2];
      state[2 * begin + i / 4][i % 4] = pack_relu<type>(pair[0], pair[1]);
    }
  }
}

// Initialises the sums of a hidden layer with its bias (and cell), for rows g and g + 8 and the four result tiles from
// 4 j on, where c is 32 j + 8 t. sum: [4][4]
template <bool First>
__device__ __forceinline__ void start_sum(const Decoder& p, const Row<First> (&rows)[2], int layer, int c,
                                          float (*sum)[4]) {
  EightChannels start{};
  start.add(1, 1, p.bias + layer * p.padded + c);
  if (First && p.late_cell && layer == 0) {
    start.add(rows[0].cell_y, rows[1].cell_y, p.late_cell + c);
    start.add(rows[0].cell_x, rows[1].cell_x, p.late_cell + p.padded + c);
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] = start.v[i / 2 % 2][i / 4 * 2 + i % 2];
}

// Computes the outputs o ... o + 7 of a warp's 16 rows, which begin with query `first`.
// tile: [W / 32][32 lanes] of the last layer's weight, from this lane on
template <Type type, int W, bool First>
__device__ __forceinline__ void last_layer(const Decoder& p, const unsigned (&state)[W / 16][4],
                                           const Row<First> (&rows)[2], std::int64_t first, int o,
                                           const uint4* tile) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int per_query = !First && p.queries.ensemble ? 4 : 1;
  float sum[4][4] = {};  // four independent sums, because dependent products wait for each other
#pragma unroll
  for (int k = 0; k < W / 32; ++k) {
    const uint4 b = tile[k * 32];
    mma<type>(sum[k % 2], state[2 * k], b.x, b.y);
    mma<type>(sum[2 + k % 2], state[2 * k + 1], b.z, b.w);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float y = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
    if (per_query == 4) {  // the ensemble, which commutes with the last layer
      y *= rows[i / 2].weight[0];
      y += __shfl_xor_sync(~0u, y, 4);
      y += __shfl_xor_sync(~0u, y, 8);
    }
    const int n = o + 2 * t + i % 2, row = g + i / 2 * 8;
    const std::int64_t query = first + row / per_query;
    if (n >= p.outputs || query >= p.queries.count || row % per_query) continue;
    y += p.bias[p.hidden * p.padded + n];
    if (First && p.late_cell && p.hidden == 0) {
      y = fmaf(rows[i / 2].cell_y, p.late_cell[n], y);
      y = fmaf(rows[i / 2].cell_x, p.late_cell[p.padded + n], y);
    }
    p.out[query * p.outputs + n] = std::uint16_t(pack<type>(y, 0));
  }
  __syncwarp();  // the next product needs all lanes
}

}  // namespace cuda
}  // namespace inr
