#pragma once

// For kernels that keep one row in each vector lane, in vectors of kBytes. They are compiled without contraction of
// products and sums, see CMakeLists.txt, so that results do not depend on the instruction set, and see no torch header,
// whose inline functions could be kept in a form made for a wide instruction set.

#include "quant/lane.h"
#include "quant/levels.h"
#include "quant/pull_kernel.h"

namespace gptq {

/// Vectors in a column of a strip.
template <int64_t kBytes, typename T>
inline constexpr int64_t kStripVectors = kStripRows<T> * static_cast<int64_t>(sizeof(T)) / kBytes;

/// Codes of the rows in Lanes.
template <int64_t kBytes, typename T>
struct CodeLanesOf {
  typedef uint8_t type __attribute__((vector_size(kBytes / sizeof(T))));
};
template <int64_t kBytes, typename T>
using CodeLanes = typename CodeLanesOf<kBytes, T>::type;
template <int64_t kBytes, typename T>
GPTQ_INLINE CodeLanes<kBytes, T>* code_lanes(uint8_t* column) {
  return reinterpret_cast<CodeLanes<kBytes, T>*>(column);
}

template <int64_t kBytes, typename T>
GPTQ_INLINE Lanes<kBytes, T>* lanes(T* column) {
  return reinterpret_cast<Lanes<kBytes, T>*>(column);
}
template <int64_t kBytes, typename T>
GPTQ_INLINE const Lanes<kBytes, T>* lanes(const T* column) {
  return reinterpret_cast<const Lanes<kBytes, T>*>(column);
}

}  // namespace gptq
