#pragma once

#include <ATen/core/Tensor.h>

namespace gptq {

/// L with A = L Lᵀ, zeros above its diagonal; an undefined tensor if A is not positive definite. Column by column in
/// strips of rows with `pull`: its bits depend neither on the number of threads nor on which library multiplies
/// matrices.
/// @param matrix f32 or f64 [K, K], contiguous; only its upper triangle is read
at::Tensor cholesky(const at::Tensor& matrix);

}  // namespace gptq
