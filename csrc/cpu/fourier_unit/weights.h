// The weights of a convolution in the form that its kernel reads, made for one call or kept by the caller.
//
// An algorithm has weight_size(), the number of elements of that form; use_weights(T*), called before the others;
// blocks(), of outputs; and transform_weights(block), which writes the weights of a block.
#pragma once

#include "../../common/pages.h"
#include "../common/buffer.h"
#include "../common/tasks.h"

namespace inr {
namespace INR_ISA {

// to: [weight_size()]
template <class T, class Algorithm>
Status transform_weights(Algorithm& algorithm, int threads, T* to) {
  large_pages(to, std::size_t(algorithm.weight_size()) * sizeof(T));
  algorithm.use_weights(to);
  return for_each_task(
      threads, algorithm.blocks(), [] { return true; },
      [&](bool, std::int64_t block) {
        algorithm.transform_weights(block);
        return Status::ok;
      });
}

// Calls work(), which returns a Status, when the algorithm has its weights: `prepared`, or transformed here if it is
// nullptr.
template <class T, class Algorithm, class Work>
Status with_weights(Algorithm& algorithm, const void* prepared, int threads, Work&& work) {
  Buffer<T> transformed;
  if (prepared) {
    algorithm.use_weights(static_cast<T*>(const_cast<void*>(prepared)));
    return work();
  }
  if (!transformed.resize(algorithm.weight_size(), false)) return Status::out_of_memory;
  const Status status = transform_weights<T>(algorithm, threads, transformed);
  return status == Status::ok ? work() : status;
}

// Sets *size, and transforms the weights unless `to` is nullptr.
template <class T, class Algorithm>
Status prepare_weights(Algorithm& algorithm, int threads, T* to, std::int64_t* size) {
  *size = algorithm.weight_size();
  return to ? transform_weights<T>(algorithm, threads, to) : Status::ok;
}

}  // namespace INR_ISA
}  // namespace inr
