#pragma once

#include "quant/device_kernels.h"
#include "quant/refine.h"

namespace gptq {

/// As refine_codes, of float or double.
template <typename T>
void refine_on_device(const DeviceKernels<T>& kernels, const at::Tensor& weight, const at::Tensor& hessian,
                      const at::Tensor& added, int64_t sweeps, bool fit_scales, Grid& grid, at::Tensor& codes,
                      at::Tensor& losses);

}  // namespace gptq
