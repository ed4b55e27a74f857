// The Python module; only it and bindings.h include Python's headers. Tensors are passed as addresses:
// inr_kernels/*/op.py checks them, keeps references to them and allocates the outputs.
//
// To bind an op: a constructor (`init`, a lambda that fills the struct of inr.h) and its entry points (`entry`). The
// names are those of the Python keywords; pybind11 deduces the types from the lambda or from inr.h.
#include "bindings.h"

namespace {

// What Python holds of an op's call: its dtype and its struct of inr.h.
template <class Problem>
struct Call {
  inr::Type type;
  Problem problem;
};

template <class Parameter>
using FromPython = std::conditional_t<std::is_pointer_v<Parameter>, Address, std::decay_t<Parameter>>;

// The Python class of an op. Arguments are keyword-only, except that a single one may be positional.
template <class Self>
struct OpClass : py::class_<Self> {
  using py::class_<Self>::class_;

  template <class Make, class... Names>
  OpClass& init(const Make& make, Names... names) {
    this->def(py::init(make), py::kw_only(), py::arg(names)...);
    return *this;
  }
  template <class F, class... Names>
  OpClass& method(const char* name, const F& f, Names... names) {
    if constexpr (sizeof...(Names) > 1)
      this->def(name, f, py::kw_only(), py::arg(names)...);
    else
      this->def(name, f, py::arg(names)...);
    return *this;
  }
  // A CPU entry point whose parameters after the problem are pointers, or types that are converted above.
  template <class Problem, class... Parameters, class... Names>
  OpClass& entry(const char* name, inr::Status (*inr::CpuEntries::*entry)(inr::Type, const Problem&, Parameters...),
                 Names... names) {
    static_assert(sizeof...(Parameters) == sizeof...(Names), "one name per parameter");
    return method(
        name,
        [entry](const Self& self, FromPython<Parameters>... arguments) {
          call(inr::cpu().*entry, self.type, self.problem, arguments...);
        },
        names...);
  }
  // Such an entry point on a GPU.
  template <class Problem, class... Parameters, class... Names>
  OpClass& entry(const char* name, inr::Status (*entry)(inr::Type, const Problem&, Parameters...), Names... names) {
    const auto run = [entry](const Self& self, FromPython<Parameters>... arguments) {
      call(entry, self.type, self.problem, arguments...);
    };
    return method(name, run, names...);
  }
};

std::vector<void*> pointers(const std::vector<Address>& addresses) { return {addresses.begin(), addresses.end()}; }

// Owns the arrays that the struct points to.
struct LocalImplicit : Call<inr::LocalImplicit> {
  std::vector<std::int64_t> widths;
  std::vector<void*> weights, biases;
};

void bind_local_implicit(py::module_& m) {
  OpClass<LocalImplicit>(m, "LocalImplicit")
      .init(
          [](inr::Type type, Sizes<3> queries, Sizes<2> size, Sizes<2> band, bool local_ensemble, bool ensemble_first,
             bool texture, std::vector<std::int64_t> widths, inr::Plane y, inr::Plane x, Strided<4> cell, Address centre_y,
             Address centre_x, Address hoisted, Address position_weight, const std::vector<Address>& weights,
             const std::vector<Address>& biases, int threads) {
            const auto& [cell_y, s] = cell;  // strides of batch, row, column, and from cell_y to cell_x
            const Address cell_x{cell_y.value ? cell_y.value + sizeof(float) * std::size_t(s[3]) : 0};
            LocalImplicit self{{}, std::move(widths), pointers(weights), pointers(biases)};
            self.type = type;
            self.problem = {queries[0], queries[1], queries[2], size[0], size[1], band[0], band[1], local_ensemble,
                            ensemble_first, texture, std::int64_t(weights.size()), self.widths.data(), y, x,
                            {cell_y, s[0], s[1], s[2]}, {cell_x, s[0], s[1], s[2]}, centre_y, centre_x, hoisted,
                            position_weight, self.weights.data(), self.biases.data(), threads};
            return self;
          },
          "type", "queries", "size", "band", "local_ensemble", "ensemble_first", "texture", "widths", "y", "x", "cell", "centre_y",
          "centre_x", "hoisted", "position_weight", "weights", "biases", "threads")
      .entry("forward", &inr::CpuEntries::local_implicit_forward, "out")
      .method(
          "backward",
          [](const LocalImplicit& self, Address grad_out, Address hoisted, Address position_weight,
             const std::vector<Address>& weights, const std::vector<Address>& biases) {
            const std::vector<void*> w = pointers(weights), b = pointers(biases);
            const inr::LocalImplicitGradients gradients{hoisted, position_weight, w.empty() ? nullptr : w.data(),
                                                        b.empty() ? nullptr : b.data()};
            call(inr::cpu().local_implicit_backward, self.type, self.problem, grad_out, gradients);
          },
          "grad_out", "hoisted", "position_weight", "weights", "biases")
#ifdef INR_HAVE_CUDA
      .method("workspace_cuda",
              [](const LocalImplicit& self) { return inr::local_implicit_workspace_cuda(self.problem); })
      .def(
          "forward_cuda",
          [](const LocalImplicit& self, bool wgmma, Address out, Address workspace, Address stream) {
            call(inr::local_implicit_forward_cuda, self.type, self.problem, wgmma, out, workspace, stream);
          },
          py::arg("wgmma"), py::arg("out"), py::arg("workspace"), py::arg("stream"))
#endif
      ;
}

// Owns the dilations that the struct points to.
struct ElementwiseFilter : Call<inr::ElementwiseFilter> {
  std::vector<std::int64_t> dilations;
};

void bind_elementwise_filter(py::module_& m) {
  OpClass<ElementwiseFilter>(m, "ElementwiseFilter")
      .init(
          [](inr::Type type, Sizes<4> size, std::int64_t groups, Sizes<2> out_size, Sizes<2> kernel_size,
             std::vector<std::int64_t> dilations, std::int64_t stride, std::int64_t upscale, inr::Padding padding,
             inr::Normalize normalize, std::array<double, 3> coefficients, Address x, Strided<4> kernel,
             Address log_window, int threads) {
            const auto& [weights, s] = kernel;
            ElementwiseFilter self{{}, std::move(dilations)};
            self.type = type;
            self.problem = {size[0], size[1], size[2], size[3], groups, out_size[0], out_size[1], kernel_size[0],
                            kernel_size[1], self.dilations.data(), std::int64_t(self.dilations.size()), stride,
                            upscale, padding, normalize, coefficients[0], coefficients[1], coefficients[2], x, weights,
                            {s[0], s[1], s[2], s[3]}, log_window, threads};
            return self;
          },
          "type", "size", "groups", "out_size", "kernel_size", "dilations", "stride", "upscale", "padding", "normalize",
          "coefficients", "x", "kernel", "log_window", "threads")
      .entry("forward", &inr::CpuEntries::elementwise_filter_forward, "out")
      .entry("backward", &inr::CpuEntries::elementwise_filter_backward, "grad_out", "x", "kernel")
#ifdef INR_HAVE_CUDA
      .entry("forward_cuda", inr::elementwise_filter_forward_cuda, "log_window", "out", "stream")
      .entry("backward_cuda", inr::elementwise_filter_backward_cuda, "log_window", "grad_out", "x", "kernel", "stream")
#endif
      ;
}

void bind_unmask_attention(py::module_& m) {
  using UnmaskAttention = Call<inr::UnmaskAttention>;
  OpClass<UnmaskAttention>(m, "UnmaskAttention")
      .init(
          [](inr::Type type, Sizes<3> size, double scale, bool mask_keys, Address feat, Address weight, int threads) {
            return UnmaskAttention{type, {size[0], size[1], size[2], scale, mask_keys, feat, weight, threads}};
          },
          "type", "size", "scale", "mask_keys", "feat", "weight", "threads")
      .entry("forward", &inr::CpuEntries::unmask_attention_forward, "out", "softmax")
      .entry("backward", &inr::CpuEntries::unmask_attention_backward, "out", "softmax", "grad_out", "grad_feat");
}

void bind_neighborhood_attention(py::module_& m) {
  using NeighborhoodAttention = Call<inr::NeighborhoodAttention>;
  OpClass<NeighborhoodAttention>(m, "NeighborhoodAttention")
      .init(
          [](inr::Type type, std::int64_t batch, Sizes<3> heads, Sizes<2> dims, inr::Axis z, inr::Axis y, inr::Axis x,
             double scale, bool mean_heads, inr::Tokens query, inr::Tokens key, inr::Tokens value, Address bias,
             int threads) {
            return NeighborhoodAttention{type,
                                         {batch, heads[0], heads[1], heads[2], dims[0], dims[1], z, y, x, scale,
                                          mean_heads, query, key, value, bias, threads}};
          },
          "type", "batch", "heads", "dims", "z", "y", "x", "scale", "mean_heads", "query", "key", "value", "bias",
          "threads")
      .entry("forward", &inr::CpuEntries::neighborhood_attention_forward, "out", "lse")
      .entry("backward", &inr::CpuEntries::neighborhood_attention_backward, "lse", "grad_out", "grad_lse", "gradients")
#ifdef INR_HAVE_CUDA
      .entry("forward_cuda", inr::neighborhood_attention_forward_cuda, "out", "lse", "stream")
      .method("tiles_cuda",
              [](const NeighborhoodAttention& self) { return inr::neighborhood_attention_tiles_cuda(self.problem); })
      .entry("backward_cuda", inr::neighborhood_attention_backward_cuda, "lse", "grad_out", "grad_lse", "gradients",
             "delta", "stream")
#endif
      ;
}

// A function of the module with keyword-only arguments.
template <class F, class... Names>
void function(py::module_& m, const char* name, const F& f, Names... names) {
  m.def(name, f, py::kw_only(), py::arg(names)...);
}

void bind_fourier_unit(py::module_& m) {
  function(
      m, "spectrum_product",
      [](inr::Type type, Sizes<5> size, Address x, Address weight, Address prepared, Address shift, bool relu,
         bool add_input, Address out, int threads) {
        const inr::SpectrumProduct p{size[0], size[1],  size[2], size[3], size[4],   x,
                                     weight,  prepared, shift,   relu,    add_input, threads};
        call(inr::cpu().spectrum_product, type, p, out);
      },
      "type", "size", "x", "weight", "prepared", "shift", "relu", "add_input", "out", "threads");
  // Returns the number of elements. size: (groups, inputs, outputs); prepared: 0 for the number alone.
  function(
      m, "prepare_spectrum_product",
      [](inr::Type type, Sizes<3> size, Address weight, Address prepared, int threads) {
        inr::SpectrumProduct p{1, size[0], size[1], size[2], 1};
        p.weight = weight, p.threads = threads;
        std::int64_t count = 0;
        call(inr::cpu().prepare_spectrum_product, type, p, prepared, &count);
        return count;
      },
      "type", "size", "weight", "prepared", "threads");
  // x: (address, channels, batch stride) of both inputs.
  function(
      m, "conv3x3",
      [](inr::Type type, Sizes<3> size, std::array<std::tuple<Address, std::int64_t, std::int64_t>, 2> x,
         std::int64_t outputs, inr::Padding padding, bool transposed, Address weight, Address prepared, Address bias,
         Address add, Address residual, bool relu, Address out, int threads) {
        const auto& [x0, channels0, stride0] = x[0];
        const auto& [x1, channels1, stride1] = x[1];
        const inr::Conv3x3 p{size[0], size[1], size[2], {channels0, channels1}, outputs, padding, transposed,
                             {x0, x1}, {stride0, stride1}, weight, prepared, bias, add, residual, relu, threads};
        call(inr::cpu().conv3x3, type, p, out);
      },
      "type", "size", "x", "outputs", "padding", "transposed", "weight", "prepared", "bias", "add", "residual", "relu",
      "out", "threads");
  function(
      m, "conv3x3_weight_gradient",
      [](inr::Type type, Sizes<3> size, std::array<std::tuple<Address, std::int64_t, std::int64_t>, 2> x,
         std::int64_t outputs, inr::Padding padding, Address grad, Address out, int threads) {
        const auto& [x0, channels0, stride0] = x[0];
        const auto& [x1, channels1, stride1] = x[1];
        inr::Conv3x3 p{size[0], size[1], size[2], {channels0, channels1}, outputs, padding, false, {x0, x1},
                       {stride0, stride1}};
        p.threads = threads;
        call(inr::cpu().conv3x3_weight_gradient, type, p, grad, out);
      },
      "type", "size", "x", "outputs", "padding", "grad", "out", "threads");
  // Returns the number of elements. size: (channels, outputs); prepared: 0 for the number alone.
  function(
      m, "prepare_conv3x3",
      [](inr::Type type, Sizes<2> size, Address weight, Address prepared, int threads) {
        inr::Conv3x3 p{};
        p.batch = p.height = p.width = 1;
        p.channels[0] = size[0], p.outputs = size[1], p.weight = weight, p.threads = threads;
        std::int64_t count = 0;
        call(inr::cpu().prepare_conv3x3, type, p, prepared, &count);
        return count;
      },
      "type", "size", "weight", "prepared", "threads");
  const auto conv2d = [](Sizes<4> size, Sizes<3> out_size, Sizes<2> kernel, Sizes<2> stride, Sizes<2> pad,
                         inr::Padding padding, bool transposed, Address weight, int threads) {
    inr::Conv2d p{size[0], size[1], size[2], size[3], out_size[0], out_size[1], out_size[2],
                  {kernel[0], kernel[1]}, {stride[0], stride[1]}, {pad[0], pad[1]}, padding, transposed};
    p.weight = weight, p.threads = threads;
    return p;
  };
  function(
      m, "conv2d",
      [conv2d](inr::Type type, Sizes<4> size, Sizes<3> out_size, Sizes<2> kernel, Sizes<2> stride, Sizes<2> pad,
               inr::Padding padding, bool transposed, Address x, Address weight, Address prepared, Address scale,
               Address bias, Address add, bool relu, Address out, int threads) {
        inr::Conv2d p = conv2d(size, out_size, kernel, stride, pad, padding, transposed, weight, threads);
        p.x = x, p.prepared = prepared, p.scale = scale, p.bias = bias, p.add = add, p.relu = relu;
        call(inr::cpu().conv2d, type, p, out);
      },
      "type", "size", "out_size", "kernel", "stride", "pad", "padding", "transposed", "x", "weight", "prepared",
      "scale", "bias", "add", "relu", "out", "threads");
  // As prepare_conv3x3.
  function(
      m, "prepare_conv2d",
      [conv2d](inr::Type type, Sizes<4> size, Sizes<3> out_size, Sizes<2> kernel, Sizes<2> stride, Sizes<2> pad,
               inr::Padding padding, bool transposed, Address weight, Address prepared, int threads) {
        std::int64_t count = 0;
        call(inr::cpu().prepare_conv2d, type,
             conv2d(size, out_size, kernel, stride, pad, padding, transposed, weight, threads), prepared, &count);
        return count;
      },
      "type", "size", "out_size", "kernel", "stride", "pad", "padding", "transposed", "weight", "prepared", "threads");
}

void bind_mlp(py::module_& m) {
  function(
      m, "mlp",
      [](inr::Type type, std::int64_t rows, const std::vector<std::int64_t>& widths, inr::Activation activation,
         double eps, Address x, Address norm_weight, Address norm_bias, const std::vector<Address>& weights,
         const std::vector<Address>& biases, Address add, Address out, int threads) {
        const std::vector<void*> w = pointers(weights), b = pointers(biases);
        const inr::Mlp p{rows, std::int64_t(w.size()), widths.data(), activation, eps, x, norm_weight, norm_bias,
                         w.data(), b.data(), add, threads};
        call(inr::cpu().mlp, type, p, out);
      },
      "type", "rows", "widths", "activation", "eps", "x", "norm_weight", "norm_bias", "weights", "biases", "add", "out",
      "threads");
}

void bind_signs(py::module_& m) {
  function(
      m, "pack_signs",
      [](inr::Type type, std::int64_t count, Address x, Address bits, int threads) {
        call(inr::cpu().pack_signs, type, inr::Signs{count, threads}, x, bits);
      },
      "type", "count", "x", "bits", "threads");
  function(
      m, "select_by_signs",
      [](inr::Type type, std::int64_t count, Address grad, Address bits, Address out, int threads) {
        call(inr::cpu().select_by_signs, type, inr::Signs{count, threads}, grad, bits, out);
      },
      "type", "count", "grad", "bits", "out", "threads");
}

// tensors: (address, number of words) of each; in another order they have another fingerprint.
void bind_fingerprint(py::module_& m) {
  function(
      m, "fingerprint",
      [](const std::vector<std::pair<Address, std::int64_t>>& tensors, int threads) {
        std::uint64_t all = 0;
        for (const auto& [data, words] : tensors) {
          std::uint64_t out = 0;
          call(inr::cpu().fingerprint, inr::Fingerprint{data, words, threads}, &out);
          all = (all << 7 | all >> 57) * 0x9e3779b97f4a7c15u + out;
        }
        return all;
      },
      "tensors", "threads");
}

// Returns the number of floating-point operations.
void bind_multiply_adds(py::module_& m) {
  function(
      m, "multiply_adds",
      [](inr::Type type, std::int64_t steps, int threads) {
        double flops = 0;
        call(inr::cpu().multiply_adds, type, steps, threads, &flops);
        return flops;
      },
      "type", "steps", "threads");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("cuda_archs") = std::string(INR_CUDA_ARCHS);
  m.attr("cuda_version") = std::string(INR_CUDA_VERSION);
  m.attr("max_depth") = inr::max_depth;
  m.def("isa", [] { return inr::cpu().isa; });
  m.def("has_openmp", &inr::has_openmp);
  m.def("release_memory", &inr::release_memory);
  py::class_<Memory>(m, "Memory", py::buffer_protocol())
      .def(py::init<std::size_t>(), py::arg("bytes"))
      .def_buffer([](Memory& memory) {
        return py::buffer_info(static_cast<std::uint8_t*>(memory.data), std::int64_t(memory.bytes));
      });
  bind_local_implicit(m);
  bind_elementwise_filter(m);
  bind_unmask_attention(m);
  bind_neighborhood_attention(m);
  bind_fourier_unit(m);
  bind_mlp(m);
  bind_signs(m);
  bind_fingerprint(m);
  bind_multiply_adds(m);
}
