#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "quant/pull_kernel.h"

namespace gptq {

/// What a GradientFactor keeps of the errors of a strip.
struct GradientStrip {
  at::Tensor pairs, projections, before;
};

/// The products E H of refinement, for strips of rows.
///
/// In float64 they are what the name says. In float32 they are E (H - U Uᵀ) with both factors rounded to bfloat16 plus
/// (E U) Uᵀ in float32, at nearly twice the speed where the processor multiplies bfloat16. U is a pivoted Cholesky
/// factor of low rank. Without it, the directions that all inputs share, such as their mean, would drown the rest in
/// rounding errors: E is small in just those. The bits are the same on every processor that has fused multiply-add.
template <typename T>
class GradientFactor {
 public:
  /// @param hessian [K, K], of T
  explicit GradientFactor(const at::Tensor& hessian);

  GradientStrip make_strip(int64_t group_size) const;

  /// Takes in the errors of a strip, [K + K % 2][kStripRows] with zeros in the last column of an odd K.
  void load(const T* errors, const GradientStrip& strip) const;
  /// To be called before and after the errors of columns [first, first + count) change.
  void before_change(const T* errors, int64_t first, int64_t count, const GradientStrip& strip) const;
  void after_change(const T* errors, int64_t first, int64_t count, const GradientStrip& strip) const;

  /// Parts that E H is the sum of, so that strips side by side can share what they read.
  int64_t parts() const;
  /// Adds one part of E H to the gradients, [count][kStripRows], of columns [first, first + count).
  void add_part(int64_t part, const T* errors, const GradientStrip& strip, int64_t first, int64_t count,
                T* gradients) const;

 private:
  static constexpr int64_t kRows = kStripRows<T>;

  int64_t k_;
  at::Tensor factor_;        // H, or pairs of columns of H - U Uᵀ
  at::Tensor leading_;       // U, [K, rank]
  at::Tensor leading_rows_;  // Uᵀ
};

extern template class GradientFactor<float>;
extern template class GradientFactor<double>;

}  // namespace gptq
