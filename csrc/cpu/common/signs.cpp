// One bit for each output of a ReLU, all that its backward needs.
#include "../entries.h"
#include "tasks.h"

namespace inr {
namespace INR_ISA {
namespace {

constexpr std::int64_t chunk = 1 << 15;  // elements of a task, a multiple of 8

// Eight elements, and integers of their size.
template <class T>
struct Eight {
  using Integer = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef T Values __attribute__((vector_size(8 * sizeof(T))));
  typedef Integer Words __attribute__((vector_size(8 * sizeof(T))));
  static constexpr Words bits = {1, 2, 4, 8, 16, 32, 64, 128};
};

// Bit i: whether v[i] > 0
template <class T>
INR_INLINE std::uint8_t positive(const typename Eight<T>::Values& v) {
  auto set = (v > 0) & Eight<T>::bits;
  set |= __builtin_shufflevector(set, set, 4, 5, 6, 7, 0, 1, 2, 3);
  set |= __builtin_shufflevector(set, set, 2, 3, 0, 1, 6, 7, 4, 5);
  return std::uint8_t(set[0] | set[1]);
}

template <class T>
INR_INLINE typename Eight<T>::Values selected(const typename Eight<T>::Values& v, std::uint8_t byte) {
  using Words = typename Eight<T>::Words;
  return (typename Eight<T>::Values)((((Words{} + byte) & Eight<T>::bits) != 0) & (Words)v);
}

// Calls work(first, n) for n <= 8 elements from `first`, for all of them.
template <class F>
Status for_each_eight(const Signs& p, F&& work) {
  return for_each_task(
      useful_threads(64.0 * double(p.count), p.threads), (p.count + chunk - 1) / chunk, [] { return true; },
      [&](bool, std::int64_t task) {
        const std::int64_t end = p.count - task * chunk < chunk ? p.count : (task + 1) * chunk;
        std::int64_t i = task * chunk;
        for (; i + 8 <= end; i += 8) work(i, 8);
        if (i < end) work(i, end - i);
        return Status::ok;
      });
}

// x: [count]; bits: [ceil(count / 8)]
template <class T>
Status pack(const Signs& p, const T* x, std::uint8_t* bits) {
  return for_each_eight(p, [&](std::int64_t i, std::int64_t n) {
    typename Eight<T>::Values v{};
    std::memcpy(&v, x + i, std::size_t(n) * sizeof(T));
    bits[i / 8] = positive<T>(v);
  });
}

// grad, out: [count]; bits: [ceil(count / 8)]
template <class T>
Status select(const Signs& p, const T* grad, const std::uint8_t* bits, T* out) {
  return for_each_eight(p, [&](std::int64_t i, std::int64_t n) {
    typename Eight<T>::Values v{};
    std::memcpy(&v, grad + i, std::size_t(n) * sizeof(T));
    v = selected<T>(v, bits[i / 8]);
    std::memcpy(out + i, &v, std::size_t(n) * sizeof(T));
  });
}

}  // namespace

Status pack_signs(Type type, const Signs& p, const void* x, std::uint8_t* bits) {
  switch (type) {
    case Type::float32: return pack(p, static_cast<const float*>(x), bits);
    case Type::float64: return pack(p, static_cast<const double*>(x), bits);
    default: return Status::unsupported_type;
  }
}

Status select_by_signs(Type type, const Signs& p, const void* grad, const std::uint8_t* bits, void* out) {
  switch (type) {
    case Type::float32: return select(p, static_cast<const float*>(grad), bits, static_cast<float*>(out));
    case Type::float64: return select(p, static_cast<const double*>(grad), bits, static_cast<double*>(out));
    default: return Status::unsupported_type;
  }
}

}  // namespace INR_ISA
}  // namespace inr
