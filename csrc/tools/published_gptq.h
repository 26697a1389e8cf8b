#pragma once

#include <ATen/core/Tensor.h>

namespace gptq::tools {

/// The published algorithm (Frantar et al., 2022) in the tensor operations of its Python implementation: two Cholesky
/// factorisations with an inverse between them, then column by column with an outer product each. The peer of
/// `gptq bench quantize`; nothing else uses it.
/// @param weight f32 [N, K]
/// @param hessian f32 [K, K]
/// @return f32 [N, K]: the quantized weight
at::Tensor published_gptq(const at::Tensor& weight, const at::Tensor& hessian, int64_t bits, int64_t group_size,
                          double damping);

/// Its update of a running Hessian over n samples by one more batch; returns the new n.
/// @param batch f32 [tokens, K]
int64_t published_add_batch(at::Tensor& hessian, const at::Tensor& batch, int64_t n);

}  // namespace gptq::tools
