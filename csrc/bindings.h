// What all bindings share, for bindings.cpp: conversions from Python, the memory pool, and calls that raise.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/memory.h"
#include "common/threads.h"
#include "cpu/entries.h"
#include "inr.h"

#ifndef INR_CUDA_ARCHS
#define INR_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace {

// An int in Python, a pointer of any type in C++; 0 is nullptr.
struct Address {
  std::uintptr_t value;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

template <std::size_t n>
using Sizes = std::array<std::int64_t, n>;
template <std::size_t n>
using Strided = std::pair<Address, Sizes<n>>;  // (address, strides)
using AxisTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool>;

Address to_address(const std::uintptr_t& value) { return {value}; }
template <class Enum>
Enum to_enum(const int& value) {
  return Enum(value);
}
// (address, strides of batch, row, column)
inr::Plane to_plane(const Strided<3>& p) { return {p.first, p.second[0], p.second[1], p.second[2]}; }
// (address, strides of batch, depth, height, width, heads)
inr::Tokens to_tokens(const Strided<5>& t) {
  return {t.first, {t.second[0], t.second[1], t.second[2], t.second[3], t.second[4]}};
}
// (query, key, value, bias)
using AttentionGradientsTuple = std::tuple<Strided<5>, Strided<5>, Strided<5>, Address>;
inr::NeighborhoodAttentionGradients to_attention_gradients(const AttentionGradientsTuple& g) {
  return {to_tokens(std::get<0>(g)), to_tokens(std::get<1>(g)), to_tokens(std::get<2>(g)), std::get<3>(g)};
}
// (queries, length, kernel, dilation, stride, causal)
inr::Axis to_axis(const AxisTuple& a) {
  return std::apply([](auto... fields) { return inr::Axis{fields...}; }, a);
}

}  // namespace

namespace pybind11::detail {

// Loads a Source from Python and converts it to a Target.
template <class Target, class Source, Target (*convert)(const Source&)>
struct converter {
  PYBIND11_TYPE_CASTER(Target, make_caster<Source>::name);
  bool load(handle object, bool implicit) {
    make_caster<Source> source;
    if (!source.load(object, implicit)) return false;
    value = convert(cast_op<const Source&>(source));
    return true;
  }
};

template <>
struct type_caster<Address> : converter<Address, std::uintptr_t, to_address> {};
template <>
struct type_caster<inr::Type> : converter<inr::Type, int, to_enum> {};
template <>
struct type_caster<inr::Padding> : converter<inr::Padding, int, to_enum> {};
template <>
struct type_caster<inr::Activation> : converter<inr::Activation, int, to_enum> {};
template <>
struct type_caster<inr::Normalize> : converter<inr::Normalize, int, to_enum> {};
template <>
struct type_caster<inr::Plane> : converter<inr::Plane, Strided<3>, to_plane> {};
template <>
struct type_caster<inr::Tokens> : converter<inr::Tokens, Strided<5>, to_tokens> {};
template <>
struct type_caster<inr::NeighborhoodAttentionGradients>
    : converter<inr::NeighborhoodAttentionGradients, AttentionGradientsTuple, to_attention_gradients> {};
template <>
struct type_caster<inr::Axis> : converter<inr::Axis, AxisTuple, to_axis> {};

}  // namespace pybind11::detail

namespace {

[[noreturn]] void out_of_memory(const std::string& message) {
  py::set_error(PyExc_MemoryError, message.c_str());
  throw py::error_already_set();
}

// A buffer of the memory pool; a tensor that is created from it keeps it alive.
struct Memory {
  explicit Memory(std::size_t bytes) : data(inr::allocate(bytes)), bytes(bytes) {
    if (!data) out_of_memory("cannot allocate " + std::to_string(bytes) + " bytes");
  }
  Memory(const Memory&) = delete;
  ~Memory() { inr::deallocate(data, bytes); }
  void* data;
  std::size_t bytes;
};

void check(inr::Status status) {
  switch (status) {
    case inr::Status::ok: return;
    case inr::Status::out_of_memory: out_of_memory("cannot allocate the kernel's working memory");
    case inr::Status::row_outside_band: throw py::value_error("a query reads a row outside the hoisted band");
#ifdef INR_HAVE_CUDA
    case inr::Status::cuda_failed: throw std::runtime_error(std::string("CUDA: ") + inr::cuda_failure());
#else
    case inr::Status::cuda_failed: return;  // cannot happen in a build without CUDA
#endif
    case inr::Status::unsupported_type: throw py::value_error("this processor's build has no kernel for that dtype");
  }
}

// Calls an entry point without the GIL, and raises if it fails.
template <class... Parameters, class... Arguments>
void call(inr::Status (*entry)(Parameters...), const Arguments&... arguments) {
  check([&] {
    py::gil_scoped_release released;
    return entry(arguments...);
  }());
}

}  // namespace
