#pragma once

#include "quant/device_kernels.h"
#include "quant/sweep.h"

namespace gptq {

/// As sweep, of float or double. With dynamic groups it waits for the device.
template <typename T>
SweepResult sweep_on_device(const DeviceKernels<T>& kernels, const at::Tensor& weight, const Factor& factor,
                            const Plan& plan, Grid& grid);

}  // namespace gptq
