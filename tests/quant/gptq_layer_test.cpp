#include <gptq/gptq_layer.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/quant/error_of.h"
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
  QuantizeOptions options;
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
    EXPECT_LE(result.report.loss, result.report.rtn_loss) << bits;
  }
}

TEST(GPTQLayer, Conv1dIsTheTransposedLinear) {
  for (const auto& [n, k] : {std::pair{24, 40}, std::pair{40, 40}, std::pair{1, 3}}) {
    const RandomLayer random = random_layer(n, k, 75);
    for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
      const at::Tensor weight = random.weight.to(dtype), transposed = weight.t().clone(at::MemoryFormat::Contiguous);
      GPTQLayer linear(weight), conv(transposed, at::zeros({n}), /*conv1d=*/true);
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
  EXPECT_TRUE(layer.quantize(rtn).codes.equal(quantize_weight(random.weight, {}, rtn).codes));
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

TEST(GPTQLayer, ContinuesFromASavedSum) {
  const RandomLayer random = random_layer(5, 16, 79, /*samples=*/64);
  GPTQLayer first(random.weight), second(random.weight);
  second.set_gram(second.gram(), second.nsamples());
  EXPECT_EQ(second.nsamples(), 0);
  first.add_batch(random.inputs.narrow(0, 0, 31));
  second.set_gram(first.gram(), first.nsamples());
  for (GPTQLayer* layer : {&first, &second}) {
    layer->add_batch(random.inputs.narrow(0, 31, 33));
  }
  EXPECT_EQ(second.nsamples(), 64);
  EXPECT_TRUE(second.hessian().equal(first.hessian()));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "gram must be [K, K] = [16, 16], got [5, 16]",
                      error_of([&] { first.set_gram(random.weight, 1); }));
}

}  // namespace
}  // namespace gptq
