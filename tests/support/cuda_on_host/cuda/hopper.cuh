// What csrc/cuda/hopper.cuh is on the host: each instruction by its definition in the PTX manual.
#pragma once

#include "cuda/ptx.cuh"

namespace inr {
namespace cuda {

// A barrier's state, in the 64 bits that it has.
struct Barrier {
  std::uint64_t arrivals : 20, missing : 20, parity : 1;
  std::int64_t bytes : 23;  // that are expected and have not come
};

// Shared memory begins at an address of its own.
constexpr unsigned window = 1024;
inline unsigned shared_address(const void* shared) {
  return unsigned(static_cast<const char*>(shared) - machine::shared_memory()) + window;
}

inline unsigned cluster_rank() { return machine::cluster_rank(); }
inline void cluster_barrier() { machine::cluster_barrier(); }

void initialize(Barrier&, unsigned arrivals);
inline void publish_barriers() {}
void arrive(Barrier&);
void arrive_expecting(Barrier&, unsigned bytes);
void arrive_at(Barrier&, unsigned rank);
void wait(Barrier&, unsigned parity);
// The bytes come when somebody waits for their barrier; until then their place is NaN.
void copy_to_blocks(void* shared, const void* global, unsigned bytes, Barrier&, unsigned short mask);

template <int registers>
void take_registers() {}
template <int registers>
void leave_registers() {}

// A product reads its matrices, and its sum is there, only when its group is waited for; until then the sum is NaN.
using ToFloat = float (*)(unsigned);
void begin_product(float (&d)[32][4], const unsigned (&a)[4], std::uint64_t b, ToFloat);
template <Type type>
void wgmma(float (&d)[32][4], const unsigned (&a)[4], std::uint64_t b) { begin_product(d, a, b, to_float<type>); }
void fence_products();
void commit_products();
void wait_for_products(std::size_t groups_left);
template <int groups>
void wait_for_products() { wait_for_products(groups); }

}  // namespace cuda
}  // namespace inr
