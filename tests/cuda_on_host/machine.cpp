#include "machine.h"

#include <csetjmp>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>

#include <ucontext.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace machine {

int shared_limit = 99 << 10;

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

struct Meeting {
  unsigned come = 0;
  unsigned long round = 0;
};

struct Warp : Meeting {
  const char* instruction = nullptr;
  void* lanes[warp];
};

constexpr std::size_t stack_bytes = 256 << 10;

std::vector<Thread> threads;
std::vector<Warp> warps;
Meeting block;
std::vector<char> memory;
std::size_t memory_bytes;
const std::function<void()>* body;
unsigned running;
ucontext_t entry;
jmp_buf scheduler;
std::string failure;

Thread& self() { return threads[running]; }

// A fiber's stack is kept; only registers change, so no system call is made.
__attribute__((noinline)) void leave() {
  if (!_setjmp(self().here)) _longjmp(scheduler, 1);
}

void begin() {
  (*body)();
  for (const auto& group : self().groups)
    if (!group.empty()) fail("a thread ends before its copies");
  if (!self().open.empty()) fail("a thread ends before its copies");
  self().done = true;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume(unsigned i) {
  running = i;
  threadIdx = {i, 0, 0};
  if (_setjmp(scheduler)) return;
  if (self().started) _longjmp(self().here, 1);
  self().started = true;
  swapcontext(&entry, &self().start);
}

// Lets each warp run until it can no more, in every other block the last one first. Whether all threads are done in the end.
bool run_block() {
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned n = 0; n < warps.size(); ++n) {
      const unsigned w = blockIdx.x % 2 ? unsigned(warps.size()) - 1 - n : n;
      for (bool more = true; more;) {
        more = false;
        for (unsigned i = w * warp; i < (w + 1) * warp; ++i) {
          Thread& t = threads[i];
          if (t.done || (t.ready && !t.ready())) continue;
          t.ready = nullptr;
          resume(i);
          if (!failure.empty()) return false;
          more = moved = true;
        }
      }
    }
  }
  for (const Thread& t : threads)
    if (!t.done) return false;
  return true;
}

// True for the last of `size` to come, who then calls `leave_together`.
bool come(Meeting& meeting, unsigned size) {
  if (++meeting.come == size) return true;
  wait([&meeting, round = meeting.round] { return meeting.round != round; });
  return false;
}

void leave_together(Meeting& meeting) {
  meeting.come = 0;
  ++meeting.round;
}

}  // namespace

void fail(const char* why) {
  failure = why;
  _longjmp(scheduler, 1);
}

void wait(const std::function<bool()>& ready) {
  self().ready = ready;
  leave();
}

void block_barrier() {
  if (come(block, unsigned(threads.size()))) leave_together(block);
}

void warp_meets(const char* instruction, void* mine, void (*work)(Lanes&)) {
  Warp& w = warps[running / warp];
  if (w.come && w.instruction != instruction) fail("the lanes of a warp meet in different instructions");
  w.instruction = instruction;
  w.lanes[running % warp] = mine;
  if (come(w, warp)) {
    work(w.lanes);
    leave_together(w);
  }
}

char* shared_memory() { return memory.data() + (-reinterpret_cast<std::uintptr_t>(memory.data()) & 1023); }

void check_shared(const void* address, std::size_t bytes) {
  const char* begin = static_cast<const char*>(address);
  if (begin < shared_memory() || begin + bytes > shared_memory() + memory_bytes) fail("outside shared memory");
}

void copy_async(void* to, const void* from, std::size_t bytes) {
  check_shared(to, bytes);
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % bytes) fail("misaligned copy");
  std::memset(to, 0xff, bytes);
  self().open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes});
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

// The threads of a block before their first instruction, and fresh shared memory.
__attribute__((noinline)) void prepare(std::vector<std::unique_ptr<char[]>>& stacks) {
  memory.assign(memory_bytes + 1024, char(0xff));
  threads = std::vector<Thread>(stacks.size());
  warps.assign(stacks.size() / warp, {});
  block = {};
  failure.clear();
  for (std::size_t i = 0; i < stacks.size(); ++i) {
    getcontext(&threads[i].start);
    threads[i].start.uc_stack.ss_sp = stacks[i].get();
    threads[i].start.uc_stack.ss_size = stack_bytes;
    makecontext(&threads[i].start, begin, 0);
  }
}

}  // namespace

void launch(dim3 grid, dim3 size, std::size_t shared_bytes, const std::function<void()>& kernel) {
  if (size.x % warp || size.y * size.z != 1) throw std::runtime_error("blocks are whole warps, along x");
  gridDim = grid, blockDim = size;
  body = &kernel;
  memory_bytes = shared_bytes;
  std::vector<std::unique_ptr<char[]>> stacks(size.x);
  for (auto& stack : stacks) stack.reset(new char[stack_bytes]);
  for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    prepare(stacks);
    if (!run_block()) throw std::runtime_error(failure.empty() ? "the block waits for ever" : failure);
  }
}

}  // namespace machine
