// How kernels are launched, and what a launcher asks of the device. Kernel files launch through here alone, so that a
// test can run them on the host: where nvcc does not compile, tests/cuda_on_host.h defines these functions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <initializer_list>

namespace gptq {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;  ///< of shared_memory()
  /// The kernel may begin before the one ahead of it on the stream has ended, and waits for it itself, by
  /// wait_for_kernel_ahead(). Only where DeviceLimits::overlaps_kernels.
  bool overlaps = false;
};

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;       ///< that a thread block may have
  bool overlaps_kernels;  ///< see LaunchShape::overlaps
};

#ifdef __CUDACC__

/// Whether the kernels that the device runs were compiled for compute capability 9.0 or later: kernels for an earlier
/// one, as the driver compiles them for later devices, do not wait for what is ahead of them.
constexpr bool has_code_that_overlaps(int capability) {
  for (const int compiled : {__CUDA_ARCH_LIST__})
    if (compiled >= 900 && compiled <= capability) return true;
  return false;
}

/// Of the current device; asked once a thread and device.
static inline cudaError_t device_limits(DeviceLimits& limits) {
  static thread_local int known_device = -1;
  static thread_local DeviceLimits known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (device != known_device) {
    const auto ask = [&](int& value, cudaDeviceAttr what) { return cudaDeviceGetAttribute(&value, what, device); };
    if (const cudaError_t error = ask(known.multiprocessors, cudaDevAttrMultiProcessorCount)) return error;
    int major = 0, minor = 0;
    if (const cudaError_t error = ask(major, cudaDevAttrComputeCapabilityMajor)) return error;
    if (const cudaError_t error = ask(minor, cudaDevAttrComputeCapabilityMinor)) return error;
    known.overlaps_kernels = has_code_that_overlaps(100 * major + 10 * minor);
    if (const cudaError_t error = ask(known.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin)) return error;
    known_device = device;
  }
  limits = known;
  return cudaSuccess;
}

/// Enqueues kernel(arguments...).
template <class... Parameters, class... Arguments>
static cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                          const Arguments&... arguments) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (shape.shared_bytes > kAlwaysAllowed) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = shape.overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

/// The dynamic shared memory of the thread block, aligned to 16 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 gptq_shared_memory[];
  return reinterpret_cast<char*>(gptq_shared_memory);
}

#else

cudaError_t device_limits(DeviceLimits& limits);
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   const Arguments&... arguments);
char* shared_memory();

#endif

}  // namespace gptq
