// The native interface: pointers and sizes in, a status out. No torch, no Python, no exceptions.
//
// The CPU entry points (Status name(Type, const Problem&, ...)) are compiled once per instruction set; cpu/entries.h
// lists them, and cpu() returns those for this processor. Tensors are contiguous unless strides are given, and
// strides are in elements. "real" is the type that a stored type is computed in: float64 for float64, else float32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace inr {

enum class Status : int { ok = 0, out_of_memory = 1, row_outside_band = 2, unsupported_type = 3, cuda_failed = 4 };
constexpr int max_depth = 64;  // Linear layers after the first

enum class Type : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };
constexpr std::size_t bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// A float32 [batch, rows, cols] view with strides; a stride of 0 broadcasts.
struct Plane {
  const float* data;
  std::int64_t batch, row, col;
};

// ---- local_implicit: LIIF's decoder after its first layer was applied once per feature map pixel (hoisted); or LTE's,
// after its convolutions.
struct LocalImplicit {
  std::int64_t batch, rows, cols;        // of the queries
  std::int64_t height, width;            // of the whole feature map
  std::int64_t band_start, band_rows;    // the rows of the feature map that `hoisted` holds
  bool local_ensemble, ensemble_first;
  bool texture;                          // LTE: the first layer multiplies coefficients by cosines and sines
  std::int64_t depth;                    // number of Linear layers after the first
  const std::int64_t* widths;            // [depth + 1]: channels of the first layer, of the hidden ones, of the output
  Plane y, x;                            // query coordinates
  Plane cell_y, cell_x;                  // query cells; data == nullptr: no cell, which a texture requires
  const float* centre_y;                 // [height]: LIIF's table of pixel centres
  const float* centre_x;                 // [width]
  const void* hoisted;                   // [batch, band_rows, width, channels()]
  const void* position_weight;           // [widths[0], 2 | 4] for rel_y, rel_x (, cell_y, cell_x); of a texture's phase:
                                         // [frequencies(), 2] for cell_y, cell_x
  const void* const* weights;            // depth x [widths[i + 1], inputs(i)]
  const void* const* biases;             // depth x [widths[i + 1]]
  int threads;

  // Input columns of layer i. With the ensemble first, the cell is an input of the layer that follows the ensemble.
  std::int64_t inputs(std::int64_t i) const {
    return widths[i] + (i == 0 && ensemble_first && cell_y.data ? 2 : 0);
  }
  std::int64_t position_inputs() const { return cell_y.data && !ensemble_first && !texture ? 4 : 2; }
  std::int64_t position_outputs() const { return texture ? frequencies() : widths[0]; }
  // A texture's map holds coefficients of the cosines, of the sines, and frequencies along y and along x.
  std::int64_t frequencies() const { return widths[0] / 2; }
  std::int64_t channels() const { return texture ? 4 * frequencies() : widths[0]; }
  // Whether the input of layer i is the output of a ReLU.
  bool rectified(std::int64_t i) const { return i > 0 || !(ensemble_first || texture); }
  std::int64_t queries() const { return batch * rows * cols; }
  int neighbours() const { return local_ensemble ? 4 : 1; }
};

// Outputs of the backward, with the shapes of the fields of LocalImplicit; nullptr: not computed.
struct LocalImplicitGradients {
  void* hoisted;
  void* position_weight;
  void* const* weights;  // nullptr: none of position_weight, weights, biases
  void* const* biases;
};

// out: [batch, rows, cols, widths[depth]].
Status local_implicit_forward(Type, const LocalImplicit&, void* out);
// grad_out: like out; float32 and float64. Deterministic for a given number of threads.
Status local_implicit_backward(Type, const LocalImplicit&, const void* grad_out, const LocalImplicitGradients&);

// The forward on a GPU, in bfloat16 or float16, for widths up to 256 before the last. All pointers are device pointers
// except `widths`, `weights` and `biases` themselves.
// out: as above. workspace: [local_implicit_workspace_cuda(problem)] bytes, aligned to 16. stream: a cudaStream_t.
// wgmma: use compute capability 9.0's instruction; needs a width above 128 before the last, and depth 2 or more.
// The tables of pixel centres are not read, and rows outside the band are not detected.
std::size_t local_implicit_workspace_cuda(const LocalImplicit&);
Status local_implicit_forward_cuda(Type, const LocalImplicit&, bool wgmma, void* out, void* workspace, void* stream);

// ---- elementwise_filter: filters every output element with its own kernel.
enum class Padding : int { zeros = 0, replicate = 1, reflect = 2, valid = 3 };
enum class Normalize : int { none = 0, taps = 1, all = 2 };

struct ElementwiseFilter {
  std::int64_t batch, channels, height, width;
  std::int64_t groups;                        // kernels per pixel; divides channels
  std::int64_t out_height, out_width;
  std::int64_t kernel_height, kernel_width;   // odd
  const std::int64_t* dilations;              // [dilation_count]; one output per dilation
  std::int64_t dilation_count;
  std::int64_t stride, upscale;               // output (Y, X) is centred on (Y stride // upscale, X stride // upscale)
  Padding padding;                            // reflect: the kernel's reach < height, width; valid: one dilation
  Normalize normalize;
  double alpha, beta, gamma;                  // factors of the centre, box sum and filtered value; 0 omits the term
  const void* x;                              // [batch, channels, height, width]
  const void* kernel;                         // [batch, groups * taps(), out_height, out_width], with strides
  std::int64_t kernel_strides[4];
  const double* log_window;                   // [taps()] or nullptr
  int threads;

  std::int64_t taps() const { return kernel_height * kernel_width; }
};

// out: [dilation_count, batch, channels, out_height, out_width].
Status elementwise_filter_forward(Type, const ElementwiseFilter&, void* out);
// grad_out: like out; grad_x: like x; grad_kernel: like kernel, contiguous; nullptr: not computed. Deterministic.
Status elementwise_filter_backward(Type, const ElementwiseFilter&, const void* grad_out, void* grad_x,
                                   void* grad_kernel);

// The forward on a GPU, in float32, bfloat16 or float16, not with Normalize::all. All pointers but `dilations` are device
// pointers. log_window: [taps()] float32 or nullptr, in place of the problem's. stream: a cudaStream_t.
Status elementwise_filter_forward_cuda(Type, const ElementwiseFilter&, const float* log_window, void* out,
                                       void* stream);
// The backward on a GPU: at stride and upscale 1, at most 25 taps and 8 dilations, and taps at most 4 pixels from the
// centre (others may not fit shared memory). Other arguments: as in the forward on a GPU and the backward on a CPU.
Status elementwise_filter_backward_cuda(Type, const ElementwiseFilter&, const float* log_window, const void* grad_out,
                                        void* grad_x, void* grad_kernel, void* stream);

// ---- unmask_attention: every token attends to all tokens of its image; a token of weight 0 gets their mean.
struct UnmaskAttention {
  std::int64_t batch, channels, tokens;
  double scale;
  bool mask_keys;       // a token's weight is also its weight as a key
  const void* feat;     // [batch, channels, tokens]
  const void* weight;   // [batch, tokens] in [0, 1], real
  int threads;
};

// out: like feat. softmax: [batch, 2, tokens], real: a row's maximum score (+infinity for weight 0) and its sum of
// exp(score - maximum).
Status unmask_attention_forward(Type, const UnmaskAttention&, void* out, void* softmax);
// out, softmax: of the forward; grad_out, grad_feat: like feat. Deterministic for any number of threads.
Status unmask_attention_backward(Type, const UnmaskAttention&, const void* out, const void* softmax,
                                 const void* grad_out, void* grad_feat);

// ---- neighborhood_attention: every pixel attends to a window of pixels around it.

// One axis of a neighborhood under NATTEN's window rule. kernel * dilation <= length, stride <= kernel.
struct Axis {
  std::int64_t queries, length;  // positions of queries, of keys
  std::int64_t kernel, dilation, stride;
  bool causal;
};

// [batch, depth, height, width, heads, dim] with strides of all dimensions but the last, which is contiguous.
struct Tokens {
  const void* data;
  std::int64_t strides[5];
};

struct NeighborhoodAttention {
  std::int64_t batch;
  std::int64_t heads, key_heads, value_heads;  // of the queries; divisors of it
  std::int64_t dim, value_dim;
  Axis z, y, x;  // z.queries = z.length; if it is above 1, also y and x, and no mean_heads
  double scale;
  bool mean_heads;           // whether the output is the mean over the heads; then value_heads = 1
  Tokens query, key, value;
  const void* bias;  // [heads, 2 z.kernel - 1, 2 y.kernel - 1, 2 x.kernel - 1], real, or nullptr
  int threads;
};

// Outputs of the backward, with the shapes of the fields of NeighborhoodAttention; nullptr: not computed.
struct NeighborhoodAttentionGradients {
  Tokens query, key, value;
  void* bias;
};

// out: like query, with value_dim channels, and one head if mean_heads; written. lse: [batch, depth, height, width, heads], real, or nullptr.
Status neighborhood_attention_forward(Type, const NeighborhoodAttention&, const Tokens& out, void* lse);
// lse: of the forward; grad_out: like out; grad_lse: like lse, or nullptr for zeros. Deterministic.
Status neighborhood_attention_backward(Type, const NeighborhoodAttention&, const void* lse, const Tokens& grad_out,
                                       const void* grad_lse, const NeighborhoodAttentionGradients&);

// The forward on a GPU, in bfloat16 or float16, in two dimensions: z of one position, queries of the keys' size, equal
// heads, dim = value_dim <= 128, no mean_heads. All pointers are device pointers. stream: a cudaStream_t.
Status neighborhood_attention_forward_cuda(Type, const NeighborhoodAttention&, const Tokens& out, void* lse,
                                           void* stream);
// The backward of the same calls; gradients of key and value are computed together or not at all. lse: of the forward.
// delta: [batch, height, width, heads] float32, written and read. gradients.bias: [tiles, heads, 2 y.kernel - 1,
// 2 x.kernel - 1], to be summed over the tiles, of which neighborhood_attention_tiles_cuda is the number. Deterministic.
std::int64_t neighborhood_attention_tiles_cuda(const NeighborhoodAttention&);
Status neighborhood_attention_backward_cuda(Type, const NeighborhoodAttention&, const void* lse, const Tokens& grad_out,
                                            const void* grad_lse, const NeighborhoodAttentionGradients&, void* delta,
                                            void* stream);

// ---- fourier_unit

// out = W x + shift, or its ReLU, or its ReLU + x, for a real matrix W and a complex spectrum x whose real and imaginary parts are
// separate channels of the product.
struct SpectrumProduct {
  std::int64_t batch, groups;
  std::int64_t inputs, outputs;  // complex channels of a group
  std::int64_t positions;
  const void* x;                 // [batch, groups * inputs, positions], complex
  const void* weight;            // [groups, 2 * outputs, 2 * inputs], real
  const void* prepared;          // what prepare_spectrum_product made of the weight, or nullptr
  const void* shift;             // [groups * 2 * outputs], real, or nullptr
  bool relu;
  bool add_input;                // adds x after the ReLU; outputs == inputs
  int threads;
};

// out: [batch, groups * outputs, positions], complex; float32 and float64.
Status spectrum_product(Type, const SpectrumProduct&, void* out);
// Packs the weight for calls with any batch and positions. prepared: [*size] elements, or nullptr: only sets the size.
Status prepare_spectrum_product(Type, const SpectrumProduct&, void* prepared, std::int64_t* size);

// out = conv + bias + add + residual, or relu(conv + bias + add) + residual: a 3 x 3 convolution of one tensor, or of two
// concatenated along the channels.
struct Conv3x3 {
  std::int64_t batch, height, width;
  std::int64_t channels[2];      // of each input; 0 for the second: only one input
  std::int64_t outputs;
  Padding padding;               // zeros, or reflect: 1 < height, width
  bool transposed;               // the transpose of a reflect padding; padding: zeros; even height and width
  const void* x[2];              // [batch, channels[i], height, width]
  std::int64_t batch_stride[2];  // each image is contiguous
  const void* weight;            // [outputs, channels[0] + channels[1], 3, 3]
  const void* prepared;          // what prepare_conv3x3 made of the weight, or nullptr; nullptr if transposed
  const void* bias;              // [outputs] or nullptr
  const void* add;               // [batch, outputs, height, width] or nullptr
  const void* residual;          // [batch, outputs, height, width] or nullptr; is added after the ReLU
  bool relu;
  int threads;
};

// out: [batch, outputs, height, width]; float32 and float64.
Status conv3x3(Type, const Conv3x3&, void* out);
// Transforms the weight, for any x and number of threads. size: the number of elements; prepared: [size], or nullptr,
// and only the size is set.
Status prepare_conv3x3(Type, const Conv3x3&, void* prepared, std::int64_t* size);
// The gradient of the weight, from x, its sizes and the padding. grad: as the output of conv3x3; out: as the weight
Status conv3x3_weight_gradient(Type, const Conv3x3&, const void* grad, void* out);

// out = scale conv + bias + add, or its ReLU: a convolution with any kernel, or a transposed one.
struct Conv2d {
  std::int64_t batch, channels, height, width;    // of x
  std::int64_t outputs, out_height, out_width;
  std::int64_t kernel[2], stride[2], pad[2];      // by axis; pad: above and to the left
  Padding padding;                                // zeros, or reflect, not if transposed: pad < height, width
  bool transposed;
  const void* x;                                  // [batch, channels, height, width]
  const void* weight;                             // [outputs, channels, kernel], transposed [channels, outputs, kernel]
  const void* prepared;                           // what prepare_conv2d made of the weight, or nullptr
  const void* scale;                              // [outputs] or nullptr, like bias
  const void* bias;
  const void* add;                                // as out, or nullptr
  bool relu;
  int threads;
};

// out: [batch, outputs, out_height, out_width]; float32 and float64.
Status conv2d(Type, const Conv2d&, void* out);
// As prepare_conv3x3, for x of this size. Larger or smaller x may need the weight in another form; the forms of a weight
// have different sizes.
Status prepare_conv2d(Type, const Conv2d&, void* prepared, std::int64_t* size);

// ---- mlp: out = W_n act(... act(W_1 norm(x) + b_1) ...) + b_n + add, on rows
enum class Activation : int { relu = 0, gelu = 1 };
struct Mlp {
  std::int64_t rows, depth;     // depth: number of Linear layers, at most max_depth
  const std::int64_t* widths;   // [depth + 1]: of x, of the hidden layers, of the output
  Activation activation;
  double eps;                   // of the norm
  const void* x;                // [rows, widths[0]]
  const void* norm_weight;      // [widths[0]], LayerNorm's; nullptr: no norm
  const void* norm_bias;        // [widths[0]] or nullptr
  const void* const* weights;   // depth x [widths[i + 1], widths[i]]
  const void* const* biases;    // depth x [widths[i + 1]]
  const void* add;              // as out, or nullptr
  int threads;
};

// out: [rows, widths[depth]]; float32 and float64.
Status mlp(Type, const Mlp&, void* out);

// ---- the signs of a ReLU's outputs, for its backward: bit i % 8 of byte i / 8 is x[i] > 0
struct Signs {
  std::int64_t count;
  int threads;
};

// x: [count]; bits: [ceil(count / 8)]; float32 and float64.
Status pack_signs(Type, const Signs&, const void* x, std::uint8_t* bits);
// out: grad where its bit is set, else 0; [count]. out may be grad.
Status select_by_signs(Type, const Signs&, const void* grad, const std::uint8_t* bits, void* out);

// ---- whether the values of a tensor have changed
struct Fingerprint {
  const void* data;  // [words], of 4 bytes each
  std::int64_t words;
  int threads;
};

// A change of one word changes it; that others do not is as unlikely as two equal random numbers.
Status fingerprint(const Fingerprint&, std::uint64_t* out);

// ---- the peak rate: `steps` rounds of independent multiply-adds in registers, on every thread. flops: their number.
// float32 and float64, and bfloat16 where the processor multiplies it.
Status multiply_adds(Type, std::int64_t steps, int threads, double* flops);

// The CUDA error of this thread's last call that returned cuda_failed.
const char* cuda_failure();

}  // namespace inr
