// The peak rate of the multiply-add units: the ceiling of every kernel that computes more than it moves.
#include "../entries.h"
#include "gemm.h"
#include "tasks.h"

namespace inr {
namespace INR_ISA {
namespace {

constexpr int accumulators = 2 * block_rows;  // as a block of the matrix product's; independent of each other

// The elements of `out`, which work reads and writes.
template <class T>
constexpr int size = accumulators * lanes<T>;

template <class T>
void multiply_add(std::int64_t steps, Real<T>* out) {
  T a[Element<T>::per_step], b[lanes<T> * Element<T>::per_step];
  for (T& value : a) from_real(0.5f, &value);
  for (T& value : b) from_real(0.5f, &value);
  Vec<T> acc[accumulators];
#pragma GCC unroll 24
  for (int i = 0; i < accumulators; ++i) acc[i] = load(out + i * lanes<T>);
  const auto vector = MultiplyAdd<T>::vector(b);
  for (std::int64_t k = 0; k < steps; ++k)
#pragma GCC unroll 24
    for (int i = 0; i < accumulators; ++i)
      if constexpr (Element<T>::per_step == 1)
        acc[i] = acc[i] * vector + Real<T>(0.5);  // acc[i] + vector * a has a product that does not change
      else
        MultiplyAdd<T>::add(acc[i], a, vector);
#pragma GCC unroll 24
  for (int i = 0; i < accumulators; ++i) store(out + i * lanes<T>, acc[i]);
}

template <class T>
Status run(std::int64_t steps, int threads, double* flops) {
  *flops = 2.0 * double(steps) * size<T> * Element<T>::per_step * threads;
  return for_each_task(
      threads, threads, [] { return Buffer<Real<T>>(size<T>); },
      [&](Buffer<Real<T>>& out, std::int64_t) {
        for (int i = 0; i < size<T>; ++i) out[i] = Real<T>(i);  // different values, or one accumulator would serve for all
        multiply_add<T>(steps, out);
        return Status::ok;
      });
}

}  // namespace

Status multiply_adds(Type type, std::int64_t steps, int threads, double* flops) {
  switch (type) {
    case Type::float32: return run<float>(steps, threads, flops);
    case Type::float64: return run<double>(steps, threads, flops);
#if defined(__AVX512BF16__)
    case Type::bfloat16: return run<bf16>(steps, threads, flops);
#endif
    default: return Status::unsupported_type;
  }
}

}  // namespace INR_ISA
}  // namespace inr
