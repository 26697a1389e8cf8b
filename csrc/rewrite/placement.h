#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace gptq::rewrite {

/// Copies of tensors on a device: each tensor is copied once, and all copies live as long as this.
class DeviceCopies {
 public:
  explicit DeviceCopies(at::Device device) : device_(device) {}

  at::Device device() const { return device_; }
  /// A value with every tensor in it on the device, those in lists, tuples and dicts too.
  c10::IValue of(const c10::IValue& value) { return value.deepcopy(copies_, device_); }

 private:
  at::Device device_;
  c10::IValue::HashIdentityIValueMap copies_;
};

/// Makes a graph create its tensors on the device: a trace, and a script that names one, holds the device that the
/// model was on. Tensor constants stay where they are.
void retarget_devices(torch::jit::Graph& graph, at::Device device);

/// Makes a graph read copies of the attributes and constants that hold tensors, which become its constants.
void read_copies(torch::jit::Graph& graph, const torch::jit::Module& module, DeviceCopies& copies);

/// A copy of a module that runs on the device, with only forward. The module stays as it is.
/// @throws c10::Error where forward does more to the module than read its attributes
torch::jit::Module copy_to(const torch::jit::Module& module, at::Device device);

/// Where a module's first parameter or else buffer is; the CPU, if it has none.
at::Device device_of(const torch::jit::Module& module);

}  // namespace gptq::rewrite
