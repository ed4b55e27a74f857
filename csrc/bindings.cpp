// The only file that knows Python. Tensors arrive as addresses: inr_kernels/*/op.py checks them, holds
// references and allocates the outputs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "common/memory.h"
#include "common/threads.h"
#include "inr.h"

#ifndef INR_CUDA_ARCHS
#define INR_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

// (address, strides) of a broadcast [batch, rows, cols] float32 view.
struct View {
  Address address;
  std::array<std::int64_t, 3> strides;
  operator inr::Plane() const {
    return {reinterpret_cast<const float*>(address), strides[0], strides[1], strides[2]};
  }
};

[[noreturn]] void out_of_memory(const std::string& message) {
  py::set_error(PyExc_MemoryError, message.c_str());
  throw py::error_already_set();
}

// Of inr::take, as a buffer: a tensor that is made of it gives it back.
struct Memory {
  explicit Memory(std::size_t bytes) : data(inr::take(bytes)), bytes(bytes) {
    if (!data) out_of_memory("no " + std::to_string(bytes) + " bytes of memory to be had");
  }
  Memory(const Memory&) = delete;
  ~Memory() { inr::give_back(data, bytes); }
  void* data;
  std::size_t bytes;
};

void check(inr::Status status) {
  switch (status) {
    case inr::Status::ok: return;
    case inr::Status::out_of_memory: out_of_memory("no memory for what the kernel works in");
    case inr::Status::row_outside_band: throw py::value_error("a query reads a row outside the hoisted band");
#ifdef INR_HAVE_CUDA
    case inr::Status::cuda_failed: throw std::runtime_error(std::string("CUDA: ") + inr::cuda_failure());
#else
    case inr::Status::cuda_failed: return;  // nothing here that could
#endif
    case inr::Status::unsupported_type: throw py::value_error("this processor's build has no kernel for that dtype");
  }
}

std::vector<void*> pointers(const std::vector<Address>& addresses) {
  std::vector<void*> out;
  for (Address a : addresses) out.push_back(reinterpret_cast<void*>(a));
  return out;
}

// One problem with everything that its struct points to.
class LocalImplicit {
 public:
  LocalImplicit(int type, std::array<std::int64_t, 3> queries, std::array<std::int64_t, 2> size,
                std::array<std::int64_t, 2> band, bool local_ensemble, bool ensemble_first,
                std::vector<std::int64_t> widths, std::pair<Address, std::array<std::int64_t, 3>> y,
                std::pair<Address, std::array<std::int64_t, 3>> x,
                std::pair<Address, std::array<std::int64_t, 4>> cell, Address centre_y, Address centre_x,
                Address hoisted, Address position_weight, const std::vector<Address>& weights,
                const std::vector<Address>& biases, int threads)
      : type_(static_cast<inr::Type>(type)), widths_(std::move(widths)), weights_(pointers(weights)),
        biases_(pointers(biases)) {
    p_.batch = queries[0], p_.rows = queries[1], p_.cols = queries[2];
    p_.height = size[0], p_.width = size[1];
    p_.band_start = band[0], p_.band_rows = band[1];
    p_.local_ensemble = local_ensemble, p_.ensemble_first = ensemble_first;
    p_.depth = std::int64_t(weights_.size());
    p_.widths = widths_.data();
    p_.y = View{y.first, y.second};
    p_.x = View{x.first, x.second};
    const auto& c = cell.second;
    p_.cell_y = View{cell.first, {c[0], c[1], c[2]}};
    p_.cell_x = View{cell.first ? cell.first + sizeof(float) * std::size_t(c[3]) : 0, {c[0], c[1], c[2]}};
    p_.centre_y = reinterpret_cast<const float*>(centre_y);
    p_.centre_x = reinterpret_cast<const float*>(centre_x);
    p_.hoisted = reinterpret_cast<const void*>(hoisted);
    p_.position_weight = reinterpret_cast<const void*>(position_weight);
    p_.weights = weights_.data();
    p_.biases = biases_.data();
    p_.threads = threads;
  }

  void forward(Address out) {
    check([&] {
      py::gil_scoped_release released;
      return inr::local_implicit_forward(type_, p_, reinterpret_cast<void*>(out));
    }());
  }

#ifdef INR_HAVE_CUDA
  std::size_t workspace_cuda() { return inr::local_implicit_workspace_cuda(p_); }

  void forward_cuda(bool wgmma, Address out, Address workspace, Address stream) {
    check([&] {
      py::gil_scoped_release released;
      return inr::local_implicit_forward_cuda(type_, p_, wgmma, reinterpret_cast<void*>(out),
                                              reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream));
    }());
  }
#endif

  void backward(Address grad_out, Address hoisted, Address position_weight, const std::vector<Address>& weights,
                const std::vector<Address>& biases) {
    const std::vector<void*> w = pointers(weights), b = pointers(biases);
    const inr::LocalImplicitGradients grads{reinterpret_cast<void*>(hoisted),
                                            reinterpret_cast<void*>(position_weight),
                                            w.empty() ? nullptr : w.data(), b.empty() ? nullptr : b.data()};
    check([&] {
      py::gil_scoped_release released;
      return inr::local_implicit_backward(type_, p_, reinterpret_cast<const void*>(grad_out), grads);
    }());
  }

 private:
  inr::Type type_;
  inr::LocalImplicit p_{};
  std::vector<std::int64_t> widths_;
  std::vector<void*> weights_, biases_;
};

// One problem with everything that its struct points to.
class ElementwiseFilter {
 public:
  ElementwiseFilter(int type, std::array<std::int64_t, 4> size, std::int64_t groups,
                    std::array<std::int64_t, 2> out_size, std::array<std::int64_t, 2> kernel_size,
                    std::vector<std::int64_t> dilations, std::int64_t stride, std::int64_t upscale, int padding,
                    int normalize, std::array<double, 3> coefficients, Address x,
                    std::pair<Address, std::array<std::int64_t, 4>> kernel, Address log_window, int threads)
      : type_(static_cast<inr::Type>(type)), dilations_(std::move(dilations)) {
    p_.batch = size[0], p_.channels = size[1], p_.height = size[2], p_.width = size[3];
    p_.groups = groups;
    p_.out_height = out_size[0], p_.out_width = out_size[1];
    p_.kernel_height = kernel_size[0], p_.kernel_width = kernel_size[1];
    p_.dilations = dilations_.data();
    p_.dilation_count = std::int64_t(dilations_.size());
    p_.stride = stride, p_.upscale = upscale;
    p_.padding = static_cast<inr::Padding>(padding);
    p_.normalize = static_cast<inr::Normalize>(normalize);
    p_.alpha = coefficients[0], p_.beta = coefficients[1], p_.gamma = coefficients[2];
    p_.x = reinterpret_cast<const void*>(x);
    p_.kernel = reinterpret_cast<const void*>(kernel.first);
    for (int i = 0; i < 4; ++i) p_.kernel_strides[i] = kernel.second[std::size_t(i)];
    p_.log_window = reinterpret_cast<const double*>(log_window);
    p_.threads = threads;
  }

  void forward(Address out) {
    check([&] {
      py::gil_scoped_release released;
      return inr::elementwise_filter_forward(type_, p_, reinterpret_cast<void*>(out));
    }());
  }

  void backward(Address grad_out, Address x, Address kernel) {
    check([&] {
      py::gil_scoped_release released;
      return inr::elementwise_filter_backward(type_, p_, reinterpret_cast<const void*>(grad_out),
                                              reinterpret_cast<void*>(x), reinterpret_cast<void*>(kernel));
    }());
  }

 private:
  inr::Type type_;
  inr::ElementwiseFilter p_{};
  std::vector<std::int64_t> dilations_;
};

class UnmaskAttention {
 public:
  UnmaskAttention(int type, std::array<std::int64_t, 3> size, double scale, bool mask_keys, Address feat,
                  Address weight, int threads)
      : type_(static_cast<inr::Type>(type)),
        p_{size[0], size[1], size[2], scale, mask_keys, reinterpret_cast<const void*>(feat),
           reinterpret_cast<const void*>(weight), threads} {}

  void forward(Address out, Address softmax) {
    check([&] {
      py::gil_scoped_release released;
      return inr::unmask_attention_forward(type_, p_, reinterpret_cast<void*>(out), reinterpret_cast<void*>(softmax));
    }());
  }

  void backward(Address out, Address softmax, Address grad_out, Address grad_feat) {
    check([&] {
      py::gil_scoped_release released;
      return inr::unmask_attention_backward(type_, p_, reinterpret_cast<const void*>(out),
                                            reinterpret_cast<const void*>(softmax),
                                            reinterpret_cast<const void*>(grad_out),
                                            reinterpret_cast<void*>(grad_feat));
    }());
  }

 private:
  inr::Type type_;
  inr::UnmaskAttention p_;
};

// (length, kernel, dilation, stride, causal)
using Axis = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool>;
inr::Axis axis(const Axis& a) {
  return {std::get<0>(a), std::get<1>(a), std::get<2>(a), std::get<3>(a), std::get<4>(a)};
}

// (address, strides of batch, height, width, heads)
using Tokens = std::pair<Address, std::array<std::int64_t, 4>>;
inr::Tokens tokens(const Tokens& t) {
  const auto& s = t.second;
  return {reinterpret_cast<const void*>(t.first), {s[0], s[1], s[2], s[3]}};
}

class NeighborhoodAttention {
 public:
  NeighborhoodAttention(int type, std::int64_t batch, std::int64_t heads, std::int64_t dim, const Axis& y,
                        const Axis& x, double scale, const Tokens& query, const Tokens& key, const Tokens& value,
                        Address bias, int threads)
      : type_(static_cast<inr::Type>(type)),
        p_{batch, heads, dim, axis(y), axis(x), scale, tokens(query), tokens(key), tokens(value),
           reinterpret_cast<const void*>(bias), threads} {}

  void forward(const Tokens& out, Address lse) {
    check([&] {
      py::gil_scoped_release released;
      return inr::neighborhood_attention_forward(type_, p_, tokens(out), reinterpret_cast<void*>(lse));
    }());
  }

  void backward(Address lse, const Tokens& grad_out, Address grad_lse, const Tokens& query, const Tokens& key,
                const Tokens& value, Address bias) {
    const inr::NeighborhoodAttentionGradients grads{tokens(query), tokens(key), tokens(value),
                                                    reinterpret_cast<void*>(bias)};
    check([&] {
      py::gil_scoped_release released;
      return inr::neighborhood_attention_backward(type_, p_, reinterpret_cast<const void*>(lse), tokens(grad_out),
                                                  reinterpret_cast<const void*>(grad_lse), grads);
    }());
  }

 private:
  inr::Type type_;
  inr::NeighborhoodAttention p_;
};


void spectrum_product(int type, std::array<std::int64_t, 5> size, Address x, Address weight, Address shift, bool relu,
                      Address out, int threads) {
  const inr::SpectrumProduct p{size[0], size[1], size[2], size[3], size[4], reinterpret_cast<const void*>(x),
                               reinterpret_cast<const void*>(weight), reinterpret_cast<const void*>(shift), relu,
                               threads};
  check([&] {
    py::gil_scoped_release released;
    return inr::spectrum_product(static_cast<inr::Type>(type), p, reinterpret_cast<void*>(out));
  }());
}

// x: (address, channels, batch stride) of both inputs.
void conv3x3(int type, std::array<std::int64_t, 3> size, std::array<std::array<std::int64_t, 3>, 2> x,
             std::int64_t outputs, int padding, Address weight, Address bias, Address add, bool relu, Address out,
             int threads) {
  const inr::Conv3x3 p{size[0], size[1], size[2], {x[0][1], x[1][1]}, outputs, static_cast<inr::Padding>(padding),
                       {reinterpret_cast<const void*>(x[0][0]), reinterpret_cast<const void*>(x[1][0])},
                       {x[0][2], x[1][2]}, reinterpret_cast<const void*>(weight), reinterpret_cast<const void*>(bias),
                       reinterpret_cast<const void*>(add), relu, threads};
  check([&] {
    py::gil_scoped_release released;
    return inr::conv3x3(static_cast<inr::Type>(type), p, reinterpret_cast<void*>(out));
  }());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("cuda_archs") = std::string(INR_CUDA_ARCHS);
  m.attr("max_depth") = inr::max_depth;
  m.def("isa", &inr::isa);
  m.def("release_memory", &inr::release_memory);
  py::class_<Memory>(m, "Memory", py::buffer_protocol())
      .def(py::init<std::size_t>(), py::arg("bytes"))
      .def_buffer([](Memory& memory) {
        return py::buffer_info(static_cast<std::uint8_t*>(memory.data), std::int64_t(memory.bytes));
      });
  m.def("has_openmp", &inr::has_openmp);
  py::class_<LocalImplicit>(m, "LocalImplicit")
      .def(py::init<int, std::array<std::int64_t, 3>, std::array<std::int64_t, 2>, std::array<std::int64_t, 2>, bool,
                    bool, std::vector<std::int64_t>, std::pair<Address, std::array<std::int64_t, 3>>,
                    std::pair<Address, std::array<std::int64_t, 3>>,
                    std::pair<Address, std::array<std::int64_t, 4>>, Address, Address, Address, Address,
                    std::vector<Address>, std::vector<Address>, int>(),
           py::kw_only(), py::arg("type"), py::arg("queries"), py::arg("size"), py::arg("band"),
           py::arg("local_ensemble"), py::arg("ensemble_first"), py::arg("widths"), py::arg("y"), py::arg("x"),
           py::arg("cell"), py::arg("centre_y"), py::arg("centre_x"), py::arg("hoisted"), py::arg("position_weight"),
           py::arg("weights"), py::arg("biases"), py::arg("threads"))
#ifdef INR_HAVE_CUDA
      .def("workspace_cuda", &LocalImplicit::workspace_cuda)
      .def("forward_cuda", &LocalImplicit::forward_cuda, py::arg("wgmma"), py::arg("out"), py::arg("workspace"),
           py::arg("stream"))
#endif
      .def("forward", &LocalImplicit::forward, py::arg("out"))
      .def("backward", &LocalImplicit::backward, py::kw_only(), py::arg("grad_out"), py::arg("hoisted"),
           py::arg("position_weight"), py::arg("weights"), py::arg("biases"));
  py::class_<ElementwiseFilter>(m, "ElementwiseFilter")
      .def(py::init<int, std::array<std::int64_t, 4>, std::int64_t, std::array<std::int64_t, 2>,
                    std::array<std::int64_t, 2>, std::vector<std::int64_t>, std::int64_t, std::int64_t, int, int,
                    std::array<double, 3>, Address, std::pair<Address, std::array<std::int64_t, 4>>, Address, int>(),
           py::kw_only(), py::arg("type"), py::arg("size"), py::arg("groups"), py::arg("out_size"),
           py::arg("kernel_size"), py::arg("dilations"), py::arg("stride"), py::arg("upscale"), py::arg("padding"),
           py::arg("normalize"), py::arg("coefficients"), py::arg("x"), py::arg("kernel"), py::arg("log_window"),
           py::arg("threads"))
      .def("forward", &ElementwiseFilter::forward, py::arg("out"))
      .def("backward", &ElementwiseFilter::backward, py::kw_only(), py::arg("grad_out"), py::arg("x"),
           py::arg("kernel"));
  py::class_<UnmaskAttention>(m, "UnmaskAttention")
      .def(py::init<int, std::array<std::int64_t, 3>, double, bool, Address, Address, int>(), py::kw_only(),
           py::arg("type"), py::arg("size"), py::arg("scale"), py::arg("mask_keys"), py::arg("feat"),
           py::arg("weight"), py::arg("threads"))
      .def("forward", &UnmaskAttention::forward, py::kw_only(), py::arg("out"), py::arg("softmax"))
      .def("backward", &UnmaskAttention::backward, py::kw_only(), py::arg("out"), py::arg("softmax"),
           py::arg("grad_out"), py::arg("grad_feat"));
  py::class_<NeighborhoodAttention>(m, "NeighborhoodAttention")
      .def(py::init<int, std::int64_t, std::int64_t, std::int64_t, Axis, Axis, double, Tokens, Tokens, Tokens, Address,
                    int>(),
           py::kw_only(), py::arg("type"), py::arg("batch"), py::arg("heads"), py::arg("dim"), py::arg("y"),
           py::arg("x"), py::arg("scale"), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("bias"),
           py::arg("threads"))
      .def("forward", &NeighborhoodAttention::forward, py::kw_only(), py::arg("out"), py::arg("lse"))
      .def("backward", &NeighborhoodAttention::backward, py::kw_only(), py::arg("lse"), py::arg("grad_out"),
           py::arg("grad_lse"), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("bias"));
  m.def("spectrum_product", &spectrum_product, py::kw_only(), py::arg("type"), py::arg("size"), py::arg("x"),
        py::arg("weight"), py::arg("shift"), py::arg("relu"), py::arg("out"), py::arg("threads"));
  m.def("conv3x3", &conv3x3, py::kw_only(), py::arg("type"), py::arg("size"), py::arg("x"), py::arg("outputs"),
        py::arg("padding"), py::arg("weight"), py::arg("bias"), py::arg("add"), py::arg("relu"), py::arg("out"),
        py::arg("threads"));
}
