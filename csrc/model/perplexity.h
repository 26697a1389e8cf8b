#pragma once

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

namespace gptq {

/// How a text is scored. Tokens b .. min(b + window, n) - 1 are one call of the model, for b = 0, stride, 2 stride, ...
/// until a window reaches the end. In each window the tokens that no window before it held are scored, each given all
/// that stand before it in the window; the first token of a window never is, since nothing stands before it. A last
/// window of one token scores nothing. With stride = window (no overlap) each window of t tokens thus scores t - 1, and
/// with a smaller stride each after the first scores `stride` (the recipe of the Hugging Face documentation).
struct EvaluationOptions {
  int64_t window = 1024;
  int64_t stride = 0;  ///< 1..window; 0: window

  int64_t effective_stride() const { return stride == 0 ? window : stride; }
};

struct Evaluation {
  double perplexity = 0;  ///< exp(mean_nll)
  double mean_nll = 0;    ///< negative log-likelihood per scored token, nats
  int64_t tokens_scored = 0;
  std::optional<double> mean_kl;         ///< KL(reference || module) per scored token, nats; with a reference only
  std::optional<double> top1_agreement;  ///< share of scored tokens where both put the same token first
};

/// Windows done and windows in all.
using EvaluationProgress = std::function<void(int64_t done, int64_t total)>;

/// Perplexity of a text under a language model, and with a reference how far the two models' predictions lie apart.
///
/// @param module on any device, where the ids are copied to; forward(ids i64 [1, T]) -> logits [1, T, V], alone, first
/// in a tuple or under "logits" in a dict
/// @param ids at least one window of tokens
/// @param reference float model that the module was made from, or nullptr
/// @throws c10::Error if ids are fewer than 2 or than a window, the options are out of range or logits are not finite
Evaluation evaluate(torch::jit::Module& module, const std::vector<int64_t>& ids, const EvaluationOptions& options,
                    torch::jit::Module* reference = nullptr, const EvaluationProgress& progress = {});

/// One evaluation a model, all on one device, each call of the models made once; all after the first are compared with
/// the first.
std::vector<Evaluation> evaluate(std::vector<torch::jit::Module> models, const std::vector<int64_t>& ids,
                                 const EvaluationOptions& options, const EvaluationProgress& progress = {});

/// Throws what evaluate throws for the options and the number of tokens, before long work is begun.
void check_evaluation(const std::vector<int64_t>& ids, const EvaluationOptions& options);

/// Logits [1, T, V] of a call with these ids, out of whatever the module returns.
at::Tensor forward_logits(torch::jit::Module& module, const at::Tensor& ids);

/// The logits in what a language model returned.
at::Tensor logits_of(const c10::IValue& output);

}  // namespace gptq
