#include "machine.h"

#include <algorithm>
#include <csetjmp>
#include <deque>
#include <list>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>

#include <pthread.h>
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace machine {

const char* (*final_check)() = nullptr;
int shared_limit = 99 << 10;
std::vector<Launch> launches;
bool truncating = false;
unsigned order_seed = 0;

namespace {

struct Copy {
  char* to;
  const char* from;
  std::size_t bytes;
};

struct Thread {
  ucontext_t start;
  jmp_buf here;
  bool started = false, done = false;
  std::function<bool()> ready;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct SyncPoint {
  unsigned arrived = 0;
  unsigned long round = 0;
};

struct Warp : SyncPoint {
  const char* instruction = nullptr;
  void* lanes[warp];
};

constexpr std::size_t stack_bytes = 256 << 10;
constexpr std::size_t max_in_flight = 3;  // clusters, in random orders

struct Cluster {
  unsigned long number;
  uint3 first;                       // block
  std::vector<Thread> threads;       // of all blocks
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<Warp> warps;
  std::vector<SyncPoint> blocks;
  SyncPoint all;
  std::vector<std::vector<char>> memories;  // of each block
  std::shared_ptr<void> state;
};

Cluster* current;  // of the running thread
unsigned long clusters_begun;
std::size_t memory_bytes;
const std::function<void()>* body;
unsigned running;
ucontext_t entry;
jmp_buf scheduler;
std::string failure;
std::mt19937 generator;

Thread& self() { return current->threads[running]; }

// Tells AddressSanitizer which stack runs next: a thread's, or, for nullptr, the scheduler's.
void switch_stack(const Thread* to) {
#ifdef __SANITIZE_ADDRESS__
  static const void* bottom;
  static std::size_t bytes;
  if (!to) return __sanitizer_start_switch_fiber(nullptr, bottom, bytes);
  __sanitizer_start_switch_fiber(nullptr, to->start.uc_stack.ss_sp, to->start.uc_stack.ss_size);
  pthread_attr_t attributes;
  if (!bottom && !pthread_getattr_np(pthread_self(), &attributes)) {
    void* found;
    pthread_attr_getstack(&attributes, &found, &bytes);
    pthread_attr_destroy(&attributes);
    bottom = found;
  }
#else
  (void)to;
#endif
}

// On the stack that was switched to.
void switched() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

// Switches to the scheduler. setjmp and longjmp only exchange registers, without a system call.
[[noreturn]] void leave() {
  switch_stack(nullptr);
  _longjmp(scheduler, 1);
}
__attribute__((noinline)) void yield() {
  if (!_setjmp(self().here)) leave();
  switched();
}

void begin() {
  switched();
  (*body)();
  for (const auto& group : self().groups)
    if (!group.empty()) fail("a thread ends with pending copies");
  if (!self().open.empty()) fail("a thread ends with pending copies");
  self().done = true;
  leave();
}

__attribute__((noinline)) void resume(unsigned i) {
  running = i;
  threadIdx = {i % blockDim.x, 0, 0};
  blockIdx = {current->first.x + cluster_rank(), current->first.y, current->first.z};
  if (_setjmp(scheduler)) return switched();
  switch_stack(&self());
  if (self().started) _longjmp(self().here, 1);
  self().started = true;
  swapcontext(&entry, &self().start);
}

// 0, 1, ... n - 1, or in random order.
std::vector<unsigned> order_of(std::size_t n) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (order_seed) std::shuffle(order.begin(), order.end(), generator);
  return order;
}

// Runs a warp until it has to wait. Returns whether one of its threads ran.
bool run_warp(Cluster& c, unsigned w) {
  current = &c;
  bool moved = false;
  for (bool more = true; more;) {
    more = false;
    for (unsigned i = w * warp; i < (w + 1) * warp; ++i) {
      Thread& t = c.threads[i];
      if (t.done || (t.ready && !t.ready())) continue;
      t.ready = nullptr;
      resume(i);
      if (!failure.empty()) return true;
      more = moved = true;
    }
  }
  return moved;
}

// Runs each warp of the clusters once, or, in random orders, some of them. Returns whether one ran.
bool run_warps(std::list<Cluster>& clusters) {
  std::vector<std::pair<Cluster*, unsigned>> all;
  for (Cluster& c : clusters)
    for (unsigned w = 0; w < c.warps.size(); ++w) all.emplace_back(&c, w);
  if (!order_seed && clusters.front().number % 2 == 0) std::reverse(all.begin(), all.end());
  std::size_t left = order_seed ? 1 + generator() % all.size() : all.size();
  bool moved = false;
  for (unsigned i : order_of(all.size())) {
    if (!run_warp(*all[i].first, all[i].second)) continue;
    moved = true;
    if (!failure.empty() || !--left) break;
  }
  return moved;
}

// Waits until `size` threads have arrived; returns true for the last one, which must call `release`.
bool arrive(SyncPoint& point, unsigned size) {
  if (++point.arrived == size) return true;
  wait([&point, round = point.round] { return point.round != round; });
  return false;
}

void release(SyncPoint& point) {
  point.arrived = 0;
  ++point.round;
}

}  // namespace

void fail(const char* why) {
  failure = why;
  leave();
}

void wait(const std::function<bool()>& ready) {
  self().ready = ready;
  yield();
}

void block_barrier() {
  SyncPoint& block = current->blocks[cluster_rank()];
  if (arrive(block, blockDim.x)) release(block);
}

void cluster_barrier() {
  if (arrive(current->all, thread_count())) release(current->all);
}

void warp_synchronize(const char* instruction, void* mine, void (*work)(Lanes&)) {
  Warp& w = current->warps[running / warp];
  if (w.arrived && w.instruction != instruction) fail("the lanes of a warp execute different collective instructions");
  w.instruction = instruction;
  w.lanes[running % warp] = mine;
  if (arrive(w, warp)) {
    work(w.lanes);
    release(w);
  }
}

namespace {
char* base(unsigned rank) {
  char* memory = current->memories.at(rank).data();
  return memory + (-reinterpret_cast<std::uintptr_t>(memory) & 1023);
}
}  // namespace

std::shared_ptr<void>& cluster_state() { return current->state; }
unsigned thread() { return running; }
unsigned thread_count() { return unsigned(current->threads.size()); }
unsigned cluster_rank() { return running / blockDim.x; }

char* shared_memory(unsigned rank) {
  bool ended = true;
  for (unsigned i = rank * blockDim.x; i < (rank + 1) * blockDim.x; ++i) ended = ended && current->threads[i].done;
  if (ended) fail("access to the shared memory of a block that has ended");
  return base(rank);
}
char* shared_memory() { return base(cluster_rank()); }

void check_shared(const void* address, std::size_t bytes) {
  const char* begin = static_cast<const char*>(address);
  if (begin < shared_memory() || begin + bytes > shared_memory() + memory_bytes) fail("access outside shared memory");
}

void copy_async(void* to, const void* from, std::size_t bytes) {
  check_shared(to, bytes);
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % bytes) fail("misaligned copy");
  std::memset(to, 0xff, bytes);
  self().open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes});
}

float truncated(float sum, const float* a, const float* b, unsigned step, unsigned count) {
  constexpr unsigned block = 8;
  for (unsigned first = 0; first < count; first += block) {
    double terms[block + 1] = {sum}, largest = std::fabs(sum);
    for (unsigned i = 0; i < block; ++i) {
      terms[i + 1] = double(a[first + i]) * b[(first + i) * step];
      if (std::isnan(terms[i + 1]) || std::fabs(terms[i + 1]) > largest) largest = std::fabs(terms[i + 1]);
    }
    double total = 0;
    if (std::isfinite(largest) && largest > 0) {
      const double unit = std::ldexp(1.0, std::ilogb(largest) + 1 - 24);
      for (double term : terms) total += std::trunc(term / unit) * unit;
    } else {
      for (double term : terms) total += term;
    }
    sum = float(total);
    if (std::fabs(sum) > std::fabs(total)) sum = std::nextafterf(sum, 0);
  }
  return sum;
}

void commit_copies() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void wait_for_copies(std::size_t groups_left) {
  for (auto& groups = self().groups; groups.size() > groups_left; groups.pop_front())
    for (const Copy& c : groups.front()) std::memcpy(c.to, c.from, c.bytes);
}

namespace {

// Initialises the threads and the shared memory of a cluster of `size` blocks, which begins with block `b` of the grid.
__attribute__((noinline)) void prepare(Cluster& c, unsigned b, unsigned size) {
  c.number = ++clusters_begun;
  c.first = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
  c.memories.assign(size, std::vector<char>(memory_bytes + 1024, char(0xff)));
  c.threads = std::vector<Thread>(size * blockDim.x);
  c.warps.assign(c.threads.size() / warp, {});
  c.blocks.assign(size, {});
  c.all = {};
  c.state = nullptr;
  c.stacks.resize(c.threads.size());
  for (std::size_t i = 0; i < c.stacks.size(); ++i) {
    if (!c.stacks[i]) c.stacks[i].reset(new char[stack_bytes]);
    getcontext(&c.threads[i].start);
    c.threads[i].start.uc_stack.ss_sp = c.stacks[i].get();
    c.threads[i].start.uc_stack.ss_size = stack_bytes;
    makecontext(&c.threads[i].start, begin, 0);
  }
}

bool has_ended(const Cluster& c) {
  return std::all_of(c.threads.begin(), c.threads.end(), [](const Thread& t) { return t.done; });
}

// Throws std::runtime_error if a cluster that has ended left something undone.
void check_ended(Cluster& c) {
  current = &c;
  if (const char* wrong = final_check ? final_check() : nullptr) throw std::runtime_error(wrong);
}

}  // namespace

void launch(dim3 grid, dim3 size, std::size_t shared_bytes, const std::function<void()>& kernel,
            unsigned cluster_size) {
  if (size.x % warp || size.y * size.z != 1) throw std::runtime_error("blocks must be whole warps along x");
  if (grid.x % cluster_size) throw std::runtime_error("the grid must be whole clusters");
  gridDim = grid, blockDim = size;
  body = &kernel;
  memory_bytes = shared_bytes;
  failure.clear();
  generator.seed(order_seed);
  const std::vector<unsigned> order = order_of(grid.x * grid.y * grid.z / cluster_size);
  auto next = order.begin();
  std::list<Cluster> clusters(std::min(order_seed ? max_in_flight : 1, order.size()));
  for (Cluster& c : clusters) prepare(c, *next++ * cluster_size, cluster_size);
  while (!clusters.empty()) {
    const bool moved = run_warps(clusters);
    if (!failure.empty()) throw std::runtime_error(failure);
    if (!moved) throw std::runtime_error("deadlock: the block waits forever");
    for (auto c = clusters.begin(); c != clusters.end();) {
      if (!has_ended(*c)) {
        ++c;
        continue;
      }
      check_ended(*c);
      if (next == order.end()) c = clusters.erase(c);
      else prepare(*c++, *next++ * cluster_size, cluster_size);
    }
  }
}

}  // namespace machine
