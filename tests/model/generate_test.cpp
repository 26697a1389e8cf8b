#include "model/generate.h"

#include "model/checkpoint.h"
#include "rewrite/placement.h"
#include "tests/model/tiny_gpt2.h"

namespace gptq {
namespace {

torch::jit::Module tiny_module() {
  const test::TempFolder folder;
  test::write_tiny_gpt2(folder);
  return load_model(folder.path()).module;
}

// Counts up modulo 11, or with the last token of the prompt as the only sequence that matters: (x + 1) % 11.
torch::jit::Module counter() {
  torch::jit::Module module("Counter");
  module.define("def forward(self, x: Tensor):\n    return torch.one_hot((x + 1) % 11, 11) * 5.0\n");
  return module;
}

// The same model without the argument `past`, so that every token is computed anew.
torch::jit::Module without_cache(const torch::jit::Module& model) {
  torch::jit::Module module("WithoutCache");
  module.register_module("model", model);
  module.define("def forward(self, x: Tensor):\n    return self.model.forward(x)[0]\n");
  return module;
}

TEST(Generate, CacheAndRecomputationGiveTheSameTokens) {
  auto cached = tiny_module();
  auto recomputed = without_cache(cached);
  EXPECT_TRUE(takes_past(cached));
  EXPECT_FALSE(takes_past(recomputed));
  for (const int64_t length : {1, 2, 9}) {
    const GenerateOptions options{.max_new_tokens = 30, .context_length = 41};
    const auto prompt = test::random_ids(length, 53, static_cast<uint64_t>(length));
    const auto tokens = generate(cached, prompt, options);
    EXPECT_EQ(tokens.size(), 30u);
    EXPECT_EQ(tokens, generate(recomputed, prompt, options));
  }
}

// What --device cuda makes of a model; a copy for the CPU can run here.
TEST(Generate, ACopyForADeviceGivesTheSameTokens) {
  auto module = tiny_module();
  auto copy = rewrite::copy_to(module, at::kCPU);
  EXPECT_TRUE(takes_past(copy));
  const GenerateOptions options{.max_new_tokens = 30, .context_length = 41};
  EXPECT_EQ(generate(copy, {3, 1}, options), generate(module, {3, 1}, options));
}

TEST(Generate, StopsAtEndOfTextAndAtTheContextLength) {
  auto module = counter();
  std::vector<int64_t> seen;
  const auto tokens = generate(module, {0, 3}, {.max_new_tokens = 20, .eos_token_ids = {9, 7}},
                               [&](int64_t token) { seen.push_back(token); });
  EXPECT_EQ(tokens, (std::vector<int64_t>{4, 5, 6, 7}));
  EXPECT_EQ(seen, tokens);
  EXPECT_EQ(generate(module, {0, 3}, {.max_new_tokens = 20, .context_length = 5}), (std::vector<int64_t>{4, 5, 6}));
  EXPECT_EQ(generate(module, {9}, {.max_new_tokens = 3}), (std::vector<int64_t>{10, 0, 1}));
  EXPECT_TRUE(generate(module, {9}, {.max_new_tokens = 0}).empty());
}

TEST(Generate, DrawsFollowSeedTemperatureAndTopK) {
  auto module = tiny_module();
  GenerateOptions options{.max_new_tokens = 30, .context_length = 41, .temperature = 1.0, .seed = 5};
  const auto tokens = generate(module, {1, 2}, options);
  EXPECT_EQ(tokens, generate(module, {1, 2}, options));
  options.seed = 6;
  EXPECT_NE(tokens, generate(module, {1, 2}, options));
  options.top_k = 1;
  const auto greedy = generate(module, {1, 2}, {.max_new_tokens = 30, .context_length = 41});
  EXPECT_EQ(greedy, generate(module, {1, 2}, options));
}

TEST(Generate, DrawsHaveTheProbabilitiesOfTheModel) {
  torch::jit::Module module("Fixed");
  module.define(
      "def forward(self, x: Tensor):\n    return torch.log(torch.arange(1, 5) * 0.1).expand([1, x.size(1), 4])\n");
  std::vector<int64_t> counts(4);
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    ++counts[static_cast<size_t>(generate(module, {0}, {.max_new_tokens = 1, .temperature = 1, .seed = seed})[0])];
  }
  // Five standard deviations of a binomial count with p = 0.1 (i + 1): the seeds are fixed, so this cannot vary.
  for (int64_t i = 0; i < 4; ++i) {
    const double p = 0.1 * static_cast<double>(i + 1);
    EXPECT_NEAR(counts[static_cast<size_t>(i)], 2000 * p, 5 * std::sqrt(2000 * p * (1 - p))) << i;
  }
}

TEST(Generate, Errors) {
  auto module = counter();
  EXPECT_ERROR(generate(module, {}, {}), "prompt must have at least one token");
  EXPECT_ERROR(generate(module, {1, 2}, {.context_length = 2}), "fewer tokens than the context length = 2, has 2");
  EXPECT_ERROR(generate(module, {1}, {.max_new_tokens = -1}), "max_new_tokens must be at least 0, got -1");
  EXPECT_ERROR(generate(module, {1}, {.temperature = -0.5}), "temperature must be at least 0, got -0.5");
  EXPECT_ERROR(generate(module, {1}, {.top_k = -1}), "top_k must be at least 0, got -1");
  torch::jit::Module nan("NotANumber");
  nan.define("def forward(self, x: Tensor):\n    return torch.one_hot(x, 11) * float('nan')\n");
  EXPECT_ERROR(generate(nan, {1}, {}), "logits must be finite");
}

}  // namespace
}  // namespace gptq
