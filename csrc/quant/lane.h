#pragma once

// Arithmetic of one row of a weight, or of a vector of rows: T is float or double, and V is T or a vector of T. The CPU
// kernels use it with one row in each vector lane, those of a device with one row in each thread. Like them it is
// compiled without contraction of products and sums.

#ifdef __CUDACC__
#define GPTQ_LANE __host__ __device__ __forceinline__
#else
#define GPTQ_LANE inline __attribute__((always_inline))
#endif

namespace gptq {

/// Adding and subtracting it rounds to integer, half to even, for values far below it.
template <typename T>
inline constexpr T kRounder = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^23, 1.5 * 2^52

/// Sizes that a float16 scale may have. Denormal ones, which have fewer digits, are left to the min/max grid.
inline constexpr double kLeastNormalHalf = 6.103515625e-5;
inline constexpr double kMostHalf = 65504;

/// Rounds to the 11 significant bits of float16 (Dekker's split).
template <typename T, typename V>
GPTQ_LANE V half_precision(const V& value) {
  constexpr T split = sizeof(T) == 4 ? T(8193) : T(4398046511105.0);  // 2^13 + 1, 2^42 + 1
  const V scaled = value * split;
  return scaled - (scaled - value);
}

/// Where the value is the size of a scale.
template <typename T, typename V>
GPTQ_LANE auto is_scale(const V& value) {
  const V size = value < T(0) ? -value : value;
  return (size >= T(kLeastNormalHalf)) & (size <= T(kMostHalf));
}

/// value, but at least least and at most most.
template <typename V>
GPTQ_LANE V clamped(const V& value, const V& least, const V& most) {
  const V raised = value > least ? value : least;
  return raised < most ? raised : most;
}

/// The level (code - zero) of the grid that is nearest to value.
template <typename T, typename V>
GPTQ_LANE V nearest_level(const V& value, const V& scale, const V& zero, T max_code) {
  const T rounder = kRounder<T>;
  const V least = -zero, most = max_code - zero;
  return (clamped<V>(value / scale, least, most) + rounder) - rounder;
}

}  // namespace gptq
