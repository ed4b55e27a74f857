#include "cuda/hopper.cuh"

#include <array>
#include <deque>

namespace inr {
namespace cuda {
namespace {

struct Copy {
  char* to;
  const char* from;
  unsigned bytes;
  Barrier* barrier;
};

struct Product {
  float* d;
  const unsigned* a;
  std::uint64_t b;
  ToFloat to_float;
  std::array<unsigned, 4> a_at_start;
};

struct Sum {
  float* d;
  std::array<float, 128> value;  // of d after all products
  std::size_t pending;
};

struct Thread {
  bool fenced = false;
  std::vector<Sum> sums;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
};

struct Warpgroup {
  std::vector<std::uint64_t> products;  // their descriptors, in order
  std::size_t issued[4] = {};
};

struct Cluster {
  std::vector<Copy> copies;
  std::vector<Thread> threads;
  std::vector<Warpgroup> groups;
};

Cluster& cluster() {
  std::shared_ptr<void>& state = machine::cluster_state();
  if (!state) {
    const auto made = std::make_shared<Cluster>();
    made->threads.resize(machine::thread_count());
    made->groups.resize(machine::thread_count() / 128);
    state = made;
  }
  return *static_cast<Cluster*>(state.get());
}

const char* check_nothing_pending() {
  if (!cluster().copies.empty()) return "a block ends with a pending copy to a block";
  for (const Thread& thread : cluster().threads)
    if (!thread.sums.empty()) return "a thread ends with pending products";
  return nullptr;
}
const bool checked = (machine::final_check = check_nothing_pending, true);

Thread& self() { return cluster().threads[machine::thread()]; }
Warpgroup& group() { return cluster().groups[machine::thread() / 128]; }

template <class V>
V* on_rank(V& shared, unsigned rank) {
  const std::ptrdiff_t offset = reinterpret_cast<char*>(&shared) - machine::shared_memory();
  return reinterpret_cast<V*>(machine::shared_memory(rank) + offset);
}

void check(const Barrier& b) {
  if (b.bytes == -1) machine::fail("the barrier is not initialized");
}

void complete_if_all_arrived(Barrier& b) {
  if (b.missing || b.bytes) return;
  b.parity ^= 1;
  b.missing = b.arrivals;
}

void arrive_here(Barrier& b, unsigned bytes) {
  check(b);
  if (!b.missing) machine::fail("more arrivals than the barrier expects");
  b.bytes += bytes;
  --b.missing;
  complete_if_all_arrived(b);
}

void deliver(Barrier& b) {
  auto& copies = cluster().copies;
  for (std::size_t i = 0; i < copies.size();) {
    if (copies[i].barrier != &b) {
      ++i;
      continue;
    }
    std::memcpy(copies[i].to, copies[i].from, copies[i].bytes);
    b.bytes -= copies[i].bytes;
    copies.erase(copies.begin() + std::ptrdiff_t(i));
    complete_if_all_arrived(b);
  }
}

// The address of element (k, n) of a [16, n] matrix of 2-byte elements with contiguous k, in the canonical layouts of
// PTX's "Asynchronous Warpgroup Level Matrix Shared Memory Layout", in bytes
//   none: ((8, n), (8, 2)) : ((16, stride), (2, leading))      swizzled: ((8, n), (8, 2)) : ((span, stride), (2, 16))
// span = 128, 64, 32; address bits 4 ... (3, 2 or 1 of them) are xored with those 3 positions higher.
unsigned element(std::uint64_t descriptor, unsigned k, unsigned n) {
  const unsigned start = (descriptor & 0x3fff) << 4, mode = descriptor >> 62;
  const unsigned leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 49 & 7) machine::fail("patterns with a base offset are not emulated");
  if (mode == 0) return start + n % 8 * 16 + n / 8 * stride + k % 8 * 2 + k / 8 * leading;
  const unsigned bits = 4 - mode;
  const unsigned address = start + n % 8 * (16u << bits) + n / 8 * stride + k * 2;
  return address ^ (address >> 7 & ((1u << bits) - 1)) << 4;
}

// One product of a warp. Lane 4 g + t of warp w holds rows 16 w + g and 16 w + g + 8: d[4 j + i] is row g + i / 2 * 8,
// column 8 j + 2 t + i % 2; a has the layout of mma.sync.
void multiply(machine::Lanes& lanes) {
  static float a[16][16], b[16][256];
  const Product& first = *static_cast<Product*>(lanes[0]);
  for (unsigned k = 0; k < 16; ++k)
    for (unsigned n = 0; n < 256; ++n) {
      const char* at = machine::shared_memory() + (element(first.b, k, n) - window);
      machine::check_shared(at, 2);
      std::uint16_t bits;
      std::memcpy(&bits, at, 2);
      b[k][n] = first.to_float(bits);
    }
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<Product*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      if (p.a[i] != p.a_at_start[std::size_t(i)]) machine::fail("a register of a pending product was written");
      float* row = a[lane / 4 + i % 2 * 8] + lane % 4 * 2 + i / 2 * 8;
      row[0] = first.to_float(p.a[i] & 0xffff), row[1] = first.to_float(p.a[i] >> 16);
    }
  }
  const unsigned warp_begin = machine::thread() / 32 * 32;
  for (unsigned lane = 0; lane < 32; ++lane) {
    Thread& thread = cluster().threads[warp_begin + lane];
    for (Sum& sum : thread.sums) {
      if (sum.d != static_cast<Product*>(lanes[lane])->d) continue;
      for (unsigned i = 0; i < 128; ++i) {
        const float* row = a[lane / 4 + i % 4 / 2 * 8];
        const unsigned column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        sum.value[i] = machine::add_products(sum.value[i], row, &b[0][column], 256, 16);
      }
      --sum.pending;
    }
  }
}

}  // namespace

void initialize(Barrier& b, unsigned arrivals) {
  machine::check_shared(&b, sizeof b);
  b.arrivals = b.missing = arrivals;
  b.parity = 0, b.bytes = 0;
}

void arrive(Barrier& b) { arrive_here(b, 0); }
void arrive_expecting(Barrier& b, unsigned bytes) { arrive_here(b, bytes); }
void arrive_remote(Barrier& b, unsigned rank) { arrive_here(*on_rank(b, rank), 0); }

void wait(Barrier& b, unsigned parity) {
  check(b);
  machine::wait([&b, parity] {
    if (b.parity == parity) deliver(b);
    return b.parity != parity;
  });
}

void copy_to_blocks(void* shared, const void* global, unsigned bytes, Barrier& b, unsigned short mask) {
  machine::check_shared(shared, bytes);
  if ((reinterpret_cast<std::uintptr_t>(global) | shared_address(shared) | bytes) % 16)
    machine::fail("misaligned copy");
  for (unsigned rank = 0; mask >> rank; ++rank) {
    if (!(mask >> rank & 1)) continue;
    char* to = on_rank(*static_cast<char*>(shared), rank);
    std::memset(to, 0xff, bytes);
    cluster().copies.push_back({to, static_cast<const char*>(global), bytes, on_rank(b, rank)});
  }
}

void fence_products() { self().fenced = true; }

void begin_product(float (&d)[32][4], const unsigned (&a)[4], std::uint64_t b, ToFloat to_float) {
  Thread& thread = self();
  if (!thread.fenced) machine::fail("a product without a preceding fence");
  Sum* sum = nullptr;
  for (Sum& s : thread.sums)
    if (s.d == d[0]) sum = &s;
  if (!sum) {
    thread.sums.push_back({d[0], {}, 0});
    sum = &thread.sums.back();
    std::memcpy(sum->value.data(), d, sizeof d);
    std::memset(d, 0xff, sizeof d);
  }
  ++sum->pending;
  thread.open.push_back({d[0], a, b, to_float, {a[0], a[1], a[2], a[3]}});
  if (machine::thread() % 32) return;
  Warpgroup& all = group();
  std::size_t& issued = all.issued[machine::thread() % 128 / 32];
  if (issued < all.products.size() ? all.products[issued] != b : (all.products.push_back(b), false))
    machine::fail("the warps of a warpgroup multiply by different matrices");
  ++issued;
}

void commit_products() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void wait_for_products(std::size_t groups_left) {
  Thread& thread = self();
  machine::wait([all = &group(), mine = group().issued[machine::thread() % 128 / 32]] {
    for (std::size_t issued : all->issued)
      if (issued < mine) return false;
    return true;
  });
  for (; thread.groups.size() > groups_left; thread.groups.pop_front())
    for (Product& p : thread.groups.front()) machine::warp_synchronize("wgmma", &p, multiply);
  thread.fenced = false;
  for (std::size_t i = 0; i < thread.sums.size();) {
    Sum& sum = thread.sums[i];
    for (int j = 0; j < 128; ++j) {
      std::uint32_t bits;
      std::memcpy(&bits, sum.d + j, 4);
      if (bits != ~0u) machine::fail("a sum was written while its products were pending");
    }
    if (sum.pending) {
      ++i;
      continue;
    }
    std::memcpy(sum.d, sum.value.data(), sizeof sum.value);
    thread.sums.erase(thread.sums.begin() + std::ptrdiff_t(i));
  }
}

}  // namespace cuda
}  // namespace inr
