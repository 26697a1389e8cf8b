#include "model/perplexity.h"

#include <torch/script.h>

#include <algorithm>
#include <cmath>

namespace gptq {

namespace {

// Rows of the vocabulary that are held in log-probabilities at a time.
constexpr int64_t kChunkElements = int64_t{1} << 22;

struct Sums {
  double nll = 0;
  double kl = 0;
  int64_t agreed = 0;
  int64_t scored = 0;
};

at::Tensor log_probabilities(const at::Tensor& logits) {
  const at::Tensor result = at::log_softmax(logits.to(at::kFloat), -1);
  const auto [low, high] = at::aminmax(result);
  TORCH_CHECK(std::isfinite(low.item<float>()) && std::isfinite(high.item<float>()),
              "evaluate: logits must be finite, the model returned others");
  return result;
}

// Adds the scores of the targets, [count], given the logits before them, [count, V].
void add_scores(const at::Tensor& logits, const at::Tensor& reference, const at::Tensor& targets, Sums& sums) {
  const int64_t count = targets.size(0);
  const int64_t vocabulary = logits.size(1);
  const int64_t chunk = std::max<int64_t>(1, kChunkElements / vocabulary);
  for (int64_t begin = 0; begin < count; begin += chunk) {
    const int64_t rows = std::min(chunk, count - begin);
    const at::Tensor log_q = log_probabilities(logits.narrow(0, begin, rows));
    const at::Tensor picked = log_q.gather(1, targets.narrow(0, begin, rows).unsqueeze(1));
    sums.nll -= picked.sum(at::kDouble).item<double>();
    if (!reference.defined()) continue;
    const at::Tensor log_p = log_probabilities(reference.narrow(0, begin, rows));
    sums.kl += (log_p.exp() * (log_p - log_q)).sum(at::kDouble).item<double>();
    sums.agreed += log_p.argmax(1).eq(log_q.argmax(1)).sum().item<int64_t>();
  }
  sums.scored += count;
}

void check_arguments(const std::vector<int64_t>& ids, int64_t window, int64_t stride) {
  const auto tokens = static_cast<int64_t>(ids.size());
  TORCH_CHECK(window >= 2, "evaluate: window must be at least 2, got ", window);
  TORCH_CHECK(stride >= 1 && stride <= window, "evaluate: stride must be in 1..window = 1..", window, ", got ", stride);
  TORCH_CHECK(tokens >= 2, "evaluate: the text must have at least 2 tokens, has ", tokens);
  TORCH_CHECK(tokens >= window, "evaluate: the text must have at least one window of ", window, " tokens, has ",
              tokens);
}

}  // namespace

at::Tensor logits_of(const c10::IValue& output) {
  if (output.isTensor()) return output.toTensor();
  if (output.isTuple() && !output.toTupleRef().elements().empty() && output.toTupleRef().elements()[0].isTensor()) {
    return output.toTupleRef().elements()[0].toTensor();
  }
  if (output.isGenericDict()) {
    const auto dict = output.toGenericDict();
    const auto found = dict.find("logits");
    if (found != dict.end() && found->value().isTensor()) return found->value().toTensor();
  }
  TORCH_CHECK(false, "model must return logits as a tensor, first in a tuple or under \"logits\" in a dict, returned ",
              output.tagKind());
}

at::Tensor forward_logits(torch::jit::Module& module, const at::Tensor& ids) {
  const at::Tensor logits = logits_of(module.forward({ids}));
  TORCH_CHECK(logits.dim() == 3 && logits.size(0) == ids.size(0) && logits.size(1) == ids.size(1),
              "model must return logits [batch, tokens, vocabulary] = [", ids.size(0), ", ", ids.size(1),
              ", vocabulary], returned ", logits.sizes());
  TORCH_CHECK(logits.is_floating_point(), "model must return floating-point logits, returned ", logits.dtype().name());
  return logits;
}

Evaluation evaluate(torch::jit::Module& module, const std::vector<int64_t>& ids, const EvaluationOptions& options,
                    torch::jit::Module* reference, const Progress& progress) {
  const int64_t window = options.window;
  const int64_t stride = options.stride == 0 ? window : options.stride;
  check_arguments(ids, window, stride);
  const at::NoGradGuard no_grad;
  const auto tokens = static_cast<int64_t>(ids.size());
  const at::Tensor all = at::tensor(ids, at::kLong);
  const int64_t windows = (tokens - window + stride - 1) / stride + 1;
  Sums sums;
  int64_t seen = 1;  // the first token of the text has nothing before it
  for (int64_t i = 0; i < windows; ++i) {
    const int64_t begin = i * stride;
    const int64_t end = std::min(begin + window, tokens);
    const int64_t first = std::max(seen, begin + 1);
    if (end > first) {
      const at::Tensor input = all.slice(0, begin, end).unsqueeze(0);
      const auto scored = [&](torch::jit::Module& model) {
        return forward_logits(model, input)[0].slice(0, first - 1 - begin, end - 1 - begin);
      };
      const at::Tensor logits = scored(module);
      const at::Tensor expected = reference == nullptr ? at::Tensor() : scored(*reference);
      TORCH_CHECK(!expected.defined() || expected.size(1) == logits.size(1),
                  "evaluate: module and reference must have one vocabulary, got ", logits.size(1), " and ",
                  expected.size(1));
      add_scores(logits, expected, all.slice(0, first, end), sums);
    }
    seen = end;
    if (progress) progress(i + 1, windows);
  }
  Evaluation result;
  const auto scored = static_cast<double>(sums.scored);
  result.mean_nll = sums.nll / scored;
  result.perplexity = std::exp(result.mean_nll);
  result.tokens_scored = sums.scored;
  if (reference != nullptr) {
    result.mean_kl = sums.kl / scored;
    result.top1_agreement = static_cast<double>(sums.agreed) / scored;
  }
  return result;
}

}  // namespace gptq
