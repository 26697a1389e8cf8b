#include "model/generate.h"

#include <torch/script.h>

#include <algorithm>
#include <random>

#include "model/perplexity.h"
#include "rewrite/placement.h"

namespace gptq {

namespace {

// Next-token logits, with the cache if the module has one.
class Decoder {
 public:
  explicit Decoder(torch::jit::Module& module) : module_(module), cached_(takes_past(module)) {}

  // @return [V], the prediction after all tokens given so far and these
  at::Tensor next(const std::vector<int64_t>& tokens) {
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
    at::Tensor logits;
    if (cached_) {
      const at::Tensor input = at::tensor(tokens, at::kLong).unsqueeze(0).to(rewrite::device_of(module_));
      const auto output = module_.forward({input, past_});
      logits = logits_of(output);
      past_ = output.toTupleRef().elements()[1];
    } else {
      logits = forward_logits(module_, at::tensor(tokens_, at::kLong).unsqueeze(0));
    }
    return logits.select(0, 0).select(0, -1).to(at::kCPU, at::kFloat);
  }

 private:
  torch::jit::Module& module_;
  bool cached_;
  c10::IValue past_;
  std::vector<int64_t> tokens_;
};

// A draw from the softmax of logits [V] / temperature among the top_k largest.
int64_t sample(const at::Tensor& logits, const GenerateOptions& options, std::mt19937_64& generator) {
  const int64_t vocabulary = logits.size(0);
  const int64_t kept = options.top_k == 0 ? vocabulary : std::min(options.top_k, vocabulary);
  const auto [values, indices] = logits.to(at::kDouble).topk(kept);
  const at::Tensor cumulative = at::softmax(values / options.temperature, 0).cumsum(0).contiguous();
  // 53 bits make a double in [0, 1); the standard distributions differ between libraries.
  const double draw = static_cast<double>(generator() >> 11) * 0x1p-53;
  const double* begin = cumulative.const_data_ptr<double>();
  const double* found = std::upper_bound(begin, begin + kept, draw * begin[kept - 1]);
  return indices[std::min<int64_t>(found - begin, kept - 1)].item<int64_t>();
}

int64_t pick(const at::Tensor& logits, const GenerateOptions& options, std::mt19937_64& generator) {
  TORCH_CHECK(at::isfinite(logits).all().item<bool>(), "generate: logits must be finite, the model returned others");
  return options.temperature == 0 ? logits.argmax().item<int64_t>() : sample(logits, options, generator);
}

void check_arguments(const std::vector<int64_t>& prompt, const GenerateOptions& options) {
  TORCH_CHECK(!prompt.empty(), "generate: prompt must have at least one token, has none");
  TORCH_CHECK(options.max_new_tokens >= 0, "generate: max_new_tokens must be at least 0, got ", options.max_new_tokens);
  TORCH_CHECK(options.temperature >= 0, "generate: temperature must be at least 0, got ", options.temperature);
  TORCH_CHECK(options.top_k >= 0, "generate: top_k must be at least 0, got ", options.top_k);
  TORCH_CHECK(!options.context_length || static_cast<int64_t>(prompt.size()) < *options.context_length,
              "generate: prompt must have fewer tokens than the context length = ", options.context_length.value_or(0),
              ", has ", prompt.size());
}

}  // namespace

bool takes_past(const torch::jit::Module& module) {
  const auto method = module.find_method("forward");
  if (!method) return false;
  const auto& schema = method->function().getSchema();
  const auto& arguments = schema.arguments();
  return arguments.size() == 3 && arguments[2].name() == "past" && schema.returns().size() == 1 &&
         schema.returns()[0].type()->kind() == c10::TypeKind::TupleType;
}

std::vector<int64_t> generate(torch::jit::Module& module, const std::vector<int64_t>& prompt,
                              const GenerateOptions& options, const std::function<void(int64_t)>& on_token) {
  check_arguments(prompt, options);
  const at::NoGradGuard no_grad;
  int64_t limit = options.max_new_tokens;
  if (options.context_length) limit = std::min(limit, *options.context_length - static_cast<int64_t>(prompt.size()));
  std::mt19937_64 generator(options.seed);
  Decoder decoder(module);
  std::vector<int64_t> result;
  std::vector<int64_t> input = prompt;
  while (static_cast<int64_t>(result.size()) < limit) {
    const int64_t token = pick(decoder.next(input), options, generator);
    result.push_back(token);
    if (on_token) on_token(token);
    const auto& ends = options.eos_token_ids;
    if (std::find(ends.begin(), ends.end(), token) != ends.end()) break;
    input = {token};
  }
  return result;
}

}  // namespace gptq
