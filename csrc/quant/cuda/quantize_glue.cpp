// The CUDA kernels of quantize_weight on the current stream of the current device.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "quant/cuda/quantize_cuda.h"
#include "quant/device_kernels.h"

namespace gptq {
namespace {

template <typename Block>
void run(const Block& block) {
  C10_CUDA_CHECK(launch_kernel(block, c10::cuda::getCurrentCUDAStream()));
}

template <typename T>
constexpr DeviceKernels<T> kCudaKernels = {run<SweptBlock<T>>, run<SolvedBlock<T>>, run<MovedBlock<T>>,
                                           run<FittedGroup<T>>, run<SearchedGroups<T>>};

// When the library is loaded.
const bool kRegistered = [] {
  set_device_kernels(c10::DeviceType::CUDA, &kCudaKernels<float>, &kCudaKernels<double>);
  return true;
}();

}  // namespace
}  // namespace gptq
