// Compiled with contraction, see CMakeLists.txt: each product and sum becomes one fused operation where the processor
// has it. It sees no torch header, whose inline functions could be kept in a form made for a wide instruction set.
#include "quant/pull_kernel.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GPTQ_X86_LEVELS 1
#endif
#define GPTQ_INLINE inline __attribute__((always_inline))

namespace gptq {
namespace {

constexpr int64_t kStripBytes = 256;
constexpr int64_t kPanel = 96;  // columns that stay in the first-level cache: 24 KiB

template <typename T, int64_t kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

/// How many registers a tile takes: kVectors vectors of kBytes for each of kColumns sums.
template <int64_t kBytes_, int64_t kVectors_, int64_t kColumns_>
struct Tile {
  static constexpr int64_t kBytes = kBytes_, kVectors = kVectors_, kColumns = kColumns_;
};

template <typename Shape, int64_t kColumns, typename T>
GPTQ_INLINE void pull_tile(const T* matrix, int64_t stride, const T* columns, int64_t count, T* targets) {
  using Vector = typename VectorOf<T, Shape::kBytes>::type;
  constexpr int64_t rows = kStripBytes / sizeof(T);
  Vector sums[kColumns][Shape::kVectors];
  for (int64_t c = 0; c < kColumns; ++c) {
    for (int64_t v = 0; v < Shape::kVectors; ++v) {
      sums[c][v] = reinterpret_cast<const Vector*>(targets + c * rows)[v];
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    const auto* column = reinterpret_cast<const Vector*>(columns + j * rows);
    for (int64_t c = 0; c < kColumns; ++c) {
      const T m = matrix[c * stride + j];
      for (int64_t v = 0; v < Shape::kVectors; ++v) {
        sums[c][v] += column[v] * m;
      }
    }
  }
  for (int64_t c = 0; c < kColumns; ++c) {
    for (int64_t v = 0; v < Shape::kVectors; ++v) {
      reinterpret_cast<Vector*>(targets + c * rows)[v] = sums[c][v];
    }
  }
}

constexpr int64_t kLine = 64;  // bytes

// What the next panel reads of kRows rows of the matrix: too far apart for the processor to see coming.
template <int64_t kRows, typename T>
GPTQ_INLINE void prefetch_rows(const T* matrix, int64_t stride) {
  constexpr int64_t step = kLine / sizeof(T);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t j = 0; j < kPanel; j += step) {
      __builtin_prefetch(matrix + row * stride + j, 0, 2);
    }
  }
}

// Parts [from, to) of count of the next panel's columns.
template <typename T>
GPTQ_INLINE void prefetch_columns(const T* columns, int64_t from, int64_t to, int64_t count) {
  constexpr int64_t lines = kPanel * kStripBytes / kLine, step = kLine / sizeof(T);
  for (int64_t line = lines * from / count; line < lines * to / count; ++line) {
    __builtin_prefetch(columns + line * step, 0, 2);
  }
}

// The columns that are left, at most kMost.
template <typename Shape, int64_t kMost, typename T>
GPTQ_INLINE void pull_rest(const T* matrix, int64_t stride, const T* columns, int64_t width, int64_t count,
                           T* targets) {
  if constexpr (kMost > 0) {
    if (count == kMost) {
      pull_tile<Shape, kMost>(matrix, stride, columns, width, targets);
    } else {
      pull_rest<Shape, kMost - 1>(matrix, stride, columns, width, count, targets);
    }
  }
}

// more: whether a panel follows.
template <typename Shape, typename T>
GPTQ_INLINE void pull_panel(const T* matrix, int64_t stride, const T* columns, int64_t width, int64_t count, bool more,
                            T* targets) {
  constexpr int64_t rows = kStripBytes / sizeof(T), lanes = Shape::kVectors * Shape::kBytes / sizeof(T);
  for (int64_t lane = 0; lane < rows; lane += lanes) {
    int64_t c = 0;
    for (; c + Shape::kColumns <= count; c += Shape::kColumns) {
      if (more && lane == 0) {
        prefetch_rows<Shape::kColumns>(matrix + c * stride + kPanel, stride);
        prefetch_columns(columns + kPanel * rows, c, c + Shape::kColumns, count);
      }
      pull_tile<Shape, Shape::kColumns>(matrix + c * stride, stride, columns + lane, width, targets + c * rows + lane);
    }
    pull_rest<Shape, Shape::kColumns - 1>(matrix + c * stride, stride, columns + lane, width, count - c,
                                          targets + c * rows + lane);
  }
}

template <typename Shape, typename T>
GPTQ_INLINE void pull_all(const T* matrix, int64_t stride, const T* columns, int64_t from, int64_t to, int64_t count,
                          T* targets) {
  constexpr int64_t rows = kStripBytes / sizeof(T);
  for (int64_t j = from; j < to; j += kPanel) {
    const bool more = to - j > kPanel;
    pull_panel<Shape>(matrix + j, stride, columns + j * rows, more ? kPanel : to - j, count, more, targets);
  }
}

template <typename T>
using Pull = void (*)(const T*, int64_t, const T*, int64_t, int64_t, int64_t, T*);

template <typename T>
void pull_baseline(const T* matrix, int64_t stride, const T* columns, int64_t from, int64_t to, int64_t count,
                   T* targets) {
  pull_all<Tile<16, 4, 2>>(matrix, stride, columns, from, to, count, targets);
}

#ifdef GPTQ_X86_LEVELS
template <typename T>
__attribute__((target("avx2,fma"))) void pull_avx2(const T* matrix, int64_t stride, const T* columns, int64_t from,
                                                   int64_t to, int64_t count, T* targets) {
  pull_all<Tile<32, 4, 2>>(matrix, stride, columns, from, to, count, targets);
}

template <typename T>
__attribute__((target("avx512f"))) void pull_avx512(const T* matrix, int64_t stride, const T* columns, int64_t from,
                                                    int64_t to, int64_t count, T* targets) {
  pull_all<Tile<64, 4, kTileColumns>>(matrix, stride, columns, from, to, count, targets);
}
#endif

template <typename T>
Pull<T> choose() {
#ifdef GPTQ_X86_LEVELS
  if (__builtin_cpu_supports("avx512f")) {
    return pull_avx512<T>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return pull_avx2<T>;
  }
#endif
  return pull_baseline<T>;
}

}  // namespace

void pull(const float* matrix, int64_t stride, const float* columns, int64_t from, int64_t to, int64_t count,
          float* targets) {
  static const Pull<float> chosen = choose<float>();
  chosen(matrix, stride, columns, from, to, count, targets);
}

void pull(const double* matrix, int64_t stride, const double* columns, int64_t from, int64_t to, int64_t count,
          double* targets) {
  static const Pull<double> chosen = choose<double>();
  chosen(matrix, stride, columns, from, to, count, targets);
}

}  // namespace gptq
