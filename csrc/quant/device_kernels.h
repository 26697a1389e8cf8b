#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceType.h>

#include "quant/device_blocks.h"

namespace gptq {

/// What the solver needs of a device beyond ATen. Each enqueues its work on the current stream of the current device.
template <typename T>
struct DeviceKernels {
  void (*sweep)(const SweptBlock<T>&);
  void (*solve)(const SolvedBlock<T>&);
  void (*move_codes)(const MovedBlock<T>&);
  void (*fit_scales)(const FittedGroup<T>&);
  void (*search_scales)(const SearchedGroups<T>&);
};

/// The kernels for a kind of device; nullptr where the library has none, and the solver works on the host.
template <typename T>
const DeviceKernels<T>* device_kernels(c10::DeviceType type);

/// Sets them, for all calls from now on; nullptr: none.
void set_device_kernels(c10::DeviceType type, const DeviceKernels<float>* of_float,
                        const DeviceKernels<double>* of_double);

/// Whether the solver works on the tensor where it is, by ATen and device kernels.
inline bool solved_on_device(const at::Tensor& tensor) {
  return device_kernels<float>(tensor.device().type()) != nullptr;
}

}  // namespace gptq
