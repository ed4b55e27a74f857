// Entry points for Python; each returns an error message, or nullptr.
#include <exception>
#include <string>

#include "inr.h"
#include "machine.h"

namespace {

template <class Call>
const char* attempt(Call call) {
  static std::string reason;
  try {
    const inr::Status status = call();
    if (status == inr::Status::ok) return nullptr;
    reason = status == inr::Status::cuda_failed ? inr::cuda_failure() : "the entry point did not return ok";
  } catch (const std::exception& error) {
    reason = error.what();
  }
  return reason.c_str();
}

}  // namespace

extern "C" void set_shared_limit(int bytes) { machine::shared_limit = bytes; }

extern "C" void set_order(unsigned seed) { machine::order_seed = seed; }
extern "C" void set_truncating(bool on) { machine::truncating = on; }
extern "C" void clear_launches() { machine::launches.clear(); }
// The launch of this index; nullptr after the last one.
extern "C" const machine::Launch* launch(std::size_t index) {
  return index < machine::launches.size() ? &machine::launches[index] : nullptr;
}

extern "C" std::size_t local_implicit_workspace(const inr::LocalImplicit* p) {
  return inr::local_implicit_workspace_cuda(*p);
}

extern "C" const char* local_implicit_forward(int type, const inr::LocalImplicit* p, bool wgmma, void* out,
                                              void* workspace, void* stream) {
  return attempt([&] {
    return inr::local_implicit_forward_cuda(static_cast<inr::Type>(type), *p, wgmma, out, workspace, stream);
  });
}

extern "C" const char* neighborhood_attention_forward(int type, const inr::NeighborhoodAttention* p,
                                                      const inr::Tokens* out, void* lse, void* stream) {
  return attempt([&] {
    return inr::neighborhood_attention_forward_cuda(static_cast<inr::Type>(type), *p, *out, lse, stream);
  });
}

extern "C" std::int64_t neighborhood_attention_tiles(const inr::NeighborhoodAttention* p) {
  return inr::neighborhood_attention_tiles_cuda(*p);
}

extern "C" const char* neighborhood_attention_backward(int type, const inr::NeighborhoodAttention* p, const void* lse,
                                                       const inr::Tokens* grad_out, const void* grad_lse,
                                                       const inr::NeighborhoodAttentionGradients* gradients, void* delta,
                                                       void* stream) {
  return attempt([&] {
    return inr::neighborhood_attention_backward_cuda(static_cast<inr::Type>(type), *p, lse, *grad_out, grad_lse,
                                                     *gradients, delta, stream);
  });
}

extern "C" const char* elementwise_filter_forward(int type, const inr::ElementwiseFilter* p, const float* log_window,
                                                  void* out, void* stream) {
  return attempt([&] {
    return inr::elementwise_filter_forward_cuda(static_cast<inr::Type>(type), *p, log_window, out, stream);
  });
}

extern "C" const char* elementwise_filter_backward(int type, const inr::ElementwiseFilter* p, const float* log_window,
                                                   const void* grad_out, void* grad_x, void* grad_kernel,
                                                   void* stream) {
  return attempt([&] {
    return inr::elementwise_filter_backward_cuda(static_cast<inr::Type>(type), *p, log_window, grad_out, grad_x,
                                                 grad_kernel, stream);
  });
}
