#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/stack.h>

#include <array>
#include <cstddef>

namespace gptq {

/// The values of tensors of one element, which are on one device, in one copy to the host.
template <typename... Tensors>
std::array<double, sizeof...(Tensors)> read_scalars(const Tensors&... tensors) {
  if ((tensors.is_cpu() && ...)) {
    return {tensors.template item<double>()...};
  }
  const at::Tensor values = at::stack({tensors.to(at::kDouble).reshape({})...}).cpu();
  std::array<double, sizeof...(Tensors)> scalars{};
  for (size_t i = 0; i < scalars.size(); ++i) {
    scalars[i] = values.const_data_ptr<double>()[i];
  }
  return scalars;
}

}  // namespace gptq
