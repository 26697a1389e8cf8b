#pragma once

#include <gptq/quantize_module.h>
#include <torch/script.h>

#include <string>
#include <vector>

// Small TorchScript modules that the rewriting is tested on.
namespace gptq::test {

inline at::Tensor random_tensor(at::IntArrayRef shape, uint64_t seed, double scale = 1.0) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn(shape, generator) * scale;
}

/// A module that holds weight and bias and computes forward(x) from the given body.
inline torch::jit::Module linear_module(const std::string& name, at::IntArrayRef weight_shape, int64_t out_features,
                                        uint64_t seed, const std::string& body) {
  torch::jit::Module module(name);
  module.register_parameter("weight", random_tensor(weight_shape, seed, 0.2), false);
  module.register_parameter("bias", random_tensor({out_features}, seed + 1), false);
  module.define("def forward(self, x: Tensor) -> Tensor:\n    return " + body + "\n");
  module.eval();
  return module;
}

inline torch::jit::Module linear(int64_t out_features, int64_t in_features, uint64_t seed) {
  return linear_module("Linear", {out_features, in_features}, out_features, seed,
                       "torch.linear(x, self.weight, self.bias)");
}

/// GPT-2's Conv1D: the weight is stored as [K, N].
inline torch::jit::Module conv1d(int64_t out_features, int64_t in_features, uint64_t seed) {
  return linear_module(
      "Conv1D", {in_features, out_features}, out_features, seed,
      "torch.addmm(self.bias, x.view([-1, x.size(-1)]), self.weight).view([x.size(0), x.size(1), self.bias.size(0)])");
}

/// Binds submodules to a forward of the given body.
inline torch::jit::Module compose(const std::vector<std::pair<std::string, torch::jit::Module>>& parts,
                                  const std::string& body) {
  torch::jit::Module module("Composed");
  for (const auto& [name, part] : parts) {
    module.register_module(name, part);
  }
  module.define(body);
  module.eval();
  return module;
}

inline std::vector<std::vector<c10::IValue>> calibration_inputs(int64_t count, at::IntArrayRef shape, uint64_t seed) {
  std::vector<std::vector<c10::IValue>> inputs;
  for (int64_t i = 0; i < count; ++i) {
    inputs.push_back({random_tensor(shape, seed + static_cast<uint64_t>(i))});
  }
  return inputs;
}

inline torch::jit::Module two_layers() {
  return compose({{"first", linear(24, 16, 1)}, {"second", linear(10, 24, 3)}},
                 "def forward(self, x: Tensor) -> Tensor:\n"
                 "    return self.second.forward(torch.relu(self.first.forward(x)))\n");
}

/// Without the target and the bias correction, which depend on what the layers before do.
inline QuantizeModuleOptions options_with_group(int64_t group_size) {
  QuantizeModuleOptions options;
  options.quantize.group_size = group_size;
  options.quantize.target_alpha = 0;
  options.quantize.correct_bias = false;
  return options;
}

}  // namespace gptq::test
