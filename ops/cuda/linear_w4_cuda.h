// The CUDA kernels of gptq::linear_w4 and linear_w8. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include "linear_w4.h"

namespace gptq {

/// One product on the device. The packed weight is aligned to 16 bytes.
struct LinearW4CudaProblem : LinearW4Operands {
  int64_t group_size;  // columns per weight group, at least 1
};

/// How a product is dealt out on the current device.
struct LinearW4CudaPlan {
  // M <= kGemvTokens: warps of a thread block, of which each takes blocks of 16 columns and every so many-th span.
  bool gemv;
  int column_warps, span_warps;
  // Larger M: tokens of a thread block, and the spans of k dealt out in slices.
  int tile_tokens;
  int64_t slices, spans_per_slice;

  bool overlaps;  // see LaunchShape
  int64_t record_bytes, scratch_bytes;
};

/// Up to here the weight is read once by warps of their own; beyond, by tiles.
inline constexpr int64_t kGemvTokens = 8;

cudaError_t plan_linear_w4_cuda(const LinearW4CudaProblem& p, LinearW4CudaPlan& plan);

/// Enqueues the product on the stream and returns without waiting. An input_order outside 0 .. k - 1 gives NaN.
/// @param scratch plan.scratch_bytes, aligned to 16
cudaError_t linear_w4_cuda(const LinearW4CudaProblem& p, const LinearW4CudaPlan& plan, void* scratch,
                           cudaStream_t stream);

/// Enqueues the dequantization of rows [row_begin, row_end) of the weight, (q - z)·s rounded to p.type, which is of 16
/// bits.
/// @param row_begin a multiple of 16
/// @param weight [row_end - row_begin, k rounded up to 8], aligned to 16; zero beyond k
cudaError_t dequantize_w4_cuda(const LinearW4CudaProblem& p, int64_t row_begin, int64_t row_end, void* weight,
                               cudaStream_t stream);

/// Enqueues the gathering of x by p.order to [m, k]; NaN where the order leads outside.
cudaError_t gather_input_cuda(const LinearW4CudaProblem& p, void* gathered, cudaStream_t stream);

}  // namespace gptq
