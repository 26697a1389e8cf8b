#pragma once

#include <gptq/quantize_weight.h>
#include <torch/custom_class.h>

#include <optional>

namespace gptq {

/// Gathers the Hessian of one linear layer from its inputs and quantizes its weight.
///
/// torch.classes.gptq.GPTQLayer in Python and TorchScript, where quantize returns the tuple (codes, scales, zeros,
/// report), takes the options by name, and writes the weight back if write_back=True. Calls must not overlap in time.
class GPTQLayer : public torch::CustomClassHolder {
 public:
  /// @param weight floating point [N, K], or [K, N] if conv1d (GPT-2's Conv1D), on the CPU; shares memory with the
  ///        caller's tensor
  /// @param bias floating point [N]
  /// @param conv1d whether the weight is stored transposed, [K, N]; the shape alone cannot tell when it is square
  explicit GPTQLayer(at::Tensor weight, std::optional<at::Tensor> bias = std::nullopt, bool conv1d = false);

  /// Adds inputs to the running Hessian H = 2/n Σ x xᵀ over all n input vectors seen, whichever way they were batched.
  /// n counts vectors (tokens), not sequences.
  /// @param input floating point [K] or [..., K], finite, on the CPU. Anything else throws and leaves H as it was.
  void add_batch(const at::Tensor& input);

  /// Quantizes the weight with the Hessian gathered so far; without any input only mode "rtn" is possible. The weight
  /// itself stays as it is, see write_back.
  QuantizeResult quantize(const QuantizeOptions& options = {}) const;

  /// Overwrites the layer's weight with the dequantized one, in the weight's own dtype and orientation.
  void write_back(const QuantizeResult& result);

  /// f32 [K, K], a new tensor; zeros before the first input.
  at::Tensor hessian() const;
  /// Number of input vectors seen.
  int64_t nsamples() const { return nsamples_; }
  /// The weight as it was given.
  const at::Tensor& weight() const { return weight_; }
  /// [N, K] view of the weight, whichever way it is stored.
  at::Tensor weight_nk() const;
  const std::optional<at::Tensor>& bias() const { return bias_; }
  bool conv1d() const { return conv1d_; }

  /// Σ x xᵀ, f32 [K, K], a new tensor: with nsamples what a saved layer needs to go on exactly where it was.
  at::Tensor gram() const;
  /// Replaces what was gathered by the gram() and nsamples() of another layer with the same inputs.
  void set_gram(const at::Tensor& gram, int64_t nsamples);

 private:
  at::Tensor weight_;
  std::optional<at::Tensor> bias_;
  bool conv1d_;
  at::Tensor gram_;  ///< Σ x xᵀ, f32 [K, K], upper triangle only; undefined before the first input
  int64_t nsamples_ = 0;
};

}  // namespace gptq
