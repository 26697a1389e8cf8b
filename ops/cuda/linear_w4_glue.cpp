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

/// Where 8 bytes can be loaded at once.
bool is_aligned(const at::Tensor& tensor) {
  constexpr uintptr_t kAlignment = 16;
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0;
}

template <int kBits>
at::Tensor linear_cuda(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                       const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& input_order, int64_t group_size, std::string_view compute) {
  LinearW4Arguments arguments =
      prepare_linear_w4(kBits, input, packed, scales, zeros, bias, input_order, group_size, compute);
  const c10::cuda::CUDAGuard guard(input.device());
  LinearW4CudaProblem p = {};
  static_cast<LinearW4Operands&>(p) = arguments.operands;
  if (p.m == 0 || p.n == 0) return arguments.y;
  p.group_size = std::max<int64_t>(1, group_size == -1 ? p.k : std::min(group_size, p.k));
  if (!is_aligned(arguments.packed)) {
    arguments.packed = arguments.packed.clone();
    p.packed = arguments.packed.const_data_ptr<uint8_t>();
  }

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
  return arguments.y;
}

}  // namespace

TORCH_LIBRARY_IMPL(gptq, CUDA, m) {
  m.impl("linear_w4", linear_cuda<4>);
  m.impl("linear_w8", linear_cuda<8>);
}

}  // namespace gptq
