// The CUDA kernels of gptq::linear_w4 and linear_w8. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include "linear_w4.h"

namespace gptq {

/// One product on the device. The packed weight is aligned to 16 bytes.
struct LinearW4CudaProblem : LinearW4Operands {
  int64_t group_size;  // columns per weight group, at least 1

  // Scratch, of the sizes below.
  int8_t* x_digits;
  float* x_scales;
  int32_t* x_sums;
  float* span_sums;
};

/// Bytes or elements of scratch that a problem needs.
struct LinearW4CudaScratch {
  int64_t x_digits, x_scales, x_sums, span_sums;
};
cudaError_t linear_w4_cuda_scratch(const LinearW4CudaProblem& p, LinearW4CudaScratch& scratch);

/// Enqueues the product on the stream and returns without waiting. An input_order outside 0 .. k - 1 gives NaN.
cudaError_t linear_w4_cuda(const LinearW4CudaProblem& p, cudaStream_t stream);

}  // namespace gptq
