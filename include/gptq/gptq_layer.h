#pragma once

#include <gptq/quantize_weight.h>
#include <torch/custom_class.h>

#include <array>
#include <optional>
#include <vector>

namespace gptq {

/// Gathers the Hessian of one linear layer from its inputs and quantizes its weight.
///
/// torch.classes.gptq.GPTQLayer in Python and TorchScript, where quantize returns the tuple (codes, scales, zeros,
/// report), takes the options by name, and writes the weight back if write_back=True. Calls must not overlap in time.
class GPTQLayer : public torch::CustomClassHolder {
 public:
  /// @param weight floating point [N, K], or [K, N] if conv1d (GPT-2's Conv1D), on the CPU or a CUDA device; shares
  ///        memory with the caller's tensor
  /// @param bias floating point [N]
  /// @param conv1d whether the weight is stored transposed, [K, N]; the shape alone cannot tell when it is square
  /// @param halves whether the Hessian of half of the inputs is kept apart, which search_damping needs; costs memory
  ///        for one more Hessian, and drift
  /// @param drift whether float inputs are gathered as the drift, which target_alpha needs; false: as their mean alone,
  ///        which is enough for correct_bias and saves the larger product of each batch
  explicit GPTQLayer(at::Tensor weight, std::optional<at::Tensor> bias = std::nullopt, bool conv1d = false,
                     bool halves = true, bool drift = true);

  /// Adds inputs to the running Hessian H = 2/n Σ x xᵀ over all n input vectors seen, whichever way they were batched.
  /// n counts vectors (tokens), not sequences. Anything wrong throws and leaves what was gathered as it was.
  /// @param input floating point [K] or [..., K], finite, on the device of the weight, where the sums are kept too
  /// @param float_input the inputs of the same layer in the float model, in the same shape, where input comes from a
  ///        model whose earlier layers are quantized: gathers the drift, see LayerStatistics. With every batch or none.
  /// @param token_weights floating point, integer or bool [...]: how much each vector counts, at least 0, such as an
  ///        attention mask that leaves out padding. H = 2/Σw Σ w x xᵀ; n is the number of vectors with w > 0.
  /// @param drop_nonfinite whether vectors with NaN or Inf are dropped and counted instead of being an error
  void add_batch(const at::Tensor& input, const at::Tensor& float_input = {}, const at::Tensor& token_weights = {},
                 bool drop_nonfinite = false);

  /// Quantizes the weight with what was gathered so far; without any input only mode "rtn" is possible. The weight
  /// itself stays as it is, see write_back. The mean of the inputs is used only if the layer has a bias.
  QuantizeResult quantize(const QuantizeOptions& options = {}) const;

  /// What quantize reads, with the mean and the halves.
  LayerStatistics statistics() const;

  /// Overwrites the layer's weight with the dequantized one, in the weight's own dtype and orientation, and adds the
  /// bias shift, if there is one, to its bias.
  void write_back(const QuantizeResult& result);

  /// f32 [K, K], a new tensor; zeros before the first input.
  at::Tensor hessian() const;
  /// Number of input vectors seen.
  int64_t nsamples() const { return sums_[0].nsamples + sums_[1].nsamples; }
  /// Number of input vectors left out for being NaN or Inf.
  int64_t dropped() const { return dropped_; }
  /// The weight as it was given.
  const at::Tensor& weight() const { return weight_; }
  /// [N, K] view of the weight, whichever way it is stored.
  at::Tensor weight_nk() const;
  const std::optional<at::Tensor>& bias() const { return bias_; }
  bool conv1d() const { return conv1d_; }
  bool halves() const { return halves_; }
  bool drift() const { return drift_; }

  /// What was gathered, to be kept and given to another layer: undefined tensors are replaced by empty ones.
  std::vector<at::Tensor> state() const;
  /// @throws c10::Error if it is not the state() of a layer with as many inputs and the same drift
  void set_state(const std::vector<at::Tensor>& state);

 private:
  /// Sums over half of the inputs: the first of every batch or the rest.
  struct Sums {
    at::Tensor gram;         ///< Σ w x̂ x̂ᵀ, f32 [K, K], upper triangle only; undefined before the first input
    at::Tensor drift;        ///< Σ w (x - x̂) x̂ᵀ, f32 [K, K]; undefined without float inputs or where it is not wanted
    at::Tensor input;        ///< Σ w x̂, f64 [K]
    at::Tensor float_input;  ///< Σ w x, f64 [K]; undefined without float inputs
    double weight = 0;       ///< Σ w
    int64_t nsamples = 0;
  };
  struct Batch;

  Batch checked_batch(const at::Tensor& input, const at::Tensor& float_input, const at::Tensor& token_weights,
                      bool drop_nonfinite) const;
  void check_squares(const at::Tensor& squares, const at::Tensor& rows, const char* name) const;
  void add(const Batch& batch, Sums& sums) const;

  at::Tensor weight_;
  std::optional<at::Tensor> bias_;
  bool conv1d_;
  bool halves_;
  bool drift_;
  std::array<Sums, 2> sums_;
  int64_t dropped_ = 0;
};

}  // namespace gptq
