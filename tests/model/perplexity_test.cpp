#include "model/perplexity.h"

#include "model/checkpoint.h"
#include "tests/model/tiny_gpt2.h"

namespace gptq {
namespace {

using test::TempFolder;

torch::jit::Module tiny_module(uint64_t seed = 0) {
  const TempFolder folder;
  test::write_model(folder, test::tiny_config(), test::tiny_tensors(test::tiny_config(), seed));
  return load_model(folder.path()).module;
}

torch::jit::Module scripted(const std::string& body) {
  torch::jit::Module module("Scripted");
  module.define("def forward(self, x: Tensor):\n" + body);
  return module;
}

// Which tokens are scored, with how much before them: (position, context), the definition taken literally.
std::vector<std::pair<int64_t, int64_t>> naive_accounting(int64_t tokens, int64_t window, int64_t stride) {
  std::vector<std::pair<int64_t, int64_t>> result;
  std::vector<bool> held(static_cast<size_t>(tokens), false);
  for (int64_t begin = 0;; begin += stride) {
    const int64_t end = std::min(begin + window, tokens);
    for (int64_t t = begin; t < end; ++t) {
      if (!held[static_cast<size_t>(t)] && t > begin) result.emplace_back(t, t - begin);
      held[static_cast<size_t>(t)] = true;
    }
    if (end == tokens) return result;
  }
}

TEST(Perplexity, WindowsAndStridesAsDefined) {
  auto module = tiny_module();
  const auto ids = test::random_ids(83, 53);
  const at::Tensor all = at::tensor(ids, at::kLong);
  for (const auto& [window, stride] : {std::pair(41, 41), {41, 0}, {40, 13}, {2, 2}, {2, 1}, {41, 1}, {27, 26}}) {
    double nll = 0;
    const auto scored = naive_accounting(83, window, stride == 0 ? window : stride);
    for (const auto& [position, context] : scored) {
      const at::Tensor input = all.slice(0, position - context, position).unsqueeze(0);
      const at::Tensor logits = forward_logits(module, input)[0][-1].to(at::kDouble);
      nll -= logits.log_softmax(0)[ids[static_cast<size_t>(position)]].item<double>();
    }
    const auto got = evaluate(module, ids, {.window = window, .stride = stride});
    EXPECT_EQ(got.tokens_scored, static_cast<int64_t>(scored.size())) << window << " " << stride;
    // Logits in f32, from products of other shapes, differ by 5e-5 of their size at most (gpt2_test); they are
    // below 20.
    EXPECT_NEAR(got.mean_nll, nll / static_cast<double>(scored.size()), 1e-3) << window << " " << stride;
    EXPECT_DOUBLE_EQ(got.perplexity, std::exp(got.mean_nll));
    EXPECT_FALSE(got.mean_kl);
  }
}

TEST(Perplexity, UniformModelHasThePerplexityOfItsVocabulary) {
  auto module = scripted("    return torch.zeros([1, x.size(1), 50257])\n");
  const auto result = evaluate(module, test::random_ids(301, 50257), {.window = 300});
  EXPECT_EQ(result.tokens_scored, 299);  // the last window has one token, which nothing stands before
  // log_softmax in f32 is off by a few u = 2^-24 of its size 10.8, and the exponential makes that relative.
  EXPECT_NEAR(result.perplexity / 50257, 1, 1e-5);
}

TEST(Perplexity, ComparisonWithAReference) {
  auto module = tiny_module(0);
  auto other = tiny_module(1);
  const auto ids = test::random_ids(60, 53);
  const auto same = evaluate(module, ids, {.window = 20}, &module);
  EXPECT_EQ(same.mean_kl, 0.0);
  EXPECT_EQ(same.top1_agreement, 1.0);
  const auto got = evaluate(module, ids, {.window = 20}, &other);
  double kl = 0;
  double agreed = 0;
  for (int64_t begin = 0; begin < 60; begin += 20) {
    const at::Tensor input = at::tensor(ids, at::kLong).slice(0, begin, begin + 20).unsqueeze(0);
    const at::Tensor q = forward_logits(module, input)[0].slice(0, 0, 19).to(at::kDouble).softmax(1);
    const at::Tensor p = forward_logits(other, input)[0].slice(0, 0, 19).to(at::kDouble).softmax(1);
    kl += (p * (p / q).log()).sum().item<double>();
    agreed += p.argmax(1).eq(q.argmax(1)).sum().item<double>();
  }
  // 53 terms of f32 log-probabilities below 20: 53 * 20 * 2^-24.
  EXPECT_NEAR(*got.mean_kl, kl / 57, 6e-5);
  EXPECT_DOUBLE_EQ(*got.top1_agreement, agreed / 57);
  EXPECT_EQ(got.perplexity, evaluate(module, ids, {.window = 20}).perplexity);
}

TEST(Perplexity, LogitsAloneInATupleOrInADict) {
  const std::string logits = "torch.one_hot(x, 7) * 2.0";
  auto alone = scripted("    return " + logits + "\n");
  auto tuple = scripted("    return " + logits + ", 3\n");
  auto dict = scripted("    return {'loss': x, 'logits': " + logits + "}\n");
  const auto ids = test::random_ids(9, 7);
  const double expected = evaluate(alone, ids, {.window = 9}).perplexity;
  EXPECT_EQ(evaluate(tuple, ids, {.window = 9}).perplexity, expected);
  EXPECT_EQ(evaluate(dict, ids, {.window = 9}).perplexity, expected);
  auto number = scripted("    return 3\n");
  EXPECT_ERROR(evaluate(number, ids, {.window = 9}), "model must return logits");
  auto flat = scripted("    return torch.zeros([7])\n");
  EXPECT_ERROR(evaluate(flat, ids, {.window = 9}), "[batch, tokens, vocabulary] = [1, 9, vocabulary], returned [7]");
  auto integers = scripted("    return torch.one_hot(x, 7)\n");
  EXPECT_ERROR(evaluate(integers, ids, {.window = 9}), "floating-point logits");
}

TEST(Perplexity, ReportsProgress) {
  auto module = tiny_module();
  std::vector<int64_t> done;
  evaluate(module, test::random_ids(83, 53), {.window = 41}, nullptr, [&](int64_t i, int64_t total) {
    EXPECT_EQ(total, 3);
    done.push_back(i);
  });
  EXPECT_EQ(done, (std::vector<int64_t>{1, 2, 3}));
}

TEST(Perplexity, Errors) {
  auto module = tiny_module();
  const auto ids = test::random_ids(20, 53);
  EXPECT_ERROR(evaluate(module, {}, {.window = 8}), "the text must have at least 2 tokens, has 0");
  EXPECT_ERROR(evaluate(module, {1}, {.window = 8}), "the text must have at least 2 tokens, has 1");
  EXPECT_ERROR(evaluate(module, ids, {.window = 21}), "at least one window of 21 tokens, has 20");
  EXPECT_ERROR(evaluate(module, ids, {.window = 1}), "window must be at least 2, got 1");
  EXPECT_ERROR(evaluate(module, ids, {.window = 8, .stride = 9}), "stride must be in 1..window = 1..8, got 9");
  EXPECT_ERROR(evaluate(module, ids, {.window = 8, .stride = -1}), "stride must be");
  auto nan = scripted("    return torch.one_hot(x, 53) * float('nan')\n");
  EXPECT_ERROR(evaluate(nan, ids, {.window = 8}), "logits must be finite");
  auto infinite = scripted("    return torch.one_hot(x, 53) * 1e39\n");
  EXPECT_ERROR(evaluate(infinite, ids, {.window = 8}), "logits must be finite");
  auto narrow = scripted("    return torch.one_hot(x, 54) * 1.0\n");
  EXPECT_ERROR(evaluate(module, ids, {.window = 8}, &narrow), "must have one vocabulary, got 54 and 53");
}

}  // namespace
}  // namespace gptq
