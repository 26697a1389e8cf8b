#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <torch/types.h>

#include <cmath>

namespace gptq::test {

/// A random weight and the Hessian of random inputs whose channels are correlated. The global generator is not used.
struct RandomLayer {
  at::Tensor weight;   ///< f64 [N, K]
  at::Tensor inputs;   ///< f64 [samples, K]
  at::Tensor hessian;  ///< f64 [K, K]
};

inline RandomLayer random_layer(int64_t n, int64_t k, uint64_t seed, int64_t samples = 0) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const auto random = [&](int64_t rows, int64_t cols) { return at::randn({rows, cols}, generator, at::kDouble); };
  samples = samples == 0 ? 4 * k + 8 : samples;
  RandomLayer layer;
  layer.weight = random(n, k);
  layer.inputs = random(samples, k).mm(at::eye(k, at::kDouble) + random(k, k) / std::sqrt(static_cast<double>(k)));
  layer.hessian = layer.inputs.t().mm(layer.inputs) * (2.0 / static_cast<double>(samples));
  layer.hessian = (layer.hessian + layer.hessian.t()) / 2;
  return layer;
}

}  // namespace gptq::test
