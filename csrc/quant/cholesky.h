#pragma once

#include <ATen/core/Tensor.h>

namespace gptq {

/// L with A = L Lᵀ, zeros above its diagonal; an undefined tensor if A is not positive definite. Block columns by
/// `product`, which on some processors is twice as fast as the factorisation of the library behind at::linalg.
/// @param matrix f32 or f64 [K, K], contiguous; only its lower triangle is read
at::Tensor cholesky(const at::Tensor& matrix);

}  // namespace gptq
