// Chooses the widest instruction set that was built and that this processor supports.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "../cpu/entries.h"

#if defined(INR_HAVE_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace inr {

#define INR_POINTER(entry) , entry
#define INR_TABLE(isa, supported)                                                            \
  namespace isa {                                                                            \
  static CpuEntries table() { return {#isa, bool(supported) INR_CPU_ENTRIES(INR_POINTER)}; } \
  }

#ifdef INR_HAVE_AMX
// Whether the processor has a tile unit, and Linux lets this process use it.
static bool may_use_tiles() {
#ifdef __linux__
  const char* requested = std::getenv("INR_KERNELS_ISA");
  if (requested && *requested && std::strcmp(requested, "amx")) return false;  // the permission cannot be given back
  unsigned a, b, c, d;
  const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & d >> 24 & 1;  // AMX-BF16 and AMX-TILE
  constexpr long request_permission = 0x1023, tile_data = 18;
  return has && __builtin_cpu_supports("avx512bf16") && !syscall(SYS_arch_prctl, request_permission, tile_data);
#else
  return false;
#endif
}
INR_TABLE(amx, may_use_tiles())
#endif
#ifdef INR_HAVE_AVX512BF16
INR_TABLE(avx512bf16, __builtin_cpu_supports("avx512bf16"))
#endif
#ifdef INR_HAVE_AVX512
INR_TABLE(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
#endif
#ifdef INR_HAVE_AVX2
INR_TABLE(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#endif
INR_TABLE(generic, true)

const CpuEntries& cpu() {
  static const CpuEntries chosen = [] {
    const char* requested = std::getenv("INR_KERNELS_ISA");  // for tests: a narrower set than the widest supported
    for (const CpuEntries& entries : {
#ifdef INR_HAVE_AMX
             amx::table(),
#endif
#ifdef INR_HAVE_AVX512BF16
             avx512bf16::table(),
#endif
#ifdef INR_HAVE_AVX512
             avx512::table(),
#endif
#ifdef INR_HAVE_AVX2
             avx2::table(),
#endif
             generic::table()})
      if (entries.supported && (!requested || !*requested || !std::strcmp(requested, entries.isa))) return entries;
    return generic::table();
  }();
  return chosen;
}

}  // namespace inr
