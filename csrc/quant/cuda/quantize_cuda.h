// The CUDA kernels of quantize_weight. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include "quant/device_blocks.h"

namespace gptq {

// Each enqueues its work on the stream and returns without waiting.
cudaError_t launch_kernel(const SweptBlock<float>& block, cudaStream_t stream);
cudaError_t launch_kernel(const SweptBlock<double>& block, cudaStream_t stream);
cudaError_t launch_kernel(const SolvedBlock<float>& block, cudaStream_t stream);
cudaError_t launch_kernel(const SolvedBlock<double>& block, cudaStream_t stream);
cudaError_t launch_kernel(const MovedBlock<float>& block, cudaStream_t stream);
cudaError_t launch_kernel(const MovedBlock<double>& block, cudaStream_t stream);
cudaError_t launch_kernel(const FittedGroup<float>& group, cudaStream_t stream);
cudaError_t launch_kernel(const FittedGroup<double>& group, cudaStream_t stream);
cudaError_t launch_kernel(const SearchedGroups<float>& groups, cudaStream_t stream);
cudaError_t launch_kernel(const SearchedGroups<double>& groups, cudaStream_t stream);

}  // namespace gptq
