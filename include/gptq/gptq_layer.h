#pragma once

#include <gptq/quantize_weight.h>
#include <torch/custom_class.h>

#include <optional>

namespace gptq {

/// Gathers the Hessian of one linear layer from its inputs and quantizes its weight.
///
/// torch.classes.gptq.GPTQLayer in Python and TorchScript.
class GPTQLayer : public torch::CustomClassHolder {
 public:
  /// @param weight floating point [N, K], or [K, N] if conv1d (GPT-2's Conv1D); kept by reference
  /// @param bias [N]
  /// @param conv1d whether the weight is stored transposed, [K, N]; the shape alone cannot tell when it is square
  explicit GPTQLayer(at::Tensor weight, std::optional<at::Tensor> bias = std::nullopt, bool conv1d = false);

  /// Adds inputs to the running Hessian H = 2/n Σ x xᵀ over all n input vectors seen.
  /// @param input floating point [n, K] or [..., K]
  void add_batch(const at::Tensor& input);

  /// Quantizes the weight with the Hessian gathered so far. The weight itself stays as it is, see write_back.
  QuantizeResult quantize(const QuantizeOptions& options = {}) const;

  /// Overwrites the layer's weight with the dequantized one, in the weight's own dtype and orientation.
  void write_back(const QuantizeResult& result);

  /// f32 [K, K]
  at::Tensor hessian() const;
  /// Number of input vectors seen.
  int64_t nsamples() const { return nsamples_; }
  /// [N, K] view of the weight, whichever way it is stored.
  at::Tensor weight_nk() const;
  const std::optional<at::Tensor>& bias() const { return bias_; }
  bool conv1d() const { return conv1d_; }

 private:
  at::Tensor weight_;
  std::optional<at::Tensor> bias_;
  bool conv1d_;
  at::Tensor hessian_;
  int64_t nsamples_ = 0;
};

}  // namespace gptq
