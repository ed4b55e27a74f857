// A number that tells whether the values of a tensor have changed, at the speed of reading them.
//
// Each lane of a task's vectors is h = rotated(h * odd + word), so a change of one word always changes its lane. Without
// the rotation, changes of the highest bits, as where two numbers change their signs, would cancel.
#include <atomic>

#include "../entries.h"
#include "tasks.h"

namespace inr {
namespace INR_ISA {
namespace {

constexpr std::int64_t chunk = 1 << 16;  // words of a task
constexpr int chains = 4;                // of independent multiplications

INR_INLINE std::uint64_t mixed(std::uint64_t h) {
  h = (h ^ (h >> 32)) * 0xd6e8feb86659fd93u;
  return h ^ (h >> 32);
}

// data: [count]
std::uint64_t of_words(const std::uint32_t* data, std::int64_t count) {
  constexpr int lanes = vector_bytes / 4;
  Words h[chains] = {};
  std::int64_t i = 0;
  for (; i + chains * lanes <= count; i += chains * lanes)
    for (int c = 0; c < chains; ++c) {
      Words w;
      std::memcpy(&w, data + i + c * lanes, sizeof w);
      h[c] = h[c] * 0x9e3779b1u + w;
      h[c] = h[c] << 13 | h[c] >> 19;
    }
  std::uint64_t sum = std::uint64_t(count);
  for (; i < count; ++i) sum = mixed(sum + data[i]);
  for (const Words& v : h)
    for (int l = 0; l < lanes; ++l) sum = mixed(sum + v[l]);
  return sum;
}

}  // namespace

Status fingerprint(const Fingerprint& p, std::uint64_t* out) {
  std::atomic<std::uint64_t> sum{0};
  const auto* data = static_cast<const std::uint32_t*>(p.data);
  const Status status = for_each_task(
      useful_threads(64.0 * double(p.words), p.threads), (p.words + chunk - 1) / chunk, [] { return true; },
      [&](bool, std::int64_t task) {
        const std::int64_t first = task * chunk, count = p.words - first < chunk ? p.words - first : chunk;
        sum += mixed(of_words(data + first, count) + std::uint64_t(task) * 0x9e3779b97f4a7c15u);
        return Status::ok;
      });
  *out = sum;
  return status;
}

}  // namespace INR_ISA
}  // namespace inr
