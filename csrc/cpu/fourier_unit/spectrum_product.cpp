// The matrix product of fourier_unit on the spectrum. The interleaved real and imaginary parts are separated when a
// tile is loaded, and interleaved again when results are stored from registers.
#include "../entries.h"
#include "../common/row_panels.h"
#include "../common/tasks.h"
#include "weights.h"

namespace inr {
namespace INR_ISA {
namespace {

template <class T>
class SpectrumMultiplier {
 public:
  static constexpr std::int64_t tile = 2 * panel<T>;         // positions of a task
  static constexpr std::int64_t tile_row = tile + lanes<T>;  // its row stride: rows fall into different cache sets

  explicit SpectrumMultiplier(const SpectrumProduct& p)
      : p_(p), tiles_(divide_up(p.positions, tile)), blocks_(2 * p.outputs) {}

  std::int64_t weight_size() const { return p_.groups * RowPanels<T>::size(2 * p_.outputs, 2 * p_.inputs); }
  void use_weights(T* packed) { packed_ = packed; }
  std::int64_t blocks() const { return p_.groups * blocks_.count(); }
  // Packs a block of rows of one group.
  void transform_weights(std::int64_t index) {
    const std::int64_t group = index / blocks_.count(), block = index % blocks_.count(), rows = 2 * p_.outputs;
    const std::int64_t first = blocks_.first(block), count = smaller(blocks_.height(block), rows - first);
    group_weight(group).pack(block, static_cast<const T*>(p_.weight) + (group * rows + first) * 2 * p_.inputs, count);
  }

  std::int64_t tasks() const { return p_.batch * p_.groups * tiles_; }

  // b: [2 inputs][tile_row], a work buffer; out: [batch, groups * outputs, positions], complex
  void run(std::int64_t task, T* b, T* out) const {
    const std::int64_t unit = task / tiles_, first = task % tiles_ * tile, group = unit % p_.groups;
    const std::int64_t count = p_.positions - first < tile ? p_.positions - first : tile;
    const T* x = static_cast<const T*>(p_.x) + (unit * p_.inputs * p_.positions + first) * 2;
    for (std::int64_t c = 0; c < p_.inputs; ++c, x += 2 * p_.positions)
      deinterleave_row(x, count, b + 2 * c * tile_row);
    out += (unit * p_.outputs * p_.positions + first) * 2;
    const RowPanels<T> weight = group_weight(group);
    for (std::int64_t block = 0; block < blocks_.count(); ++block) {
      const std::int64_t i = blocks_.first(block);
      RowPanels<T>::multiply(weight, block, b, tile_row, count, [&](std::int64_t j, const auto& sums) {
        const T* shift = p_.shift ? static_cast<const T*>(p_.shift) + group * 2 * p_.outputs + i : nullptr;
        for (int r = 0; r < int(sizeof sums / sizeof *sums) && i + r < 2 * p_.outputs; r += 2)
          for (int v = 0; v < 2; ++v) {
            Vec<T> re = sums[r][v], im = sums[r + 1][v];
            if (shift) re += shift[r], im += shift[r + 1];
            if (p_.relu) re = relu(re), im = relu(im);
            const std::int64_t at = j + v * lanes<T>;
            if (p_.add_input) re += load(b + (i + r) * tile_row + at), im += load(b + (i + r + 1) * tile_row + at);
            store_interleaved(re, im, count - at, out + ((i + r) / 2 * p_.positions + at) * 2);
          }
      });
    }
  }

 private:
  // [2 outputs, 2 inputs]
  RowPanels<T> group_weight(std::int64_t group) const {
    const std::int64_t rows = 2 * p_.outputs, steps = 2 * p_.inputs;
    return {packed_ + group * RowPanels<T>::size(rows, steps), rows, steps};
  }

  // Separates the real and imaginary parts. x: [count], complex; rows: [2][tile_row]
  static void deinterleave_row(const T* x, std::int64_t count, T* rows) {
    for (std::int64_t n = 0; n < count; n += lanes<T>) {
      Vec<T> re, im;
      if (n + lanes<T> <= count) {
        load_pairs(x + 2 * n, re, im);
      } else {
        T tail[2 * lanes<T>] = {};
        std::memcpy(tail, x + 2 * n, std::size_t(count - n) * 2 * sizeof(T));
        load_pairs(tail, re, im);
      }
      store(rows + n, re);
      store(rows + tile_row + n, im);
    }
  }

  // out: [count], complex
  static void store_interleaved(Vec<T> re, Vec<T> im, std::int64_t count, T* out) {
    if (count >= lanes<T>) return store_pairs(out, re, im);
    T tail[2 * lanes<T>];
    store_pairs(tail, re, im);
    if (count > 0) std::memcpy(out, tail, std::size_t(count) * 2 * sizeof(T));
  }

  const SpectrumProduct& p_;
  std::int64_t tiles_;
  RowBlocks blocks_;     // of the rows of a group's weight
  T* packed_ = nullptr;  // [groups] RowPanels
};

int threads_of(const SpectrumProduct& p) {
  return useful_threads(
      8.0 * double(p.inputs) * double(p.outputs * p.groups) * double(p.positions * p.batch), p.threads);
}

// out: [batch, groups * outputs, positions], complex
template <class T>
Status product(const SpectrumProduct& p, T* out) {
  SpectrumMultiplier<T> multiplier(p);
  return with_weights<T>(multiplier, p.prepared, threads_of(p), [&] {
    return for_each_task(
        threads_of(p), multiplier.tasks(),
        [&] { return Buffer<T>(2 * p.inputs * SpectrumMultiplier<T>::tile_row, false); },
        [&](Buffer<T>& b, std::int64_t task) {
          multiplier.run(task, b, out);
          return Status::ok;
        });
  });
}

template <class T>
Status prepare(const SpectrumProduct& p, T* prepared, std::int64_t* size) {
  SpectrumMultiplier<T> multiplier(p);
  return prepare_weights(multiplier, p.threads, prepared, size);
}

}  // namespace

Status spectrum_product(Type type, const SpectrumProduct& p, void* out) {
  switch (type) {
    case Type::float32: return product(p, static_cast<float*>(out));
    case Type::float64: return product(p, static_cast<double*>(out));
    default: return Status::unsupported_type;
  }
}

Status prepare_spectrum_product(Type type, const SpectrumProduct& p, void* prepared, std::int64_t* size) {
  switch (type) {
    case Type::float32: return prepare(p, static_cast<float*>(prepared), size);
    case Type::float64: return prepare(p, static_cast<double*>(prepared), size);
    default: return Status::unsupported_type;
  }
}

}  // namespace INR_ISA
}  // namespace inr
