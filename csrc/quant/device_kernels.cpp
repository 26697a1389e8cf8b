#include "quant/device_kernels.h"

#include <array>

namespace gptq {
namespace {

// Filled when the library is loaded.
template <typename T>
std::array<const DeviceKernels<T>*, c10::COMPILE_TIME_MAX_DEVICE_TYPES>& table() {
  static std::array<const DeviceKernels<T>*, c10::COMPILE_TIME_MAX_DEVICE_TYPES> kernels{};
  return kernels;
}

}  // namespace

template <typename T>
const DeviceKernels<T>* device_kernels(c10::DeviceType type) {
  return table<T>().at(static_cast<size_t>(type));
}

template const DeviceKernels<float>* device_kernels<float>(c10::DeviceType);
template const DeviceKernels<double>* device_kernels<double>(c10::DeviceType);

void set_device_kernels(c10::DeviceType type, const DeviceKernels<float>* of_float,
                        const DeviceKernels<double>* of_double) {
  table<float>().at(static_cast<size_t>(type)) = of_float;
  table<double>().at(static_cast<size_t>(type)) = of_double;
}

}  // namespace gptq
