// Compiled without contraction of products and sums, see CMakeLists.txt: codes then do not depend on the instruction
// set. It sees no torch header, whose inline functions could be kept in a clone made for a wide instruction set.
#include "quant/sweep_kernel.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define GPTQ_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define GPTQ_CLONES
#endif
#define GPTQ_INLINE inline __attribute__((always_inline))

namespace gptq {
namespace {

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(64)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

constexpr int64_t kTileColumns = 4;
constexpr int64_t kErrorColumns = 128;  // columns of errors that stay in the first-level cache

// Adding and subtracting it rounds to integer, half to even, for values far below it.
template <typename T>
constexpr T kRounder = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^23, 1.5 * 2^52

template <typename T>
GPTQ_INLINE Vector<T>* vectors(T* column) {
  return reinterpret_cast<Vector<T>*>(column);
}
template <typename T>
GPTQ_INLINE const Vector<T>* vectors(const T* column) {
  return reinterpret_cast<const Vector<T>*>(column);
}

template <int64_t kColumns, typename T>
GPTQ_INLINE void pull_tile(const SweepStrip<T>& strip, int64_t from, int64_t to, int64_t first, T* targets) {
  constexpr int64_t rows = kStripRows<T>;
  Vector<T> low[kColumns], high[kColumns];
  for (int64_t c = 0; c < kColumns; ++c) {
    low[c] = vectors(targets + c * rows)[0];
    high[c] = vectors(targets + c * rows)[1];
  }
  const T* multipliers = strip.multipliers + first * strip.n_columns;
  for (int64_t j = from; j < to; ++j) {
    const Vector<T> error_low = vectors(strip.errors + j * rows)[0];
    const Vector<T> error_high = vectors(strip.errors + j * rows)[1];
    for (int64_t c = 0; c < kColumns; ++c) {
      const T m = multipliers[c * strip.n_columns + j];
      low[c] += error_low * m;
      high[c] += error_high * m;
    }
  }
  for (int64_t c = 0; c < kColumns; ++c) {
    vectors(targets + c * rows)[0] = low[c];
    vectors(targets + c * rows)[1] = high[c];
  }
}

template <typename T>
GPTQ_INLINE void pull_columns(const SweepStrip<T>& strip, int64_t from, int64_t to, int64_t first, int64_t count,
                              T* targets) {
  int64_t c = 0;
  for (; c + kTileColumns <= count; c += kTileColumns) {
    pull_tile<kTileColumns>(strip, from, to, first + c, targets + c * kStripRows<T>);
  }
  for (; c < count; ++c) {
    pull_tile<1>(strip, from, to, first + c, targets + c * kStripRows<T>);
  }
}

template <typename T>
GPTQ_INLINE void pull_all(const SweepStrip<T>& strip, int64_t from, int64_t to, int64_t first, int64_t count,
                          T* targets) {
  for (int64_t j = from; j < to; j += kErrorColumns) {
    pull_columns(strip, j, j + kErrorColumns < to ? j + kErrorColumns : to, first, count, targets);
  }
}

template <typename T>
GPTQ_INLINE void quantize_column(const SweepStrip<T>& strip, int64_t k, const T* targets) {
  constexpr int64_t rows = kStripRows<T>;
  const T rounder = kRounder<T>;
  const T* scales = strip.scales + strip.group[k] * rows;
  const T* zeros = strip.zeros + strip.group[k] * rows;
  for (int64_t v = 0; v < 2; ++v) {
    const Vector<T> scale = vectors(scales)[v];
    const Vector<T> zero = vectors(zeros)[v];
    const Vector<T> least = -zero, most = strip.max_code - zero;
    Vector<T> level = vectors(targets)[v] / scale;
    level = level > least ? level : least;
    level = level < most ? level : most;
    level = (level + rounder) - rounder;
    Vector<T>* weight = vectors(strip.weights + k * rows) + v;
    vectors(strip.errors + k * rows)[v] = *weight - level * scale;
    *weight = level + zero;
  }
}

template <typename T>
GPTQ_INLINE void sweep_all(const SweepStrip<T>& strip, int64_t first, int64_t count, T* targets) {
  for (int64_t tile = 0; tile < count; tile += kTileColumns) {
    const int64_t columns = tile + kTileColumns <= count ? kTileColumns : count - tile;
    T* tile_targets = targets + tile * kStripRows<T>;
    pull_columns(strip, first, first + tile, first + tile, columns, tile_targets);
    for (int64_t c = 0; c < columns; ++c) {
      T* column = tile_targets + c * kStripRows<T>;
      pull_tile<1>(strip, first + tile, first + tile + c, first + tile + c, column);
      quantize_column(strip, first + tile + c, column);
    }
  }
}

}  // namespace

GPTQ_CLONES void pull_errors(const SweepStrip<float>& strip, int64_t from, int64_t to, int64_t first, int64_t count,
                             float* targets) {
  pull_all(strip, from, to, first, count, targets);
}

GPTQ_CLONES void pull_errors(const SweepStrip<double>& strip, int64_t from, int64_t to, int64_t first, int64_t count,
                             double* targets) {
  pull_all(strip, from, to, first, count, targets);
}

GPTQ_CLONES void sweep_block(const SweepStrip<float>& strip, int64_t first, int64_t count, float* targets) {
  sweep_all(strip, first, count, targets);
}

GPTQ_CLONES void sweep_block(const SweepStrip<double>& strip, int64_t first, int64_t count, double* targets) {
  sweep_all(strip, first, count, targets);
}

}  // namespace gptq
