#pragma once

// For kernels that keep one row in each vector lane. They are compiled without contraction of products and sums, see
// CMakeLists.txt, so that results do not depend on the instruction set, and see no torch header, whose inline functions
// could be kept in a form made for a wide instruction set.

#include "quant/lane.h"
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

template <typename T>
GPTQ_INLINE Lanes<T>* lanes(T* column) {
  return reinterpret_cast<Lanes<T>*>(column);
}
template <typename T>
GPTQ_INLINE const Lanes<T>* lanes(const T* column) {
  return reinterpret_cast<const Lanes<T>*>(column);
}

}  // namespace gptq
