// gptq::linear_w4 and linear_w8 on CUDA tensors.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "cuda/linear_w4_cuda.h"
#include "linear_w4_check.h"

namespace gptq {
namespace {

/// Contiguous, and where 8 bytes can be loaded at once.
at::Tensor aligned(const at::Tensor& tensor) {
  constexpr uintptr_t kAlignment = 16;
  const at::Tensor contiguous = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % kAlignment == 0 ? contiguous : contiguous.clone();
}

template <int kBits>
at::Tensor linear_cuda(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                       const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& input_order, int64_t group_size, std::string_view compute) {
  check_linear_w4(kBits, input, packed, scales, zeros, bias, input_order, group_size, compute);
  const c10::cuda::CUDAGuard guard(input.device());
  LinearW4CudaProblem p = {};
  p.n = scales.size(1);
  p.k = input.size(-1);
  p.m = 1;
  for (int64_t i = 0; i + 1 < input.dim(); ++i) p.m *= input.size(i);
  p.group_size = std::max<int64_t>(1, group_size == -1 ? p.k : std::min(group_size, p.k));
  p.bits = kBits;
  p.digits = linear_w4_digits(input.scalar_type(), compute);
  p.type = linear_w4_type(input.scalar_type());

  at::Tensor x = input.dim() == 2 ? input : input.reshape({p.m, p.k});
  if (x.stride(1) != 1) x = x.contiguous();
  const at::Tensor weights = aligned(packed), scale = scales.contiguous();
  const at::Tensor zero = zeros ? zeros->contiguous() : at::Tensor();
  const at::Tensor order = input_order ? input_order->contiguous() : at::Tensor();
  const at::Tensor offset = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  at::DimVector shape(input.sizes());
  shape.back() = p.n;
  const at::Tensor y = at::empty(shape, input.options());
  if (p.m == 0 || p.n == 0) return y;
  p.x = x.const_data_ptr();
  p.x_stride = x.stride(0);
  p.order = input_order ? order.const_data_ptr<int32_t>() : nullptr;
  p.packed = weights.const_data_ptr<uint8_t>();
  p.scales = reinterpret_cast<const uint16_t*>(scale.const_data_ptr<at::Half>());
  p.zeros = zeros ? zero.const_data_ptr<uint8_t>() : nullptr;
  p.bias = bias ? offset.const_data_ptr<float>() : nullptr;
  p.y = y.mutable_data_ptr();

  LinearW4CudaScratch sizes = {};
  C10_CUDA_CHECK(linear_w4_cuda_scratch(p, sizes));
  const auto on_device = input.options();
  const at::Tensor digits = at::empty({sizes.x_digits}, on_device.dtype(at::kChar));
  const at::Tensor x_scales = at::empty({sizes.x_scales}, on_device.dtype(at::kFloat));
  const at::Tensor x_sums = at::empty({sizes.x_sums}, on_device.dtype(at::kInt));
  const at::Tensor span_sums = at::empty({sizes.span_sums}, on_device.dtype(at::kFloat));
  p.x_digits = digits.mutable_data_ptr<int8_t>();
  p.x_scales = x_scales.mutable_data_ptr<float>();
  p.x_sums = x_sums.mutable_data_ptr<int32_t>();
  p.span_sums = span_sums.mutable_data_ptr<float>();
  C10_CUDA_CHECK(linear_w4_cuda(p, c10::cuda::getCurrentCUDAStream()));
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(gptq, CUDA, m) {
  m.impl("linear_w4", linear_cuda<4>);
  m.impl("linear_w8", linear_cuda<8>);
}

}  // namespace gptq
