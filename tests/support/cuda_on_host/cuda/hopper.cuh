// Replaces csrc/cuda/hopper.cuh on the host: each instruction as the PTX manual defines it.
#pragma once

#include "cuda/ptx.cuh"

namespace inr {
namespace cuda {

// The state of a barrier, in 64 bits.
struct Barrier {
  std::uint64_t arrivals : 20, missing : 20, parity : 1;
  std::int64_t bytes : 23;  // expected bytes that have not arrived
};

// The address of the beginning of shared memory in the shared address space.
constexpr unsigned window = 1024;
inline unsigned shared_address(const void* shared) {
  return unsigned(static_cast<const char*>(shared) - machine::shared_memory()) + window;
}

inline unsigned cluster_rank() { return machine::cluster_rank(); }
inline void cluster_barrier() { machine::cluster_barrier(); }

void initialize(Barrier&, unsigned arrivals);
inline void fence_barrier_init() {}
void arrive(Barrier&);
void arrive_expecting(Barrier&, unsigned bytes);
void arrive_remote(Barrier&, unsigned rank);
void wait(Barrier&, unsigned parity);
// The bytes arrive when a thread waits for their barrier; until then the destination is NaN.
void copy_to_blocks(void* shared, const void* global, unsigned bytes, Barrier&, unsigned short mask);

template <int registers>
void increase_registers() {}
template <int registers>
void decrease_registers() {}

// A product reads its matrices and writes its sum when its group is waited for; until then the sum is NaN.
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
