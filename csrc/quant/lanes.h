#pragma once

// For kernels that keep one row in each vector lane. They are compiled without contraction of products and sums, see
// CMakeLists.txt, so that results do not depend on the instruction set, and see no torch header, whose inline functions
// could be kept in a form made for a wide instruction set.

#include "quant/pull_kernel.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define GPTQ_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define GPTQ_CLONES
#endif

namespace gptq {

template <typename T>
struct LanesOf {
  typedef T type __attribute__((vector_size(64)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;

/// Vectors in a column of a strip.
template <typename T>
inline constexpr int64_t kStripVectors = kStripRows<T> * static_cast<int64_t>(sizeof(T)) / 64;

/// Codes of the rows in Lanes.
template <typename T>
struct CodeLanesOf {
  typedef uint8_t type __attribute__((vector_size(64 / sizeof(T))));
};
template <typename T>
using CodeLanes = typename CodeLanesOf<T>::type;
template <typename T>
GPTQ_INLINE CodeLanes<T>* code_lanes(uint8_t* column) {
  return reinterpret_cast<CodeLanes<T>*>(column);
}

/// Adding and subtracting it rounds to integer, half to even, for values far below it.
template <typename T>
inline constexpr T kRounder = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^23, 1.5 * 2^52

template <typename T>
GPTQ_INLINE Lanes<T>* lanes(T* column) {
  return reinterpret_cast<Lanes<T>*>(column);
}
template <typename T>
GPTQ_INLINE const Lanes<T>* lanes(const T* column) {
  return reinterpret_cast<const Lanes<T>*>(column);
}

/// Sizes that a float16 scale may have. Denormal ones, which have fewer digits, are left to the min/max grid.
inline constexpr double kLeastNormalHalf = 6.103515625e-5;
inline constexpr double kMostHalf = 65504;

/// Rounds to the 11 significant bits of float16 (Dekker's split).
template <typename T>
GPTQ_INLINE Lanes<T> half_precision(const Lanes<T>& value) {
  constexpr T split = sizeof(T) == 4 ? T(8193) : T(4398046511105.0);  // 2^13 + 1, 2^42 + 1
  const Lanes<T> scaled = value * split;
  return scaled - (scaled - value);
}

template <typename T>
GPTQ_INLINE Lanes<T> magnitude(const Lanes<T>& value) {
  return value < T(0) ? -value : value;
}

/// Where the value is the size of a scale.
template <typename T>
GPTQ_INLINE auto is_scale(const Lanes<T>& value) {
  const Lanes<T> size = magnitude<T>(value);
  return (size >= T(kLeastNormalHalf)) & (size <= T(kMostHalf));
}

/// The level (code - zero) of the grid that is nearest to value.
template <typename T>
GPTQ_INLINE Lanes<T> nearest_level(const Lanes<T>& value, const Lanes<T>& scale, const Lanes<T>& zero, T max_code) {
  const T rounder = kRounder<T>;
  const Lanes<T> least = -zero, most = max_code - zero;
  Lanes<T> level = value / scale;
  level = level > least ? level : least;
  level = level < most ? level : most;
  return (level + rounder) - rounder;
}

}  // namespace gptq
