#include <gptq/quantize_module.h>
#include <gtest/gtest.h>
#include <torch/script.h>

#include <cmath>

#include "tests/rewrite/modules.h"

namespace gptq {
namespace {

using test::compose;
using test::linear;
using test::options_with_group;
using test::random_tensor;
using test::two_layers;

TEST(QuantizeModule, PaddingIsNotCounted) {
  torch::jit::Module model = two_layers();
  QuantizeModuleOptions options = options_with_group(8);
  const at::Tensor input = random_tensor({2, 15, 16}, 300), mask = at::arange(30).remainder(5).lt(3).view({2, 15});
  const at::Tensor kept = input.view({30, 16}).index_select(0, mask.flatten().nonzero().squeeze(1));
  const QuantizedModule expected = quantize_module(model, {{kept}}, options);
  options.token_weights = {mask};
  const QuantizedModule quantized = quantize_module(model, {{input}}, options);
  for (const size_t layer : {0, 1}) {
    EXPECT_EQ(quantized.layers[layer].nsamples, 18);
    EXPECT_TRUE(at::equal(quantized.layers[layer].packed, expected.layers[layer].packed));
  }
  options.token_weights = {mask.view({30}).narrow(0, 0, 29)};
  EXPECT_THROW(quantize_module(model, {{input}}, options), c10::Error);
  options.token_weights = {mask, mask};
  EXPECT_THROW(quantize_module(model, {{input}}, options), c10::Error);
}

// A branch that is always taken: what is gathered in it is what would be gathered outside.
TEST(QuantizeModule, PaddingIsNotCountedInsideABranchEither) {
  const std::vector<std::pair<std::string, torch::jit::Module>> parts = {{"fc", linear(24, 16, 1)}};
  torch::jit::Module plain = compose(parts, "def forward(self, x: Tensor) -> Tensor:\n    return self.fc.forward(x)\n");
  torch::jit::Module branching = compose(parts,
                                         "def forward(self, x: Tensor) -> Tensor:\n"
                                         "    if x.size(0) > 0:\n"
                                         "        x = self.fc.forward(x)\n"
                                         "    return x\n");
  QuantizeModuleOptions options = options_with_group(8);
  options.drop_nonfinite = true;
  std::vector<std::vector<c10::IValue>> calibration;
  for (const uint64_t seed : {300, 301}) {
    at::Tensor input = random_tensor({2, 15, 16}, seed);
    input[0][1][2] = std::nan("");
    calibration.push_back({input});
    options.token_weights.push_back(at::arange(30).remainder(seed - 295).lt(3));
  }
  const QuantizedLinear expected = quantize_module(plain, calibration, options).layers.at(0);
  const QuantizedLinear quantized = quantize_module(branching, calibration, options).layers.at(0);
  EXPECT_EQ(quantized.nsamples, expected.nsamples);
  EXPECT_LT(quantized.nsamples, 40);
  EXPECT_EQ(quantized.dropped, 2);
  EXPECT_TRUE(at::equal(quantized.packed, expected.packed));
  options.token_weights[1] = at::ones({29});
  try {
    quantize_module(branching, calibration, options);
    FAIL() << "29 token weights for 30 vectors went unnoticed";
  } catch (const c10::Error& error) {
    EXPECT_EQ(error.msg().find("fc: observe: token_weights must have one element for each vector"), 0) << error.msg();
  }
}

TEST(QuantizeModule, DropsVectorsThatAreNotFiniteWhereAsked) {
  at::Tensor input = random_tensor({20, 16}, 301);
  input[4][3] = std::nan("");
  QuantizeModuleOptions options = options_with_group(8);
  EXPECT_THROW(quantize_module(two_layers(), {{input}}, options), c10::Error);
  options.drop_nonfinite = true;
  const QuantizedModule quantized = quantize_module(two_layers(), {{input}}, options);
  EXPECT_EQ(quantized.layers[0].nsamples, 19);
  EXPECT_EQ(quantized.layers[0].dropped, 1);
  EXPECT_EQ(quantized.layers[1].dropped, 1);
}

}  // namespace
}  // namespace gptq
