#include "model/perplexity.h"

#include <torch/script.h>

#include <algorithm>
#include <cmath>

#include "rewrite/placement.h"

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

Evaluation finished(const Sums& sums, bool compared) {
  Evaluation result;
  const auto scored = static_cast<double>(sums.scored);
  result.mean_nll = sums.nll / scored;
  result.perplexity = std::exp(result.mean_nll);
  result.tokens_scored = sums.scored;
  if (compared) {
    result.mean_kl = sums.kl / scored;
    result.top1_agreement = static_cast<double>(sums.agreed) / scored;
  }
  return result;
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
  const at::Tensor logits = logits_of(module.forward({ids.to(rewrite::device_of(module))}));
  TORCH_CHECK(logits.dim() == 3 && logits.size(0) == ids.size(0) && logits.size(1) == ids.size(1),
              "model must return logits [batch, tokens, vocabulary] = [", ids.size(0), ", ", ids.size(1),
              ", vocabulary], returned ", logits.sizes());
  TORCH_CHECK(logits.is_floating_point(), "model must return floating-point logits, returned ", logits.dtype().name());
  return logits;
}

void check_evaluation(const std::vector<int64_t>& ids, const EvaluationOptions& options) {
  const auto tokens = static_cast<int64_t>(ids.size());
  const int64_t window = options.window;
  const int64_t stride = options.effective_stride();
  TORCH_CHECK(window >= 2, "evaluate: window must be at least 2, got ", window);
  TORCH_CHECK(stride >= 1 && stride <= window, "evaluate: stride must be in 1..window = 1..", window, ", got ", stride);
  TORCH_CHECK(tokens >= 2, "evaluate: the text must have at least 2 tokens, has ", tokens);
  TORCH_CHECK(tokens >= window, "evaluate: the text must have at least one window of ", window, " tokens, has ",
              tokens);
}

std::vector<Evaluation> evaluate(std::vector<torch::jit::Module> models, const std::vector<int64_t>& ids,
                                 const EvaluationOptions& options, const EvaluationProgress& progress) {
  check_evaluation(ids, options);
  const int64_t window = options.window;
  const int64_t stride = options.effective_stride();
  const at::NoGradGuard no_grad;
  const auto tokens = static_cast<int64_t>(ids.size());
  const at::Tensor all = at::tensor(ids, at::kLong);
  const int64_t windows = (tokens - window + stride - 1) / stride + 1;
  std::vector<Sums> sums(models.size());
  int64_t seen = 1;  // the first token of the text has nothing before it
  for (int64_t i = 0; i < windows; ++i) {
    const int64_t begin = i * stride;
    const int64_t end = std::min(begin + window, tokens);
    const int64_t first = std::max(seen, begin + 1);
    if (end > first) {
      const at::Tensor input = all.slice(0, begin, end).unsqueeze(0);
      at::Tensor reference;
      for (size_t m = 0; m < models.size(); ++m) {
        const at::Tensor logits = forward_logits(models[m], input)[0].slice(0, first - 1 - begin, end - 1 - begin);
        TORCH_CHECK(m == 0 || reference.size(1) == logits.size(1), "evaluate: models must have one vocabulary, got ",
                    reference.size(1), " and ", logits.size(1));
        add_scores(logits, reference, all.slice(0, first, end).to(logits.device()), sums[m]);
        if (m == 0) reference = logits;
      }
    }
    seen = end;
    if (progress) progress(i + 1, windows);
  }
  std::vector<Evaluation> results;
  results.reserve(models.size());
  for (size_t m = 0; m < models.size(); ++m) {
    results.push_back(finished(sums[m], m > 0));
  }
  return results;
}

Evaluation evaluate(torch::jit::Module& module, const std::vector<int64_t>& ids, const EvaluationOptions& options,
                    torch::jit::Module* reference, const EvaluationProgress& progress) {
  std::vector<torch::jit::Module> models{module};
  if (reference != nullptr) models.insert(models.begin(), *reference);
  return evaluate(std::move(models), ids, options, progress).back();
}

}  // namespace gptq
