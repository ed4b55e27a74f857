#include "cuda/local_implicit_weights.cuh"

#include "cuda/launch.cuh"

namespace inr {
namespace cuda {
namespace {

struct WeightSources {
  const std::uint16_t* weights[max_depth];  // [widths[i + 1], inputs[i]]
  const std::uint16_t* biases[max_depth];   // [widths[i + 1]]
  const std::uint16_t* position_weight;     // [widths[0], columns]
  int widths[max_depth + 1];
  int depth, columns;
  bool late_cell;                           // the first weight has two columns more
};

template <Type type>
__device__ __forceinline__ float value(std::uint16_t bits) { return unpack<type>(bits).x; }

// Packs the weights: one block per stage, then one per row of `bias`, `late_cell` and `position`.
// to: [stages, stage]; vectors: bias [depth, padded], late_cell [2, padded], position [4, W]
template <Type type, int W>
__global__ void pack_weights(const WeightSources from, int part, uint4* to, float* vectors, int padded) {
  const int hidden = from.depth - 1, of_layer = W * W / 8 / stage;
  const int count = stages<W>(hidden, from.widths[from.depth]);
  if (int(blockIdx.x) < count) {
    const int s = blockIdx.x, layer = min(s / of_layer, hidden), in_layer = s - layer * of_layer;
    const int inputs = from.widths[layer], outputs = from.widths[layer + 1];
    const int stride = inputs + (layer == 0 && from.late_cell ? 2 : 0);
    for (int i = threadIdx.x; i < stage; i += blockDim.x) {
      const int lane = i % 32, g = lane / 4, tile = i / 32;
      const bool sliced = part == W && layer < hidden;
      int row, column;  // of the first of eight inputs; in a slice, the column is their tile
      if (sliced) {
        const int at = in_layer * stage + i, n = at / 8 % W;
        row = channel(n / 8, n % 8);
        column = at / 8 / W * 8 + (at % 8 ^ n % 8);
      } else if (layer < hidden) {
        const int inputs = 8 * stage / part, parts = W / inputs, tiles = part / 8;
        row = channel(in_layer / parts * tiles + tile % tiles, g);
        column = in_layer % parts * inputs + tile / tiles * 32 + lane % 4 * 8;
      } else {
        row = in_layer * (8 * stage / W) + tile / (W / 32) * 8 + g;
        column = tile % (W / 32) * 32 + lane % 4 * 8;
      }
      unsigned pairs[4] = {0, 0, 0, 0};
      for (int j = 0; j < 8; ++j) {
        const int k = sliced ? channel(column, j) : column + j;
        if (row < outputs && k < inputs)
          pairs[j / 2] |= unsigned(from.weights[layer][row * stride + k]) << (j % 2 * 16);
      }
      to[s * stage + i] = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
    return;
  }
  const int row = blockIdx.x - count, depth = from.depth;
  for (int n = threadIdx.x; n < padded; n += blockDim.x) {
    float v = 0;
    if (row < depth) {
      if (n < from.widths[row + 1]) v = value<type>(from.biases[row][n]);
    } else if (row < depth + 2) {
      if (from.late_cell && n < from.widths[1])
        v = value<type>(from.weights[0][n * (from.widths[0] + 2) + from.widths[0] + row - depth]);
    } else if (n < from.widths[0] && row - depth - 2 < from.columns) {
      v = value<type>(from.position_weight[n * from.columns + row - depth - 2]);
    }
    // Rows of `position` have W elements, the others `padded`.
    if (row < depth + 2) vectors[row * padded + n] = v;
    else if (n < W) vectors[(depth + 2) * padded + (row - depth - 2) * W + n] = v;
  }
}

int all_stages(const LocalImplicit& p) {
  const int hidden = int(p.depth) - 1, outputs = int(p.widths[p.depth]);
  return padded_width(p) == 256 ? stages<256>(hidden, outputs) : stages<128>(hidden, outputs);
}

// The length of a row of `bias` and `late_cell`, a multiple of 4 floats.
int padded_row(const LocalImplicit& p) {
  const int width = padded_width(p), outputs = int(p.widths[p.depth] + 7) / 8 * 8;
  return outputs > width ? outputs : width;
}

// The part of the workspace after the stages: bias, late_cell, position.
float* vectors(const LocalImplicit& p, void* workspace) {
  return reinterpret_cast<float*>(static_cast<uint4*>(workspace) + std::size_t(all_stages(p)) * stage);
}

MapAxis axis(std::int64_t size, bool ensemble) {
  const double radius = 2.0 / double(size) / 2, eps = 1e-6, centre = -1 + radius, step = 2 * radius;
  return {int(size), ensemble ? float(-radius + eps) : 0, ensemble ? float(radius + eps) : 0, float(centre),
          float(step)};
}

template <class V>
const std::uint16_t* halves(const V* from) {
  return static_cast<const std::uint16_t*>(from);
}

template <Type type, int W>
Status pack_as(const LocalImplicit& p, int part, void* workspace, void* stream) {
  WeightSources from{};
  from.depth = int(p.depth), from.columns = int(p.position_inputs()), from.late_cell = p.inputs(0) > p.widths[0];
  for (int i = 0; i < from.depth; ++i) from.weights[i] = halves(p.weights[i]), from.biases[i] = halves(p.biases[i]);
  for (int i = 0; i <= from.depth; ++i) from.widths[i] = int(p.widths[i]);
  from.position_weight = halves(p.position_weight);
  const dim3 blocks(unsigned(all_stages(p) + from.depth + 2 + 4));
  return launch(pack_weights<type, W>, blocks, 256, 0, stream, from, part, static_cast<uint4*>(workspace),
                vectors(p, workspace), padded_row(p));
}

}  // namespace

int padded_width(const LocalImplicit& p) {
  for (std::int64_t i = 0; i < p.depth; ++i)
    if (p.widths[i] > 128) return 256;
  return 128;
}

Decoder decoder(const LocalImplicit& p, void* out, void* workspace) {
  const auto address = reinterpret_cast<std::uintptr_t>(p.hoisted);
  const int padded = padded_row(p), depth = int(p.depth), channels = int(p.widths[0]);
  const float* bias = vectors(p, workspace);
  const float* late_cell = bias + depth * padded;
  return {
      {p.y, p.x, p.cell_y, p.cell_x, axis(p.height, p.local_ensemble),
       axis(p.width, p.local_ensemble), p.queries(), unsigned(p.rows), unsigned(p.cols),
       int(p.band_start), int(p.band_rows), p.local_ensemble},
      halves(p.hoisted), static_cast<const uint4*>(workspace), late_cell + 2 * padded, bias,
      p.inputs(0) > p.widths[0] ? late_cell : nullptr, static_cast<std::uint16_t*>(out), channels,
      int(p.widths[depth]), padded, depth - 1, channels % 8 == 0 && address % 16 == 0};
}

Status pack(Type type, const LocalImplicit& p, int part, void* workspace, void* stream) {
  const bool wide = padded_width(p) == 256;
  if (type == Type::bfloat16)
    return (wide ? pack_as<Type::bfloat16, 256> : pack_as<Type::bfloat16, 128>)(p, part, workspace, stream);
  return (wide ? pack_as<Type::float16, 256> : pack_as<Type::float16, 128>)(p, part, workspace, stream);
}

}  // namespace cuda

std::size_t local_implicit_workspace_cuda(const LocalImplicit& p) {
  const int width = cuda::padded_width(p), rows = int(p.depth) + 2;
  return std::size_t(cuda::all_stages(p)) * cuda::stage * sizeof(uint4) +
         (std::size_t(rows) * cuda::padded_row(p) + 4 * width) * sizeof(float);
}

}  // namespace inr
