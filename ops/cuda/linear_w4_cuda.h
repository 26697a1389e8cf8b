// The CUDA kernels of gptq::linear_w4 and linear_w8. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include "linear_w4.h"

namespace gptq {

/// One product on the device, as LinearW4Problem has it on the host; every pointer is a device pointer. Nothing needs
/// to be aligned beyond its element type but the packed weight, to 16 bytes.
struct LinearW4CudaProblem {
  int64_t m, n, k;
  int64_t group_size;  // columns per weight group, at least 1
  int bits;            // 4 or 8
  int digits;          // 1, 2 or 3
  LinearW4Type type;   // of x and y
  const void* x;
  int64_t x_stride;
  const int32_t* order;
  const uint8_t* packed;
  const uint16_t* scales;
  const uint8_t* zeros;
  const float* bias;
  void* y;

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
