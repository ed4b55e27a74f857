// A 1 x 1 convolution: for every pixel a product with the weight.
//
// A task is some neighbouring pixels of an image. It copies their channels next to each other, since in the image they
// are a whole plane apart, often a multiple of the caches' sets. Then the register micro-kernel multiplies
// [outputs, channels] by [channels, pixels].
#include "pointwise.h"

#include "../../common/pages.h"
#include "../common/tasks.h"
#include "tiles.h"
#include "weights.h"

namespace inr {
namespace INR_ISA {
namespace {

template <class T>
class Pointwise {
 public:
  explicit Pointwise(const Conv2d& p)
      : p_(p), pixels_(p.height * p.width), tiles_(divide_up(pixels_, tile)), blocks_(p.outputs) {
    streams_ = is_streamed(std::size_t(p.batch * p.outputs * pixels_) * sizeof(T));
  }

  std::int64_t weight_size() const { return RowPanels<T>::size(p_.outputs, p_.channels); }
  void use_weights(T* packed) { weight_ = {packed, p_.outputs, p_.channels}; }
  std::int64_t blocks() const { return blocks_.count(); }
  // Packs the rows of a block of outputs.
  void transform_weights(std::int64_t block) {
    const std::int64_t first = blocks_.first(block), count = smaller(blocks_.height(block), p_.outputs - first);
    weight_.pack(block, static_cast<const T*>(p_.weight) + first * p_.channels, count);
  }

  std::int64_t tasks() const { return p_.batch * tiles_; }
  std::int64_t inputs_size() const { return p_.channels * tile_row; }

  // inputs: [channels][tile_row], a work buffer; out: [batch, outputs, pixels]
  void run(std::int64_t task, T* inputs, T* out) const {
    const std::int64_t image = task / tiles_, first = task % tiles_ * tile, count = smaller(pixels_ - first, tile);
    const T* x = static_cast<const T*>(p_.x) + image * p_.channels * pixels_ + first;
    for (std::int64_t c = 0; c < p_.channels; ++c, x += pixels_) {
      for (std::int64_t i = 0; i < count; i += 64 / std::int64_t(sizeof(T)))  // the processor does not foresee it
        __builtin_prefetch(x + 4 * pixels_ + i);
      std::memcpy(inputs + c * tile_row, x, std::size_t(count) * sizeof(T));
    }
    for (std::int64_t block = 0; block < blocks_.count(); ++block)
      RowPanels<T>::multiply(weight_, block, inputs, tile_row, count, [&](std::int64_t j, const auto& sums) {
        for (int r = 0; r < int(sizeof sums / sizeof *sums); ++r) {
          const std::int64_t o = blocks_.first(block) + r;
          if (o >= p_.outputs) break;
          for (int v = 0; v < 2; ++v) {
            const std::int64_t at = j + v * lanes<T>;
            finish<T>(p_, sums[r][v], o, (image * p_.outputs + o) * pixels_ + first + at, count - at, streams_, out);
          }
        }
      });
    if (streams_) stream_fence();
  }

 private:
  static constexpr std::int64_t tile = 2 * panel<T>;         // pixels of a task
  static constexpr std::int64_t tile_row = tile + lanes<T>;  // rows fall into different cache sets

  const Conv2d& p_;
  std::int64_t pixels_, tiles_;  // of an image
  RowBlocks blocks_;             // of outputs
  RowPanels<T> weight_;          // [outputs, channels]
  bool streams_;
};

int threads_of(const Conv2d& p) {
  return useful_threads(2.0 * double(p.channels * p.outputs) * double(p.batch * p.height * p.width), p.threads);
}

// out: [batch, outputs, height, width]
template <class T>
Status convolve(const Conv2d& p, T* out) {
  Pointwise<T> pointwise(p);
  large_pages(out, std::size_t(p.batch * p.outputs * p.height * p.width) * sizeof(T));
  return with_weights<T>(pointwise, p.prepared, threads_of(p), [&] {
    return for_each_task(
        threads_of(p), pointwise.tasks(), [&] { return Buffer<T>(pointwise.inputs_size(), false); },
        [&](Buffer<T>& inputs, std::int64_t task) {
          pointwise.run(task, inputs, out);
          return Status::ok;
        });
  });
}

template <class T>
Status prepare(const Conv2d& p, T* prepared, std::int64_t* size) {
  Pointwise<T> pointwise(p);
  return prepare_weights(pointwise, p.threads, prepared, size);
}

}  // namespace

bool is_pointwise(const Conv2d& p) {
  const bool plain = p.kernel[0] == 1 && p.kernel[1] == 1 && p.stride[0] == 1 && p.stride[1] == 1;
  return plain && !p.transposed && !p.pad[0] && !p.pad[1];
}

Status convolve_pointwise(Type type, const Conv2d& p, void* out) {
  return type == Type::float32 ? convolve(p, static_cast<float*>(out)) : convolve(p, static_cast<double*>(out));
}

Status prepare_pointwise(Type type, const Conv2d& p, void* prepared, std::int64_t* size) {
  return type == Type::float32 ? prepare(p, static_cast<float*>(prepared), size)
                               : prepare(p, static_cast<double*>(prepared), size);
}

}  // namespace INR_ISA
}  // namespace inr
