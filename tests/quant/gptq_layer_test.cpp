#include <gptq/gptq_layer.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/error_of.h"
#include "tests/quant/plain_options.h"
#include "tests/quant/random_layer.h"
#include "tests/reference.h"

namespace gptq {
namespace {

using test::error_of;
using test::random_layer;
using test::RandomLayer;

TEST(GPTQLayer, GathersTheHessianHoweverInputsAreBatched) {
  const RandomLayer layer = random_layer(8, 70, 71, /*samples=*/120);
  const at::Tensor inputs = layer.inputs.to(at::kFloat);
  const at::Tensor exact = inputs.to(at::kDouble).t().mm(inputs.to(at::kDouble)) * (2.0 / 120);
  const at::Tensor norms = exact.diagonal().sqrt();
  const at::Tensor bound = norms.unsqueeze(1) * norms * (123 * 6e-8);  // 120 float32 sums and a scale
  for (const int split : {0, 1, 2, 3}) {
    GPTQLayer gathered(layer.weight);
    EXPECT_EQ(gathered.nsamples(), 0);
    EXPECT_TRUE(gathered.hessian().equal(at::zeros({70, 70})));
    if (split == 0) {
      gathered.add_batch(inputs);
    } else if (split == 1) {
      gathered.add_batch(inputs.view({3, 40, 70}));
    } else if (split == 2) {
      for (int64_t i = 0; i < 120; ++i) {
        gathered.add_batch(inputs[i]);
      }
    } else {
      gathered.add_batch(inputs.narrow(0, 0, 20).view({2, 5, 2, 70}));
      gathered.add_batch(inputs.narrow(0, 0, 0));
      gathered.add_batch(inputs.narrow(0, 20, 100).to(at::kDouble));
    }
    EXPECT_EQ(gathered.nsamples(), 120);
    EXPECT_TRUE(gathered.hessian().sub(exact).abs().le(bound).all().item<bool>()) << split;
  }
}

TEST(GPTQLayer, DoesNotDriftOverManyBatches) {
  GPTQLayer layer(at::ones({1, 3}));
  const at::Tensor input = at::tensor({1.0f, -0.5f, 2.0f}).view({1, 3});
  for (int i = 0; i < 5000; ++i) {
    layer.add_batch(input);
  }
  // Sums of 5000 equal small integers and quarters are exact in float32; only the scale rounds.
  EXPECT_TRUE(layer.hessian().allclose(2 * input.t().mm(input), /*rtol=*/1.2e-7, /*atol=*/0));
}

TEST(GPTQLayer, HalfPrecisionInputsCountAtTheirValue) {
  const RandomLayer layer = random_layer(4, 20, 72);
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    GPTQLayer half(layer.weight), full(layer.weight);
    half.add_batch(layer.inputs.to(dtype));
    full.add_batch(layer.inputs.to(dtype).to(at::kFloat));
    EXPECT_TRUE(half.hessian().equal(full.hessian()));
  }
}

TEST(GPTQLayer, Linear128To256WithTenBatches) {
  const at::Tensor weight = random_layer(256, 128, 73).weight.to(at::kFloat) * 0.05;
  const at::Tensor inputs = random_layer(1, 128, 74, /*samples=*/10 * 32).inputs.to(at::kFloat);
  GPTQLayer flat(weight), deep(weight);
  for (int64_t batch = 0; batch < 10; ++batch) {
    flat.add_batch(inputs.narrow(0, batch, 1));
    deep.add_batch(inputs.narrow(0, batch * 32, 32).view({4, 8, 128}));
  }
  EXPECT_EQ(flat.nsamples(), 10);
  EXPECT_EQ(deep.nsamples(), 320);
  for (const GPTQLayer* layer : {&flat, &deep}) {
    const QuantizeResult result = layer->quantize();
    EXPECT_EQ(result.codes.sizes(), at::IntArrayRef({256, 128}));
    EXPECT_EQ(result.scales.sizes(), at::IntArrayRef({1, 256}));
    EXPECT_LT(result.report.loss, result.report.rtn_loss);
  }
  QuantizeOptions per_tensor;
  per_tensor.per_tensor = true;
  const QuantizeResult result = deep.quantize(per_tensor);
  deep.write_back(result);
  EXPECT_LE(std::get<0>(at::_unique(weight)).numel(), 16);
}

TEST(GPTQLayer, ThreeWeightsFiveVectors) {
  const at::Tensor weight = at::tensor({0.6, -0.4, 0.8}, at::kDouble).view({1, 3});
  const at::Tensor inputs =
      at::tensor({1.2, 0.3, 0.8, 0.5, 1.8, 0.2, 0.9, 0.4, 1.5, 0.3, 1.1, 0.7, 1.0, 0.6, 0.9}, at::kDouble).view({5, 3});
  QuantizeOptions options = test::plain_options();
  options.act_order = "off";
  for (const int64_t bits : {2, 3, 4, 8}) {
    options.bits = bits;
    GPTQLayer layer(weight);
    layer.add_batch(inputs);
    const QuantizeResult result = layer.quantize(options);
    const auto h = reference::Matrix(inputs.t().mm(inputs) * (2.0 / 5));
    auto groups = reference::make_groups(reference::Matrix(weight), bits, -1, true);
    const auto expected = reference::obq(reference::Matrix(weight), reference::damped(h, 0.01), groups, {0, 1, 2});
    ASSERT_GT(expected.least_margin(), 1e-4);  // H is gathered in float32
    EXPECT_EQ(reference::Matrix(result.codes).values, expected.codes.values) << bits;
    EXPECT_LE(result.report.loss, result.report.rtn_loss * (1 + 1e-6)) << bits;  // two sums in another order
  }
}

TEST(GPTQLayer, Conv1dIsTheTransposedLinear) {
  for (const auto& [n, k] : {std::pair{24, 40}, std::pair{40, 40}, std::pair{1, 3}}) {
    const RandomLayer random = random_layer(n, k, 75);
    for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
      const at::Tensor weight = random.weight.to(dtype), transposed = weight.t().clone(at::MemoryFormat::Contiguous);
      GPTQLayer linear(weight, at::zeros({n})), conv(transposed, at::zeros({n}), /*conv1d=*/true);
      EXPECT_TRUE(conv.weight_nk().equal(weight));
      linear.add_batch(random.inputs);
      conv.add_batch(random.inputs);
      const QuantizeResult a = linear.quantize(), b = conv.quantize();
      EXPECT_TRUE(a.codes.equal(b.codes));
      linear.write_back(a);
      conv.write_back(b);
      EXPECT_TRUE(weight.equal(a.dequantize().to(dtype)));
      EXPECT_TRUE(transposed.equal(weight.t()));
      EXPECT_EQ(transposed.sizes(), at::IntArrayRef({k, n}));
    }
  }
}

TEST(GPTQLayer, WritesIntoAParameterInPlace) {
  const RandomLayer random = random_layer(6, 10, 76);
  const at::Tensor weight = random.weight.to(at::kFloat).requires_grad_();
  const void* data = weight.data_ptr();
  const at::Tensor before = weight.detach().clone();
  GPTQLayer layer(weight);
  layer.add_batch(random.inputs);
  const QuantizeResult result = layer.quantize();
  EXPECT_TRUE(weight.detach().equal(before));
  layer.write_back(result);
  EXPECT_TRUE(weight.detach().equal(result.dequantize()));
  EXPECT_EQ(weight.data_ptr(), data);
  EXPECT_TRUE(weight.requires_grad());
}

TEST(GPTQLayer, BadInputThrowsAndChangesNothing) {
  const RandomLayer random = random_layer(5, 6, 77);
  GPTQLayer layer(random.weight);
  const auto expect = [&](const at::Tensor& input, const char* part) {
    const at::Tensor before = layer.hessian();
    const int64_t samples = layer.nsamples();
    EXPECT_PRED_FORMAT2(testing::IsSubstring, part, error_of([&] { layer.add_batch(input); }));
    EXPECT_TRUE(layer.hessian().equal(before));
    EXPECT_EQ(layer.nsamples(), samples);
  };
  for (const int64_t samples : {0, 20}) {
    if (samples > 0) {
      layer.add_batch(random.inputs.narrow(0, 0, samples));
    }
    at::Tensor bad = at::ones({4, 6});
    bad[1][2] = std::nan("");
    bad[3][0] = -INFINITY;
    expect(bad, "add_batch: input must be finite in float32, got 2 NaN or Inf values of 24");
    expect(at::full({2, 6}, 1e300, at::kDouble), "got 12 NaN or Inf values of 12");
    expect(at::full({2, 6}, 1e19), "add_batch: input is too large");
    expect(at::ones({4, 7}), "input must be [..., K] = [..., 6], got [4, 7]");
    expect(at::ones({}), "got []");
    expect(at::ones({4, 6}, at::kMeta), "input must be on the device of the weight, cpu, got meta");
    expect(at::ones({4, 6}, at::kInt), "input must be floating point, got Int");
  }
}

TEST(GPTQLayer, NeedsInputExceptToRoundToNearest) {
  const RandomLayer random = random_layer(5, 6, 78);
  GPTQLayer layer(random.weight);
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "quantize in mode \"default\" needs at least one input from add_batch",
                      error_of([&] { layer.quantize(); }));
  QuantizeOptions rtn;
  rtn.mode = "rtn";
  EXPECT_TRUE(layer.quantize(rtn).codes.equal(quantize_weight(random.weight, at::Tensor(), rtn).codes));
}

TEST(GPTQLayer, RejectsBadArguments) {
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "weight must be [N, K] with N and K at least 1, got [3]",
                      error_of([] { GPTQLayer(at::ones({3})); }));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "weight must be floating point, got Int",
                      error_of([] { GPTQLayer(at::ones({3, 4}, at::kInt)); }));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "bias must be [N] = [3], got [4]",
                      error_of([] { GPTQLayer(at::ones({3, 4}), at::ones({4})); }));
  EXPECT_EQ(error_of([] { GPTQLayer(at::ones({3, 4}), at::ones({4}), true); }), "no error");
}

TEST(GPTQLayer, WriteBackRejectsWhatDoesNotFit) {
  at::Tensor weight = at::full({1, 4}, -65472.0, at::kHalf);  // code 0 stands for 8 steps of 65472 / 7.5
  const at::Tensor before = weight.clone();
  GPTQLayer layer(weight);
  QuantizeOptions rtn;
  rtn.mode = "rtn";
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "the dequantized weight must be finite in the Half",
                      error_of([&] { layer.write_back(layer.quantize(rtn)); }));
  EXPECT_TRUE(weight.equal(before));
  GPTQLayer other(at::ones({2, 4}));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "codes must be [N, K] = [2, 4], got [1, 4]",
                      error_of([&] { other.write_back(layer.quantize(rtn)); }));
}

TEST(GPTQLayer, ContinuesFromASavedState) {
  const RandomLayer random = random_layer(5, 16, 79, /*samples=*/64);
  for (const bool with_float_inputs : {false, true}) {
    GPTQLayer first(random.weight), second(random.weight);
    second.set_state(second.state());
    EXPECT_EQ(second.nsamples(), 0);
    const auto add = [&](GPTQLayer& layer, int64_t begin, int64_t count) {
      const at::Tensor inputs = random.inputs.narrow(0, begin, count);
      layer.add_batch(inputs, with_float_inputs ? inputs * 1.25 : at::Tensor());
    };
    add(first, 0, 31);
    second.set_state(first.state());
    add(first, 31, 33);
    add(second, 31, 33);
    EXPECT_EQ(second.nsamples(), 64);
    EXPECT_TRUE(second.hessian().equal(first.hessian()));
    const std::vector<at::Tensor> a = first.state(), b = second.state();
    for (size_t i = 0; i < a.size(); ++i) {
      EXPECT_TRUE(a[i].equal(b[i])) << i;
    }
    std::vector<at::Tensor> bad = a;
    bad[0] = random.weight;
    EXPECT_PRED_FORMAT2(testing::IsSubstring, "tensor 0 must be empty or [16, 16], got [5, 16]",
                        error_of([&] { first.set_state(bad); }));
    bad = a;
    bad[4] = at::tensor({-1.0, 2.0}, at::kDouble);
    EXPECT_PRED_FORMAT2(testing::IsSubstring, "counts must be at least 0", error_of([&] { first.set_state(bad); }));
    bad = a;
    bad[0] = at::empty({0});
    EXPECT_PRED_FORMAT2(testing::IsSubstring, "must be there together", error_of([&] { first.set_state(bad); }));
    bad.pop_back();
    EXPECT_PRED_FORMAT2(testing::IsSubstring, "must hold 11 tensors, got 10", error_of([&] { first.set_state(bad); }));
  }
}

at::Tensor hessian_of(const at::Tensor& inputs) {
  return inputs.t().mm(inputs) * (2.0 / static_cast<double>(inputs.size(0)));
}

TEST(GPTQLayer, GathersDriftMeansAndHalves) {
  const RandomLayer random = random_layer(3, 40, 81, /*samples=*/50), other = random_layer(3, 40, 82, 50);
  const at::Tensor inputs = (random.inputs + 0.5).to(at::kFloat).to(at::kDouble);
  const at::Tensor float_inputs = (inputs + 0.1 * other.inputs).to(at::kFloat).to(at::kDouble);
  GPTQLayer layer(random.weight);
  layer.add_batch(inputs.narrow(0, 0, 21), float_inputs.narrow(0, 0, 21));
  layer.add_batch(inputs.narrow(0, 21, 29).view({1, 29, 40}), float_inputs.narrow(0, 21, 29).view({1, 29, 40}));
  const LayerStatistics statistics = layer.statistics();
  EXPECT_EQ(statistics.nsamples, 50);
  EXPECT_TRUE(statistics.mean.allclose(inputs.mean(0), 1e-6, 1e-6));
  EXPECT_TRUE(statistics.float_mean.allclose(float_inputs.mean(0), 1e-6, 1e-6));
  const at::Tensor difference = float_inputs - inputs;
  const at::Tensor drift = difference.t().mm(inputs) * (2.0 / 50);
  // Factors and sums in bfloat16, see product_test.
  const at::Tensor size = difference.abs().t().mm(inputs.abs()) * (2.0 / 50);
  EXPECT_TRUE(statistics.drift.sub(drift).abs().le(size * (3.2 / 512)).all().item<bool>());
  // The second half of each batch: 11 of 21, then 14 of 29 since the first batch was odd.
  const at::Tensor half = at::cat({inputs.narrow(0, 10, 11), inputs.narrow(0, 36, 14)});
  EXPECT_TRUE(statistics.half_hessian.to(at::kDouble).allclose(hessian_of(half), 1e-5, 1e-4));
  EXPECT_PRED_FORMAT2(testing::IsSubstring,
                      "float_input must be given with every batch or none, got none after 50 with",
                      error_of([&] { layer.add_batch(inputs); }));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "float_input must have the shape of input, [50, 40], got [40, 50]",
                      error_of([&] { layer.add_batch(inputs, float_inputs.t()); }));
}

TEST(GPTQLayer, GathersTheMeanOfFloatInputsWithoutDrift) {
  const RandomLayer random = random_layer(5, 24, 84, /*samples=*/60), other = random_layer(5, 24, 85, 60);
  const at::Tensor float_inputs = random.inputs + 0.3 * other.inputs;
  const at::Tensor bias = at::zeros({5});
  GPTQLayer with(random.weight, bias, false, /*halves=*/false);
  GPTQLayer without(random.weight, bias, false, /*halves=*/false, /*drift=*/false);
  GPTQLayer continued(random.weight, bias, false, /*halves=*/false, /*drift=*/false);
  with.add_batch(random.inputs, float_inputs);
  without.add_batch(random.inputs.narrow(0, 0, 30), float_inputs.narrow(0, 0, 30));
  continued.set_state(without.state());
  without.add_batch(random.inputs.narrow(0, 30, 30), float_inputs.narrow(0, 30, 30));
  continued.add_batch(random.inputs.narrow(0, 30, 30), float_inputs.narrow(0, 30, 30));
  const LayerStatistics statistics = without.statistics();
  EXPECT_FALSE(statistics.drift.defined());
  EXPECT_FALSE(statistics.half_hessian.defined());
  EXPECT_TRUE(statistics.float_mean.allclose(float_inputs.mean(0), 1e-6, 1e-6));
  const std::vector<at::Tensor> a = without.state(), b = continued.state();
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_TRUE(a[i].equal(b[i])) << i;
  }

  QuantizeOptions options;
  options.correct_bias = true;
  const QuantizeResult unmoved = without.quantize(options);
  EXPECT_FALSE(unmoved.codes.equal(with.quantize(options).codes));
  options.target_alpha = 0;
  const QuantizeResult expected = with.quantize(options);
  EXPECT_TRUE(unmoved.codes.equal(expected.codes));
  // The Hessians of one and of two batches differ in roundings.
  EXPECT_TRUE(unmoved.bias_shift.allclose(expected.bias_shift, 1e-4, 1e-5));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "state must be that of a layer with drift false, is not",
                      error_of([&] { without.set_state(with.state()); }));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "state must be that of a layer with drift true, is not",
                      error_of([&] { with.set_state(without.state()); }));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "float_input must be given with every batch or none, got none after 60",
                      error_of([&] { without.add_batch(random.inputs); }));
}

TEST(GPTQLayer, TokenWeightsCountVectorsSoManyTimes) {
  const RandomLayer random = random_layer(3, 24, 83, /*samples=*/30);
  const at::Tensor inputs = random.inputs.view({5, 6, 24}), float_inputs = inputs * 1.5;
  const at::Tensor weights = at::arange(30, at::kLong).remainder(3).view({5, 6});  // 0, 1 or 2
  const at::Tensor repeated = random.inputs.repeat_interleave(weights.flatten(), 0);
  GPTQLayer weighted(random.weight), plain(random.weight), masked(random.weight), kept(random.weight);
  weighted.add_batch(inputs, float_inputs, weights);
  plain.add_batch(repeated, repeated * 1.5);
  EXPECT_EQ(weighted.nsamples(), 20);
  const LayerStatistics a = weighted.statistics(), b = plain.statistics();
  EXPECT_TRUE(a.hessian.allclose(b.hessian, 1e-5, 1e-5));
  EXPECT_TRUE(a.mean.allclose(b.mean, 1e-6, 1e-7));
  EXPECT_TRUE(a.float_mean.allclose(b.float_mean, 1e-6, 1e-7));
  const at::Tensor size = repeated.abs().t().mm(repeated.abs()) * (0.5 * 2.0 / 30);
  EXPECT_TRUE(a.drift.sub(b.drift).abs().le(size * (6.4 / 512)).all().item<bool>());  // two bfloat16 products

  masked.add_batch(inputs, {}, weights.gt(0));
  kept.add_batch(random.inputs.index_select(0, weights.flatten().nonzero().squeeze(1)));
  EXPECT_TRUE(masked.hessian().equal(kept.hessian()));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "input without its last dimension, [5, 6], got [30]",
                      error_of([&] { masked.add_batch(inputs, {}, weights.flatten()); }));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "token_weights must be finite and at least 0, got values from -1 to 1",
                      error_of([&] { masked.add_batch(inputs, {}, weights - 1); }));
  masked.add_batch(inputs, {}, at::zeros({5, 6}));
  EXPECT_EQ(masked.nsamples(), 20);
}

TEST(GPTQLayer, DropsAndCountsVectorsThatAreNotFinite) {
  const RandomLayer random = random_layer(3, 24, 84, /*samples=*/30);
  at::Tensor inputs = random.inputs.clone();
  inputs[3][5] = std::nan("");
  inputs[3][6] = INFINITY;
  inputs[20][0] = -INFINITY;
  GPTQLayer dropping(random.weight), clean(random.weight);
  dropping.add_batch(inputs, {}, {}, /*drop_nonfinite=*/true);
  EXPECT_EQ(dropping.dropped(), 2);
  EXPECT_EQ(dropping.nsamples(), 28);
  clean.add_batch(at::cat({inputs.narrow(0, 0, 3), inputs.narrow(0, 4, 16), inputs.narrow(0, 21, 9)}));
  EXPECT_TRUE(dropping.hessian().equal(clean.hessian()));
  EXPECT_EQ(clean.dropped(), 0);
  dropping.add_batch(at::full({2, 24}, INFINITY), {}, {}, true);
  EXPECT_EQ(dropping.dropped(), 4);
}

TEST(GPTQLayer, TheBiasTakesTheMeanErrorOnlyIfThereIsOne) {
  const RandomLayer random = random_layer(6, 24, 85);
  const at::Tensor inputs = random.inputs + 1, weight = random.weight.clone();
  QuantizeOptions options;
  options.correct_bias = true;
  GPTQLayer without(weight);
  without.add_batch(inputs);
  EXPECT_FALSE(without.quantize(options).bias_shift.defined());
  const at::Tensor bias = random.weight.select(1, 0).clone(), before = bias.clone();
  GPTQLayer layer(weight, bias);
  layer.add_batch(inputs);
  const QuantizeResult result = layer.quantize(options);
  EXPECT_TRUE(bias.equal(before));
  layer.write_back(result);
  EXPECT_TRUE(bias.equal(before + result.bias_shift));
  const at::Tensor error = inputs.mm(random.weight.t()) + before - inputs.mm(weight.t()) - bias;
  EXPECT_LE(error.mean(0).abs().max().item<double>(), 1e-5);  // the shift is float32
}

}  // namespace
}  // namespace gptq
