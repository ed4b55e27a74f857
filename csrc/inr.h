// The whole native interface: pointers and sizes in, a status out. No torch, no Python, no exceptions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace inr {

enum class Status : int { ok = 0, out_of_memory = 1, row_outside_band = 2, unsupported_type = 3, cuda_failed = 4 };
constexpr int max_depth = 64;  // Linear layers after the first

enum class Type : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };
constexpr std::size_t bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// A float32 [batch, rows, cols] view with strides in elements; any of them may be 0 (broadcast).
struct Plane {
  const float* data;
  std::int64_t batch, row, col;
};

// LIIF's decoder after its first layer was hoisted to the low-resolution map (inr_kernels/local_implicit).
struct LocalImplicit {
  std::int64_t batch, rows, cols;        // queries
  std::int64_t height, width;            // the whole feature map
  std::int64_t band_start, band_rows;    // the rows of it that `hoisted` holds
  bool local_ensemble, ensemble_first;
  std::int64_t depth;                    // Linear layers after the first
  const std::int64_t* widths;            // [depth + 1]: hoisted channels, hidden ones, output channels
  Plane y, x;                            // query centres
  Plane cell_y, cell_x;                  // query extents; data == nullptr: no cell
  const float* centre_y;                 // [height] LIIF's table of pixel centres
  const float* centre_x;                 // [width]
  const void* hoisted;                   // [batch, band_rows, width, widths[0]]
  const void* position_weight;           // [widths[0], 2 | 4] for rel_y, rel_x (, cell_y, cell_x)
  const void* const* weights;            // depth x [widths[i + 1], inputs(i)]
  const void* const* biases;             // depth x [widths[i + 1]]
  int threads;

  // Input columns of layer i: with the ensemble first, the cell enters the layer after it.
  std::int64_t inputs(std::int64_t i) const {
    return widths[i] + (i == 0 && ensemble_first && cell_y.data ? 2 : 0);
  }
  std::int64_t position_inputs() const { return cell_y.data && !ensemble_first ? 4 : 2; }
  std::int64_t queries() const { return batch * rows * cols; }
  int neighbours() const { return local_ensemble ? 4 : 1; }
};

// Gradients of LocalImplicit; a null pointer is not computed. The weights' come all or none.
struct LocalImplicitGradients {
  void* hoisted;
  void* position_weight;
  void* const* weights;  // nullptr: none of position_weight, weights, biases
  void* const* biases;
};

// out: [batch, rows, cols, widths[depth]].
Status local_implicit_forward(Type, const LocalImplicit&, void* out);
// The same on a GPU in bfloat16 or float16, for widths up to 256 before the last: all pointers but those to `widths`,
// `weights` and `biases` are the device's. workspace: so many bytes, aligned to 16. stream: a cudaStream_t. The
// tables of pixel centres are not read, and a row outside the band is not noticed. wgmma: with compute capability 9.0's
// own instruction, for a width above 128 before the last and depth 2 or more.
std::size_t local_implicit_workspace_cuda(const LocalImplicit&);
Status local_implicit_forward_cuda(Type, const LocalImplicit&, bool wgmma, void* out, void* workspace, void* stream);
// grad_out as out; float32 and float64. Deterministic for a given number of threads.
Status local_implicit_backward(Type, const LocalImplicit&, const void* grad_out, const LocalImplicitGradients&);

enum class Padding : int { zeros = 0, replicate = 1, reflect = 2, valid = 3 };
enum class Normalize : int { none = 0, taps = 1, all = 2 };

// Every output value is filtered with a kernel of its own (inr_kernels/elementwise_filter).
struct ElementwiseFilter {
  std::int64_t batch, channels, height, width;
  std::int64_t groups;                        // kernels of a pixel; divides channels
  std::int64_t out_height, out_width;
  std::int64_t kernel_height, kernel_width;   // odd
  const std::int64_t* dilations;              // [dilation_count]; each gives an output
  std::int64_t dilation_count;
  std::int64_t stride, upscale;               // output (Y, X) is centred on (Y stride // upscale, X stride // upscale)
  Padding padding;                            // reflect: reach() < height, width; valid: one dilation
  Normalize normalize;
  double alpha, beta, gamma;                  // of the centre, the box sum, the filtered value; 0 omits the term
  const void* x;                              // [batch, channels, height, width]
  const void* kernel;                         // [batch, groups * taps(), out_height, out_width]
  std::int64_t kernel_strides[4];             // in elements
  const double* log_window;                   // [taps()] or nullptr
  int threads;

  std::int64_t taps() const { return kernel_height * kernel_width; }
};

// out: [dilation_count, batch, channels, out_height, out_width].
Status elementwise_filter_forward(Type, const ElementwiseFilter&, void* out);
// grad_out as out; grad_x as x, grad_kernel contiguous; a null pointer is not computed. Deterministic.
Status elementwise_filter_backward(Type, const ElementwiseFilter&, const void* grad_out, void* grad_x,
                                   void* grad_kernel);

// Every token of an image attends to all of them; a token of weight 0 gets their mean (inr_kernels/unmask_attention).
struct UnmaskAttention {
  std::int64_t batch, channels, tokens;
  double scale;
  bool mask_keys;       // a token's weight is also its weight as a key
  const void* feat;     // [batch, channels, tokens]
  const void* weight;   // [batch, tokens] in [0, 1]; float64 for float64, else float32
  int threads;
};

// out as feat; softmax [batch, 2, tokens] as weight: a row's highest score, +infinity for weight 0, and the sum of its
// e^(score - highest).
Status unmask_attention_forward(Type, const UnmaskAttention&, void* out, void* softmax);
// grad_out, grad_feat as out. Deterministic, whatever the number of threads.
Status unmask_attention_backward(Type, const UnmaskAttention&, const void* out, const void* softmax,
                                 const void* grad_out, void* grad_feat);

// One axis of a neighborhood: NATTEN's window rule. kernel * dilation <= length, stride <= kernel.
struct Axis {
  std::int64_t length, kernel, dilation, stride;
  bool causal;
};

// [batch, height, width, heads, dim] with strides in elements of all but the last, whose elements are adjacent.
struct Tokens {
  const void* data;
  std::int64_t strides[4];
};

// Every pixel attends to a window of pixels around it (inr_kernels/neighborhood_attention).
struct NeighborhoodAttention {
  std::int64_t batch, heads, dim;
  Axis y, x;
  double scale;
  Tokens query, key, value;
  const void* bias;  // [heads, 2 y.kernel - 1, 2 x.kernel - 1], float32 (float64: float64), or nullptr
  int threads;
};

// A null pointer is not computed.
struct NeighborhoodAttentionGradients {
  Tokens query, key, value;
  void* bias;
};

// out: where to write. lse: [batch, height, width, heads], float32 (float64: float64), or nullptr.
Status neighborhood_attention_forward(Type, const NeighborhoodAttention&, const Tokens& out, void* lse);
// grad_lse as lse, nullptr: zeros. Deterministic.
Status neighborhood_attention_backward(Type, const NeighborhoodAttention&, const void* lse, const Tokens& grad_out,
                                       const void* grad_lse, const NeighborhoodAttentionGradients&);

// The product of a real matrix with a complex spectrum whose real and imaginary parts are channels of their own
// (inr_kernels/fourier_unit): out = W x + shift, or its ReLU.
struct SpectrumProduct {
  std::int64_t batch, groups;
  std::int64_t inputs, outputs;  // complex channels of a group
  std::int64_t positions;
  const void* x;                 // [batch, groups * inputs, positions], complex
  const void* weight;            // [groups, 2 * outputs, 2 * inputs], real
  const void* shift;             // [groups * 2 * outputs] or nullptr
  bool relu;
  int threads;
};

// out: [batch, groups * outputs, positions], complex; float32 and float64 alone.
Status spectrum_product(Type, const SpectrumProduct&, void* out);

// A convolution with kernels 3 x 3 of one tensor, or of two whose channels follow each other; out = conv + bias + add,
// or its ReLU.
struct Conv3x3 {
  std::int64_t batch, height, width;
  std::int64_t channels[2];      // of the inputs; the second may have none
  std::int64_t outputs;
  Padding padding;               // zeros, or reflect: 1 < height, width
  const void* x[2];              // [batch, channels, height, width] each
  std::int64_t batch_stride[2];  // in elements; within an image they are contiguous
  const void* weight;            // [outputs, channels[0] + channels[1], 3, 3]
  const void* bias;              // [outputs] or nullptr
  const void* add;               // as out, or nullptr
  bool relu;
  int threads;
};

// out: [batch, outputs, height, width]; float32 and float64 alone.
Status conv3x3(Type, const Conv3x3&, void* out);

// Why this thread's last call that returned cuda_failed did so.
const char* cuda_failure();

// The instruction set that the CPU kernels run on: generic, avx2, avx512 or avx512bf16.
const char* isa();

}  // namespace inr
