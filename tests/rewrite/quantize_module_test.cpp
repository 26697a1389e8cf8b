#include <ATen/Parallel.h>
#include <gptq/gptq_layer.h>
#include <gptq/linear_w4.h>
#include <gptq/pack_w4.h>
#include <gptq/quantize_module.h>
#include <gtest/gtest.h>
#include <torch/script.h>

#include <sstream>

#include "tests/rewrite/modules.h"

namespace gptq {
namespace {

using test::calibration_inputs;
using test::compose;
using test::conv1d;
using test::linear;
using test::options_with_group;
using test::random_tensor;
using test::two_layers;

at::Tensor run(torch::jit::Module& module, const at::Tensor& input) {
  const at::NoGradGuard no_grad;
  return module.forward({input}).toTensor();
}

at::Tensor weight_of(const torch::jit::Module& module, const std::string& part) {
  return module.attr(part).toModule().attr("weight").toTensor();
}

at::Tensor bias_of(const torch::jit::Module& module, const std::string& part) {
  return module.attr(part).toModule().attr("bias").toTensor();
}

/// What quantizing one layer by hand on these inputs gives.
QuantizeResult by_hand(const at::Tensor& stored, bool transposed, const std::vector<at::Tensor>& inputs,
                       const QuantizeOptions& options) {
  GPTQLayer layer(stored, std::nullopt, transposed);
  for (const at::Tensor& input : inputs) {
    layer.add_batch(input);
  }
  return layer.quantize(options);
}

at::Tensor apply(const QuantizeResult& result, const at::Tensor& input, const at::Tensor& bias) {
  const at::NoGradGuard no_grad;
  return linear_w4(input, pack_w4(result.codes), result.scales, std::nullopt, bias, std::nullopt, result.group_size);
}

std::vector<at::Tensor> tensors_of(const std::vector<std::vector<c10::IValue>>& calibration) {
  std::vector<at::Tensor> tensors;
  for (const auto& inputs : calibration) {
    tensors.push_back(inputs[0].toTensor());
  }
  return tensors;
}

TEST(QuantizeModule, CalibratesEachLayerOnTheQuantizedPrefix) {
  torch::jit::Module model = two_layers();
  const auto calibration = calibration_inputs(3, {5, 16}, 100);
  const QuantizeModuleOptions options = options_with_group(8);
  QuantizedModule quantized = quantize_module(model, calibration, options);

  std::vector<at::Tensor> inputs = tensors_of(calibration);
  const QuantizeResult first = by_hand(weight_of(model, "first"), false, inputs, options.quantize);
  for (at::Tensor& input : inputs) {
    input = at::relu(apply(first, input, bias_of(model, "first")));
  }
  const QuantizeResult second = by_hand(weight_of(model, "second"), false, inputs, options.quantize);

  ASSERT_EQ(quantized.layers.size(), 2u);
  EXPECT_EQ(quantized.layers[0].name, "first");
  EXPECT_EQ(quantized.layers[1].name, "second");
  EXPECT_TRUE(at::equal(quantized.layers[0].packed, pack_w4(first.codes)));
  EXPECT_TRUE(at::equal(quantized.layers[1].packed, pack_w4(second.codes)));
  EXPECT_EQ(quantized.layers[0].input_error, 0.0);
  EXPECT_GT(quantized.layers[1].input_error, 0.0);
  EXPECT_EQ(quantized.layers[1].nsamples, 15);

  const at::Tensor x = random_tensor({7, 16}, 200);
  const at::Tensor expected =
      apply(second, at::relu(apply(first, x, bias_of(model, "first"))), bias_of(model, "second"));
  EXPECT_TRUE(at::equal(run(quantized.module, x), expected));
}

TEST(QuantizeModule, AimsAtTheFloatModelsOutputs) {
  torch::jit::Module model = two_layers();
  const auto calibration = calibration_inputs(6, {25, 16}, 100);
  QuantizeModuleOptions options = options_with_group(8);
  options.quantize.target_alpha = 0.5;
  const QuantizedModule quantized = quantize_module(model, calibration, options);

  std::vector<at::Tensor> inputs = tensors_of(calibration);
  const QuantizeResult first = by_hand(weight_of(model, "first"), false, inputs, options.quantize);
  EXPECT_TRUE(at::equal(quantized.layers[0].packed, pack_w4(first.codes)));  // nothing before it has drifted
  GPTQLayer second(weight_of(model, "second"), std::nullopt, false, /*halves=*/false);
  for (const at::Tensor& input : inputs) {
    const at::NoGradGuard no_grad;
    const at::Tensor x = at::relu(at::linear(input, weight_of(model, "first"), bias_of(model, "first")));
    const at::Tensor x_hat = at::relu(apply(first, input, bias_of(model, "first")));
    second.add_batch(x_hat, x);
  }
  const QuantizeResult expected = quantize_weight(weight_of(model, "second"), second.statistics(), options.quantize);
  EXPECT_EQ(quantized.layers[1].report.loss, expected.report.loss);
  options.quantize.target_alpha = 0;
  const double unmoved = quantize_weight(weight_of(model, "second"), second.hessian(), options.quantize).report.loss;
  EXPECT_GT(std::abs(unmoved - expected.report.loss), 1e-2 * expected.report.loss);
}

TEST(QuantizeModule, ChainsLayersWithNothingBetweenThem) {
  torch::jit::Module model = compose({{"a", linear(9, 7, 1)}, {"b", linear(5, 9, 3)}, {"c", linear(3, 5, 5)}},
                                     "def forward(self, x: Tensor) -> Tensor:\n"
                                     "    return self.c.forward(self.b.forward(self.a.forward(x)))\n");
  QuantizedModule quantized = quantize_module(model, calibration_inputs(4, {11, 7}, 7), options_with_group(4));
  ASSERT_EQ(quantized.layers.size(), 3u);
  EXPECT_EQ(run(quantized.module, random_tensor({2, 7}, 1)).sizes(), (std::vector<int64_t>{2, 3}));
}

TEST(QuantizeModule, TakesConv1dWeightsTransposedWhenSquare) {
  torch::jit::Module model =
      compose({{"fc", conv1d(12, 12, 1)}}, "def forward(self, x: Tensor) -> Tensor:\n    return self.fc.forward(x)\n");
  const auto calibration = calibration_inputs(2, {3, 8, 12}, 50);
  const QuantizeModuleOptions options = options_with_group(-1);
  QuantizedModule quantized = quantize_module(model, calibration, options);
  ASSERT_EQ(quantized.layers.size(), 1u);
  EXPECT_TRUE(quantized.layers[0].conv1d);
  const QuantizeResult expected = by_hand(weight_of(model, "fc"), true, tensors_of(calibration), options.quantize);
  EXPECT_TRUE(at::equal(quantized.layers[0].packed, pack_w4(expected.codes)));

  const at::Tensor x = random_tensor({2, 3, 12}, 9);
  const at::Tensor y = run(quantized.module, x);
  EXPECT_TRUE(at::equal(y, apply(expected, x, bias_of(model, "fc"))));
}

TEST(QuantizeModule, SharesTheHessianOfLayersThatReadTheSameTensor) {
  torch::jit::Module model = compose({{"q", linear(8, 16, 1)}, {"k", linear(8, 16, 3)}, {"v", linear(8, 16, 5)}},
                                     "def forward(self, x: Tensor) -> Tensor:\n"
                                     "    q = self.q.forward(x)\n"
                                     "    k = self.k.forward(x.view([-1, 16]))\n"
                                     "    return q * k.view(q.size()) + self.v.forward(x)\n");
  const auto calibration = calibration_inputs(2, {6, 16}, 21);
  const QuantizeModuleOptions options = options_with_group(8);
  const QuantizedModule quantized = quantize_module(model, calibration, options);
  ASSERT_EQ(quantized.layers.size(), 3u);
  for (const QuantizedLinear& layer : quantized.layers) {
    const QuantizeResult expected =
        by_hand(weight_of(model, layer.name), false, tensors_of(calibration), options.quantize);
    EXPECT_TRUE(at::equal(layer.packed, pack_w4(expected.codes))) << layer.name;
    EXPECT_EQ(layer.nsamples, 12) << layer.name;
    EXPECT_EQ(layer.input_error, 0.0) << layer.name;
  }
}

TEST(QuantizeModule, QuantizesALayerThatIsCalledTwiceOnceOnAllItsInputs) {
  torch::jit::Module model = compose({{"fc", linear(6, 6, 1)}},
                                     "def forward(self, x: Tensor) -> Tensor:\n"
                                     "    return self.fc.forward(torch.tanh(self.fc.forward(x)))\n");
  const auto calibration = calibration_inputs(3, {4, 6}, 33);
  const QuantizeModuleOptions options = options_with_group(3);
  QuantizedModule quantized = quantize_module(model, calibration, options);
  ASSERT_EQ(quantized.layers.size(), 1u);
  EXPECT_EQ(quantized.layers[0].nsamples, 24);

  std::vector<at::Tensor> inputs;
  for (const at::Tensor& x : tensors_of(calibration)) {
    const at::NoGradGuard no_grad;
    inputs.push_back(x);
    inputs.push_back(at::tanh(at::linear(x, weight_of(model, "fc"), bias_of(model, "fc"))));
  }
  // The inputs are added in another order than above, so that the Hessians differ by their rounding.
  const QuantizeResult expected = by_hand(weight_of(model, "fc"), false, inputs, options.quantize);
  EXPECT_NEAR(quantized.layers[0].report.loss, expected.report.loss, 1e-4 * expected.report.loss);
  const at::Tensor x = random_tensor({2, 6}, 4);
  EXPECT_EQ(run(quantized.module, x).sizes(), x.sizes());
}

// A square weight, so that nothing but the result would show it if one were taken for the other.
TEST(QuantizeModule, AWeightUsedBothWaysRoundIsTwoLayers) {
  torch::jit::Module model("Tied");
  model.register_parameter("w", random_tensor({16, 16}, 1, 0.3), false);
  model.define("def forward(self, x: Tensor) -> Tensor:\n    return torch.relu(x.matmul(self.w.t())).matmul(self.w)\n");
  model.eval();
  for (torch::jit::Module each : {model, torch::jit::freeze(model)}) {
    QuantizeModuleOptions options = options_with_group(8);
    options.quantize.bits = 8;
    QuantizedModule quantized = quantize_module(each, calibration_inputs(3, {20, 16}, 33), options);
    ASSERT_EQ(quantized.layers.size(), 2u);
    EXPECT_NE(quantized.layers[1].name, quantized.layers[0].name);
    const at::Tensor x = random_tensor({30, 16}, 4), expected = run(each, x);
    const at::Tensor error = run(quantized.module, x) - expected;
    EXPECT_LT(at::linalg_vector_norm(error).item<float>(), 0.02 * at::linalg_vector_norm(expected).item<float>());
  }
}

TEST(QuantizeModule, ReachesLinearsInsideLoopsAndBranches) {
  torch::jit::Module model = compose({{"fc", linear(6, 6, 1)}, {"gate", linear(6, 6, 9)}},
                                     "def forward(self, x: Tensor) -> Tensor:\n"
                                     "    for i in range(int(x.size(0))):\n"
                                     "        if i % 2 == 0:\n"
                                     "            x = x + torch.tanh(self.fc.forward(x))\n"
                                     "    return self.gate.forward(x)\n");
  const QuantizedModule quantized = quantize_module(model, calibration_inputs(3, {4, 6}, 12), options_with_group(6));
  ASSERT_EQ(quantized.layers.size(), 2u);
  EXPECT_EQ(quantized.layers[0].name, "fc");
  EXPECT_EQ(quantized.layers[0].nsamples, 3 * 2 * 4);  // inputs x even iterations x rows
  EXPECT_EQ(quantized.layers[1].nsamples, 3 * 4);
}

TEST(QuantizeModule, QuantizesALayerThatIsUsedInsideALoopAndOutside) {
  torch::jit::Module model = compose({{"fc", linear(8, 8, 1)}},
                                     "def forward(self, x: Tensor) -> Tensor:\n"
                                     "    x = torch.relu(self.fc.forward(x))\n"
                                     "    for i in range(int(x[0, 0]) + 3):\n"
                                     "        x = torch.relu(self.fc.forward(x))\n"
                                     "    return self.fc.forward(x)\n");
  const QuantizedModule quantized = quantize_module(model, calibration_inputs(2, {5, 8}, 100), options_with_group(8));
  ASSERT_EQ(quantized.layers.size(), 1u);
  EXPECT_GE(quantized.layers[0].nsamples, 2 * 5 * 5);
}

TEST(QuantizeModule, LeavesOutWhatTheCallerSkips) {
  torch::jit::Module model = compose({{"body", linear(8, 8, 1)}, {"lm_head", linear(4, 8, 3)}},
                                     "def forward(self, x: Tensor) -> Tensor:\n"
                                     "    return self.lm_head.forward(self.body.forward(x))\n");
  QuantizeModuleOptions options = options_with_group(8);
  options.skip = [](const std::string& name) { return name == "lm_head"; };
  const QuantizedModule quantized = quantize_module(model, calibration_inputs(2, {5, 8}, 3), options);
  ASSERT_EQ(quantized.layers.size(), 1u);
  EXPECT_TRUE(at::equal(weight_of(quantized.module, "lm_head"), weight_of(model, "lm_head")));
  EXPECT_FALSE(quantized.module.attr("body").toModule().hasattr("weight"));
  EXPECT_TRUE(quantized.module.attr("body").toModule().hasattr("packed"));
}

TEST(QuantizeModule, LeavesTheCallersModuleAsItWas) {
  torch::jit::Module model =
      compose({{"fc", linear(8, 8, 1)}}, "def forward(self, x: Tensor) -> Tensor:\n    return self.fc.forward(x)\n");
  const at::Tensor weight = weight_of(model, "fc").clone();
  const at::Tensor x = random_tensor({3, 8}, 2);
  const at::Tensor before = run(model, x);
  quantize_module(model, calibration_inputs(2, {5, 8}, 3), options_with_group(8));
  EXPECT_TRUE(at::equal(weight_of(model, "fc"), weight));
  EXPECT_TRUE(at::equal(run(model, x), before));
}

TEST(QuantizeModule, BiasesTakeTheMeanErrorOfTheOutputs) {
  for (const int64_t bits : {3, 4}) {
    torch::jit::Module model = two_layers();
    const auto calibration = calibration_inputs(4, {50, 16}, 100);
    QuantizeModuleOptions options = options_with_group(8);
    options.quantize.bits = bits;
    options.quantize.correct_bias = true;
    QuantizedModule quantized = quantize_module(model, calibration, options);
    at::Tensor error = at::zeros({10});
    for (const auto& inputs : calibration) {
      error += (run(quantized.module, inputs[0].toTensor()) - run(model, inputs[0].toTensor())).mean(0) / 4;
    }
    // Means, products and sums in float32 of outputs of size 1.
    EXPECT_LE(error.abs().max().item<float>(), 1e-5) << bits;
    EXPECT_FALSE(at::equal(quantized.layers[1].bias, bias_of(model, "second")));
    options.quantize.correct_bias = false;
    EXPECT_FALSE(quantize_module(model, calibration, options).layers[1].bias.defined());
  }
}

TEST(QuantizeModule, DynamicOrderRunsWithItsInputOrder) {
  torch::jit::Module model = two_layers();
  const auto calibration = calibration_inputs(3, {20, 16}, 100);
  QuantizeModuleOptions options = options_with_group(8);
  options.quantize.act_order = "dynamic";
  QuantizedModule packed = quantize_module(model, calibration, options);
  ASSERT_TRUE(packed.layers[0].input_order.defined());
  const QuantizeResult expected = by_hand(weight_of(model, "first"), false, tensors_of(calibration), options.quantize);
  const at::Tensor x = random_tensor({7, 16}, 200);
  const at::Tensor hidden = at::relu(at::linear(x, expected.dequantize(), bias_of(model, "first")));
  const at::Tensor y = run(packed.module, x) - at::linear(hidden, at::zeros({10, 24}), bias_of(model, "second"));
  EXPECT_EQ(y.sizes(), (std::vector<int64_t>{7, 10}));
  const at::Tensor unpacked = dequantize_w4(packed.layers[1].packed, packed.layers[1].scales, std::nullopt, 24, 8)
                                  .index_select(1, at::argsort(packed.layers[1].input_order.to(at::kLong)));
  EXPECT_TRUE(y.allclose(hidden.mm(unpacked.t()), 1e-4, 1e-4));
}

TEST(QuantizeModule, TakesOptionsLayerByLayer) {
  QuantizeModuleOptions options = options_with_group(8);
  options.quantize_layer = [&](const std::string& name) {
    QuantizeOptions result = options.quantize;
    result.bits = name == "first" ? 8 : 4;
    return result;
  };
  const QuantizedModule quantized = quantize_module(two_layers(), calibration_inputs(2, {20, 16}, 100), options);
  EXPECT_EQ(quantized.layers[0].bits, 8);
  EXPECT_EQ(quantized.layers[0].packed.sizes(), at::IntArrayRef({2, 2, 128}));
  EXPECT_EQ(quantized.layers[1].bits, 4);
  EXPECT_EQ(quantized.layers[1].packed.sizes(), at::IntArrayRef({1, 3, 64}));
  const std::vector<PackedLinearInfo> found = find_packed_linears(quantized.module);
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(std::pair(found[0].in_features, found[0].stored_bits), std::pair(int64_t{16}, int64_t{8}));
  EXPECT_EQ(std::pair(found[1].in_features, found[1].stored_bits), std::pair(int64_t{24}, int64_t{4}));
}

TEST(QuantizeModule, LayersOfOneInputMayNeedDifferentStatistics) {
  const torch::jit::Module model =
      compose({{"first", linear(24, 16, 1)}, {"plain", linear(10, 24, 3)}, {"searched", linear(6, 24, 5)}},
              "def forward(self, x: Tensor) -> Tensor:\n"
              "    y = torch.relu(self.first.forward(x))\n"
              "    return torch.cat([self.plain.forward(y), self.searched.forward(y)], -1)\n");
  const auto calibration = calibration_inputs(3, {20, 16}, 100);
  QuantizeModuleOptions all = options_with_group(8), one = options_with_group(8);
  all.quantize.search_damping = true;
  all.quantize.target_alpha = 1;
  one.quantize_layer = [&](const std::string& name) { return name == "plain" ? one.quantize : all.quantize; };
  const QuantizedModule expected = quantize_module(model.clone(), calibration, all);
  const QuantizedModule found = quantize_module(model.clone(), calibration, one);
  EXPECT_TRUE(found.layers[2].packed.equal(expected.layers[2].packed));
  EXPECT_TRUE(found.layers[2].scales.equal(expected.layers[2].scales));
  EXPECT_FALSE(found.layers[1].scales.equal(expected.layers[1].scales) &&
               found.layers[1].packed.equal(expected.layers[1].packed));
}

TEST(QuantizeModule, TellsWhichWeightIsAnEmbeddingToo) {
  torch::jit::Module model("Tied");
  model.register_parameter("table", random_tensor({20, 8}, 1), false);
  model.register_module("fc", linear(8, 8, 2));
  model.define(
      "def forward(self, ids: Tensor) -> Tensor:\n"
      "    return torch.linear(self.fc.forward(torch.embedding(self.table, ids)), self.table)\n");
  model.eval();
  for (const torch::jit::Module& each : {model, torch::jit::freeze(model)}) {
    const std::vector<LinearInfo> found = find_linears(each);
    ASSERT_EQ(found.size(), 2u);
    EXPECT_FALSE(found[0].embedding);
    EXPECT_TRUE(found[1].embedding);
  }
}

// Whatever holds it, the weight of a layer alone is the one that quantize_weight gives.
TEST(QuantizeModule, RunsEveryNumberOfBits) {
  for (const int64_t bits : {2, 3, 4, 5, 8}) {
    for (const int64_t group_size : {-1, 4, 5}) {  // of 12 inputs: 5 leaves a short group
      for (const char* act_order : {"off", "dynamic"}) {
        torch::jit::Module model = compose({{"a", conv1d(5, 12, 1)}},
                                           "def forward(self, x: Tensor) -> Tensor:\n"
                                           "    return self.a.forward(x)\n");
        const auto calibration = calibration_inputs(2, {2, 20, 12}, 3);
        QuantizeModuleOptions options = options_with_group(group_size);
        options.quantize.bits = bits;
        options.quantize.act_order = act_order;
        QuantizedModule quantized = quantize_module(model, calibration, options);
        ASSERT_EQ(quantized.layers.size(), 1u);
        const at::Tensor weight =
            by_hand(weight_of(model, "a"), true, tensors_of(calibration), options.quantize).dequantize();
        const at::Tensor x = random_tensor({3, 4, 12}, 8);
        const at::Tensor expected = at::linear(x, weight, bias_of(model, "a"));
        // 24 terms at most, each below 10, rounded to float32 by either side.
        EXPECT_LT((run(quantized.module, x) - expected).abs().max().item<float>(), 2 * 24 * 10 * 6e-8)
            << bits << " bits, group size " << group_size << ", act-order " << act_order;
      }
    }
  }
}

TEST(QuantizeModule, InputsInThreadsOfTheirOwnGiveTheSame) {
  const auto module = compose({{"first", linear(80, 64, 91)}, {"second", conv1d(48, 80, 92)}},
                              "def forward(self, x: Tensor) -> Tensor:\n"
                              "    return self.second.forward(torch.relu(self.first.forward(x)))\n");
  std::vector<std::vector<c10::IValue>> calibration;
  for (int64_t i = 0; i < 13; ++i) {
    calibration.push_back({random_tensor({1, 30 + i, 64}, 93 + i)});
  }
  const auto with_threads = [&](int threads) {
    at::set_num_threads(threads);
    return quantize_module(module, calibration, options_with_group(16)).layers;
  };
  const int before = at::get_num_threads();
  const auto together = with_threads(10), apart = with_threads(3), one = with_threads(1);
  at::set_num_threads(before);
  for (const auto* layers : {&apart, &one}) {
    ASSERT_EQ(layers->size(), 2);
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_EQ(layers->at(i).nsamples, together[i].nsamples);
      // The order of float32 sums may differ, and a code on the edge with it.
      EXPECT_NEAR(layers->at(i).report.loss / together[i].report.loss, 1, 1e-3);
      EXPECT_NEAR(layers->at(i).report.rtn_loss / together[i].report.rtn_loss, 1, 1e-4);
    }
  }
}

TEST(QuantizeModule, SurvivesSavingAndLoading) {
  torch::jit::Module model = compose({{"0", conv1d(16, 8, 1)}, {"1", linear(4, 16, 3)}},
                                     "def forward(self, x: Tensor) -> Tensor:\n"
                                     "    return getattr(self, \"1\").forward(getattr(self, \"0\").forward(x))\n");
  QuantizedModule quantized = quantize_module(model, calibration_inputs(2, {2, 5, 8}, 3), options_with_group(4));
  std::stringstream file;
  quantized.module.save(file);
  torch::jit::Module loaded = torch::jit::load(file);
  const at::Tensor x = random_tensor({1, 4, 8}, 8);
  EXPECT_TRUE(at::equal(run(loaded, x), run(quantized.module, x)));
}

TEST(QuantizeModule, QuantizesAFrozenModule) {
  torch::jit::Module model = torch::jit::freeze(compose({{"a", linear(8, 6, 1)}, {"b", linear(4, 8, 3)}},
                                                        "def forward(self, x: Tensor) -> Tensor:\n"
                                                        "    return self.b.forward(torch.relu(self.a.forward(x)))\n"));
  QuantizedModule quantized = quantize_module(model, calibration_inputs(2, {5, 6}, 3), options_with_group(4));
  EXPECT_EQ(quantized.layers.size(), 2u);
  EXPECT_EQ(run(quantized.module, random_tensor({3, 6}, 1)).sizes(), (std::vector<int64_t>{3, 4}));
}

TEST(QuantizeModule, RoundsToNearestWithoutCalibration) {
  torch::jit::Module model =
      compose({{"fc", linear(8, 8, 1)}}, "def forward(self, x: Tensor) -> Tensor:\n    return self.fc.forward(x)\n");
  QuantizeModuleOptions options = options_with_group(4);
  EXPECT_THROW(quantize_module(model, {}, options), c10::Error);
  options.quantize.mode = "rtn";
  const QuantizedModule quantized = quantize_module(model, {}, options);
  const QuantizeResult expected = quantize_weight(weight_of(model, "fc"), at::eye(8), options.quantize);
  EXPECT_TRUE(at::equal(quantized.layers.at(0).packed, pack_w4(expected.codes)));
}

TEST(QuantizeModule, NamesTheLayerThatIsAtFault) {
  torch::jit::Module model =
      compose({{"fc", linear(8, 8, 1)}}, "def forward(self, x: Tensor) -> Tensor:\n    return self.fc.forward(x)\n");
  std::vector<std::vector<c10::IValue>> calibration = calibration_inputs(1, {5, 8}, 3);
  calibration[0][0].toTensor()[2][3] = std::nan("");
  try {
    quantize_module(model, calibration, options_with_group(8));
    FAIL() << "a NaN in the calibration inputs went unnoticed";
  } catch (const c10::Error& error) {
    EXPECT_NE(error.msg().find("fc: "), std::string::npos) << error.msg();
  }
}

TEST(QuantizeModule, RefusesAModuleInTrainingMode) {
  torch::jit::Module model = linear(8, 8, 1);
  model.register_attribute("training", c10::BoolType::get(), true);
  EXPECT_THROW(quantize_module(model, calibration_inputs(1, {5, 8}, 3), {}), c10::Error);
}

}  // namespace
}  // namespace gptq
