#include "model/output_error.h"

#include <ATen/ATen.h>
#include <c10/util/irange.h>

#include <cmath>

#include "rewrite/placement.h"

namespace gptq {

namespace {

double squared_norm(const at::Tensor& tensor) {
  const double norm = at::linalg_vector_norm(tensor).item<double>();
  return norm * norm;
}

at::Tensor output_of(torch::jit::Module& module, const at::Tensor& input) {
  const at::Tensor output = logits_of(module.forward({input.to(rewrite::device_of(module))}));
  TORCH_CHECK(output.is_floating_point(), "model must return a floating-point tensor, returned ",
              output.dtype().name());
  return output.to(at::kDouble);
}

}  // namespace

std::vector<double> output_errors(torch::jit::Module reference, std::vector<torch::jit::Module> models,
                                  const std::vector<at::Tensor>& inputs, const EvaluationProgress& progress) {
  const at::NoGradGuard no_grad;
  std::vector<double> errors(models.size(), 0.0);
  double magnitude = 0;
  for (const size_t i : c10::irange(inputs.size())) {
    const at::Tensor expected = output_of(reference, inputs[i]);
    magnitude += squared_norm(expected);
    for (const size_t m : c10::irange(models.size())) {
      const at::Tensor got = output_of(models[m], inputs[i]);
      TORCH_CHECK(got.sizes() == expected.sizes(), "output_errors: models must give outputs of one shape, got ",
                  expected.sizes(), " and ", got.sizes());
      errors[m] += squared_norm(got - expected);
    }
    if (progress) {
      progress(static_cast<int64_t>(i) + 1, static_cast<int64_t>(inputs.size()));
    }
  }
  TORCH_CHECK(std::isfinite(magnitude) && magnitude > 0,
              "output_errors: the reference's outputs must be finite and not all zero, got a squared norm of ",
              magnitude);
  for (double& error : errors) {
    error = std::sqrt(error / magnitude);
    TORCH_CHECK(std::isfinite(error), "output_errors: outputs must be finite, got an error of ", error);
  }
  return errors;
}

}  // namespace gptq
