// gptq::linear_w4 and linear_w8 on CUDA tensors.
#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "cuda/linear_w4_cuda.h"
#include "cuda/linear_w4_layout.h"
#include "linear_w4_check.h"

namespace gptq {
namespace {

/// As asynchronous copies of 16 bytes need it.
bool is_aligned(const at::Tensor& tensor) {
  constexpr uintptr_t kAlignment = 16;
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0;
}

/// From so many tokens on, compute="bf16" of 16-bit input multiplies a weight of 16 bits by cuBLAS.
constexpr int64_t kDenseTokens = 512;
/// Weights of 16 bits at once: few enough to stay in the L2 cache of large devices.
constexpr int64_t kDenseElements = int64_t{1} << 24;

bool multiplies_dense(const LinearW4CudaProblem& p, std::string_view compute) {
  return compute == "bf16" && p.type != LinearW4Type::kF32 && p.m >= kDenseTokens && p.k > 0 &&
         !at::globalContext().deterministicAlgorithms();
}

void multiply_dense(const LinearW4CudaProblem& p, const LinearW4Arguments& arguments, cudaStream_t stream) {
  const auto options = arguments.y.options();
  at::Tensor x = arguments.x;
  if (p.order != nullptr) {
    x = at::empty({p.m, p.k}, options);
    C10_CUDA_CHECK(gather_input_cuda(p, x.mutable_data_ptr(), stream));
  }
  const auto round_up = [](int64_t a, int64_t b) { return (a + b - 1) / b * b; };
  const int64_t pitch = round_up(p.k, kAtomColumns);
  const int64_t rows_at_once = std::min(p.n, round_up(kDenseElements / pitch, kAtomRows) + kAtomRows);
  const at::Tensor weight = at::empty({rows_at_once, pitch}, options), y = arguments.y.view({p.m, p.n});
  const at::Tensor bias = p.bias != nullptr ? arguments.bias.to(options.dtype()) : at::Tensor();
  for (int64_t row = 0; row < p.n; row += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, p.n - row);
    C10_CUDA_CHECK(dequantize_w4_cuda(p, row, row + rows, weight.mutable_data_ptr(), stream));
    const at::Tensor part = weight.narrow(0, 0, rows).narrow(1, 0, p.k).t();
    at::Tensor y_part = y.narrow(1, row, rows);
    if (bias.defined()) {
      at::addmm_out(y_part, bias.narrow(0, row, rows), x, part);
    } else {
      at::mm_out(y_part, x, part);
    }
  }
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

  TORCH_CHECK(p.k <= kMostColumns, "linear_w", kBits, ": K must be at most ", kMostColumns, " on CUDA, got ", p.k);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  if (multiplies_dense(p, compute)) {
    multiply_dense(p, arguments, stream);
    return arguments.y;
  }
  LinearW4CudaPlan plan = {};
  C10_CUDA_CHECK(plan_linear_w4_cuda(p, plan));
  const at::Tensor scratch = at::empty({plan.scratch_bytes}, input.options().dtype(at::kByte));
  C10_CUDA_CHECK(linear_w4_cuda(p, plan, scratch.mutable_data_ptr(), stream));
  return arguments.y;
}

}  // namespace

TORCH_LIBRARY_IMPL(gptq, CUDA, m) {
  m.impl("linear_w4", linear_cuda<4>);
  m.impl("linear_w8", linear_cuda<8>);
}

}  // namespace gptq
