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
    if (call() == inr::Status::ok) return nullptr;
    reason = "the entry point did not return ok";
  } catch (const std::exception& error) {
    reason = error.what();
  }
  return reason.c_str();
}

}  // namespace

extern "C" void set_shared_limit(int bytes) { machine::shared_limit = bytes; }

extern "C" std::size_t local_implicit_workspace(const inr::LocalImplicit* p) {
  return inr::local_implicit_workspace_cuda(*p);
}

extern "C" const char* local_implicit_forward(int type, const inr::LocalImplicit* p, bool wgmma, void* out,
                                              void* workspace) {
  return attempt([&] {
    return inr::local_implicit_forward_cuda(static_cast<inr::Type>(type), *p, wgmma, out, workspace, nullptr);
  });
}
