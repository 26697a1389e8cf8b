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

/// As asynchronous copies of 16 bytes need it.
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

  LinearW4CudaPlan plan = {};
  C10_CUDA_CHECK(plan_linear_w4_cuda(p, plan));
  const at::Tensor scratch = at::empty({plan.scratch_bytes}, input.options().dtype(at::kByte));
  C10_CUDA_CHECK(linear_w4_cuda(p, plan, scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return arguments.y;
}

}  // namespace

TORCH_LIBRARY_IMPL(gptq, CUDA, m) {
  m.impl("linear_w4", linear_cuda<4>);
  m.impl("linear_w8", linear_cuda<8>);
}

}  // namespace gptq
