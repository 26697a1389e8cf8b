// The device kernels of the solver, run on the host; quantize_weight_cuda_test.cpp compiles them.
#pragma once

#define launch_kernel launch_kernel_on_host  // the library has this name too
#include "tests/cuda_on_host.h"
// After what runs them.
#include <gtest/gtest.h>

#include "quant/cuda/quantize_cuda.h"
#include "quant/device_kernels.h"

namespace gptq::test {

template <typename Block>
void run_on_host(const Block& block) {
  ASSERT_EQ(launch_kernel(block, nullptr), cudaSuccess);
  cuda_on_host::synchronize();
}

template <typename T>
inline constexpr DeviceKernels<T> kKernelsOnHost = {run_on_host<SweptBlock<T>>, run_on_host<SolvedBlock<T>>,
                                                    run_on_host<MovedBlock<T>>, run_on_host<FittedGroup<T>>,
                                                    run_on_host<SearchedGroups<T>>};

/// While it lives, the solver takes devices of a type for ones with kernels.
class KernelsOnHost {
 public:
  explicit KernelsOnHost(c10::DeviceType type) : type_(type) {
    set_device_kernels(type, &kKernelsOnHost<float>, &kKernelsOnHost<double>);
  }
  ~KernelsOnHost() { set_device_kernels(type_, nullptr, nullptr); }
  KernelsOnHost(const KernelsOnHost&) = delete;
  KernelsOnHost& operator=(const KernelsOnHost&) = delete;

 private:
  c10::DeviceType type_;
};

}  // namespace gptq::test
