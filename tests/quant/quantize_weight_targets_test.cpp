#include <gmock/gmock.h>
#include <gptq/quantize_weight.h>
#include <gtest/gtest.h>

#include <map>

#include "tests/error_of.h"
#include "tests/quant/plain_options.h"
#include "tests/quant/random_layer.h"
#include "tests/reference.h"

namespace gptq {
namespace {

using reference::Matrix;
using test::plain_options;
using test::random_layer;
using test::RandomLayer;
using ::testing::HasSubstr;

// A layer whose inputs x arrive as x + noise.
struct DriftedLayer : RandomLayer {
  at::Tensor float_inputs;  // x
  at::Tensor drift;         // 2/n Σ (x - x̂) x̂ᵀ
};

DriftedLayer drifted_layer(int64_t n, int64_t k, uint64_t seed) {
  DriftedLayer layer{random_layer(n, k, seed), {}, {}};
  const auto samples = static_cast<double>(layer.inputs.size(0));
  layer.float_inputs = layer.inputs + 0.3 * random_layer(1, k, seed + 1, layer.inputs.size(0)).inputs;
  layer.drift = (layer.float_inputs - layer.inputs).t().mm(layer.inputs) * (2.0 / samples);
  return layer;
}

LayerStatistics statistics_of(const DriftedLayer& layer) {
  LayerStatistics statistics;
  statistics.hessian = layer.hessian;
  statistics.drift = layer.drift;
  return statistics;
}

at::Tensor tensor_of(const Matrix& matrix) {
  return at::tensor(matrix.values, at::kDouble).view({matrix.rows, matrix.cols});
}

TEST(QuantizeWeightTargets, DriftMovesTheWeightToTheRidgeRegression) {
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 7}, {5, 33}, {17, 64}}) {
    for (const bool act_order : {false, true}) {
      const DriftedLayer layer = drifted_layer(n, k, 41 + k);
      QuantizeOptions options = plain_options();
      options.group_size = 16;
      options.damping = 0.03;
      options.act_order = act_order ? "static" : "off";
      const Matrix moved = reference::ridge_regression(Matrix(layer.weight), Matrix(layer.float_inputs),
                                                       Matrix(layer.inputs), options.damping);
      const QuantizeResult expected = quantize_weight(tensor_of(moved), layer.hessian, options);
      options.target_alpha = 1;
      const QuantizeResult result = quantize_weight(layer.weight, statistics_of(layer), options);
      EXPECT_TRUE(at::equal(result.codes, expected.codes)) << n << " x " << k;
      EXPECT_TRUE(at::equal(result.scales, expected.scales)) << n << " x " << k;

      options.target_alpha = 0.25;
      const at::Tensor codes = quantize_weight(layer.weight, statistics_of(layer), options).codes;
      const at::Tensor part = 0.75 * layer.weight + 0.25 * tensor_of(moved);
      EXPECT_TRUE(at::equal(codes, quantize_weight(part, layer.hessian, options).codes)) << n << " x " << k;
    }
  }
}

TEST(QuantizeWeightTargets, DriftBringsOutputsCloserToTheFloatModel) {
  const DriftedLayer layer = drifted_layer(64, 96, 43);
  const at::Tensor wanted = layer.float_inputs.mm(layer.weight.t());
  const auto output_error = [&](double alpha) {
    QuantizeOptions options = plain_options();
    options.group_size = 32;
    options.target_alpha = alpha;
    const at::Tensor quantized = quantize_weight(layer.weight, statistics_of(layer), options).dequantize();
    return (layer.inputs.mm(quantized.to(at::kDouble).t()) - wanted).square().sum().item<double>();
  };
  EXPECT_LT(output_error(1), 0.9 * output_error(0));
}

TEST(QuantizeWeightTargets, RejectsBadDrift) {
  const DriftedLayer layer = drifted_layer(4, 6, 44);
  QuantizeOptions options = plain_options();
  options.target_alpha = 1;
  const auto error = [&](const at::Tensor& drift) {
    LayerStatistics statistics = statistics_of(layer);
    statistics.drift = drift;
    return test::error_of([&] { quantize_weight(layer.weight, statistics, options); });
  };
  EXPECT_THAT(error(layer.drift.narrow(0, 0, 5)), HasSubstr("drift must be [K, K] = [6, 6], got [5, 6]"));
  EXPECT_THAT(error(layer.drift.to(at::kInt)), HasSubstr("drift must be floating point, got Int"));
  EXPECT_THAT(error(layer.drift / 0.0), HasSubstr("drift must be finite"));
  options.target_alpha = 1.5;
  EXPECT_THAT(error(layer.drift), HasSubstr("target_alpha must be in 0..1, got 1.5"));
  options.mode = "rtn";
  options.target_alpha = 1;
  EXPECT_EQ(error(layer.drift.narrow(0, 0, 5)), "no error");
}

// Inputs with a mean, in the quantized model and in the float one.
DriftedLayer layer_with_means(int64_t n, int64_t k, uint64_t seed) {
  DriftedLayer layer = drifted_layer(n, k, seed);
  const at::Tensor mean = random_layer(2, k, seed + 2).weight;
  const auto samples = static_cast<double>(layer.inputs.size(0));
  layer.inputs = layer.inputs + mean[0];
  layer.float_inputs = layer.float_inputs + mean[0] + 0.2 * mean[1];
  layer.hessian = layer.inputs.t().mm(layer.inputs) * (2.0 / samples);
  layer.drift = (layer.float_inputs - layer.inputs).t().mm(layer.inputs) * (2.0 / samples);
  return layer;
}

TEST(QuantizeWeightTargets, BiasShiftMakesTheMeanErrorZero) {
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 7}, {5, 33}, {65, 64}}) {
    for (const double alpha : {0.0, 1.0}) {
      const DriftedLayer layer = layer_with_means(n, k, 51 + k);
      LayerStatistics statistics = statistics_of(layer);
      statistics.mean = layer.inputs.mean(0);
      statistics.float_mean = layer.float_inputs.mean(0);
      QuantizeOptions options = plain_options();
      options.correct_bias = true;
      options.target_alpha = alpha;
      const QuantizeResult result = quantize_weight(layer.weight, statistics, options);
      const at::Tensor codes = result.dequantize().to(at::kDouble);
      const at::Tensor error = layer.float_inputs.mm(layer.weight.t()) - layer.inputs.mm(codes.t()) - result.bias_shift;
      // The shift is float32: half a unit in the last place, and so is the dequantized weight of each of K terms.
      const double size = layer.inputs.abs().mean(0).mul(codes.abs()).sum(1).max().item<double>();
      EXPECT_LE(error.mean(0).abs().max().item<double>(), 1e-6 * size) << n << " x " << k;
      EXPECT_EQ(result.bias_shift.scalar_type(), at::kFloat);
    }
  }
}

// What is left after the bias took the mean error is the loss that the report gives, and it is less than without.
TEST(QuantizeWeightTargets, LossIsThatOfTheShiftedOutputs) {
  DriftedLayer layer = layer_with_means(40, 50, 61);
  layer.float_inputs = layer.inputs;
  LayerStatistics statistics;
  statistics.hessian = layer.hessian;
  QuantizeOptions options = plain_options();
  options.correct_bias = true;
  const QuantizeResult without = quantize_weight(layer.weight, statistics, options);
  EXPECT_FALSE(without.bias_shift.defined());
  statistics.mean = layer.inputs.mean(0);
  const QuantizeResult result = quantize_weight(layer.weight, statistics, options);
  const at::Tensor error = layer.inputs.mm((layer.weight - result.dequantize()).t()) - result.bias_shift;
  const double loss = error.square().sum().item<double>() * 2 / static_cast<double>(layer.inputs.size(0));
  EXPECT_NEAR(result.report.loss, loss, 1e-5 * loss);  // the shift and the dequantized weight are float32
  EXPECT_LT(result.report.loss, without.report.loss);
  options.correct_bias = false;
  EXPECT_FALSE(quantize_weight(layer.weight, statistics, options).bias_shift.defined());
}

TEST(QuantizeWeightTargets, ConstantInputsAreLeftToTheBias) {
  const at::Tensor inputs = at::full({8, 3}, 0.3), weight = random_layer(4, 3, 62).weight.to(at::kFloat);
  LayerStatistics statistics;
  statistics.hessian = inputs.t().mm(inputs) * (2.0 / 8);
  statistics.mean = inputs.mean(0);
  QuantizeOptions options;
  options.correct_bias = true;
  const QuantizeResult result = quantize_weight(weight, statistics, options);
  const at::Tensor outputs = inputs.mm(result.dequantize().t()) + result.bias_shift;
  EXPECT_TRUE(outputs.allclose(inputs.mm(weight.t()), 1e-5, 1e-6));
}

at::Tensor hessian_of(const at::Tensor& inputs) {
  return inputs.t().mm(inputs) * (2.0 / static_cast<double>(inputs.size(0)));
}

TEST(QuantizeWeightTargets, DampingIsChosenOnTheOtherHalf) {
  // A half of few samples: little damping fits its noise.
  const RandomLayer layer = random_layer(64, 48, 63, /*samples=*/60);
  LayerStatistics statistics;
  statistics.hessian = hessian_of(layer.inputs);
  statistics.half_hessian = hessian_of(layer.inputs.narrow(0, 30, 30));
  QuantizeOptions options = plain_options();
  options.damping = 0.001;
  options.search_damping = true;
  const at::Tensor fitted = hessian_of(layer.inputs.narrow(0, 0, 30));
  double best = INFINITY, expected = 0;
  for (const double damping : {0.001, 0.003, 0.01}) {
    QuantizeOptions fixed = plain_options();
    fixed.damping = damping;
    const at::Tensor error = layer.weight - quantize_weight(layer.weight, fitted, fixed).dequantize();
    const double loss = reference::quadratic_form(Matrix(error), Matrix(statistics.half_hessian));
    if (loss < best) {
      best = loss;
      expected = damping;
    }
  }
  EXPECT_DOUBLE_EQ(quantize_weight(layer.weight, statistics, options).report.damping, expected);
  EXPECT_GT(expected, 0.001);
  statistics.half_hessian = at::Tensor();
  EXPECT_THAT(test::error_of([&] { quantize_weight(layer.weight, statistics, options); }),
              HasSubstr("half_hessian is required to search the damping"));
}

// Kept exactly where it helps on the half that was not fitted, which it does for some layers and for some not.
TEST(QuantizeWeightTargets, RefinementIsKeptWhereItHelpsOnTheOtherHalf) {
  std::map<bool, int> kept;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const test::RandomLayer layer = test::random_layer(5, 24, 700 + seed, /*samples=*/60);
    LayerStatistics statistics;
    statistics.hessian = layer.hessian;
    statistics.half_hessian = hessian_of(layer.inputs.narrow(0, 30, 30));
    const at::Tensor fitted = hessian_of(layer.inputs.narrow(0, 0, 30));
    QuantizeOptions options = plain_options();
    options.damping = 0.001;
    options.search_damping = true;
    options.refine_sweeps = 1;
    const QuantizeReport report = quantize_weight(layer.weight, statistics, options).report;
    QuantizeOptions fixed = plain_options();
    fixed.damping = report.damping;
    const auto held_out_loss = [&](int64_t sweeps) {
      fixed.refine_sweeps = sweeps;
      const at::Tensor error = layer.weight - quantize_weight(layer.weight, fitted, fixed).dequantize();
      return reference::quadratic_form(Matrix(error), Matrix(statistics.half_hessian));
    };
    EXPECT_EQ(report.refined, held_out_loss(1) < held_out_loss(0)) << seed;
    ++kept[report.refined];
  }
  EXPECT_GT(kept[true], 0);
  EXPECT_GT(kept[false], 0);
}

TEST(QuantizeWeightTargets, RejectsBadMeans) {
  const DriftedLayer layer = drifted_layer(4, 6, 64);
  LayerStatistics statistics = statistics_of(layer);
  QuantizeOptions options;
  options.correct_bias = true;
  const auto error = [&] { return test::error_of([&] { quantize_weight(layer.weight, statistics, options); }); };
  statistics.mean = at::zeros({5});
  EXPECT_THAT(error(), HasSubstr("mean must be [K] = [6], got [5]"));
  statistics.mean = at::full({6}, std::nan(""));
  EXPECT_THAT(error(), HasSubstr("mean must be finite in Double, got 6 NaN or Inf values of 6"));
  statistics.mean = at::zeros({6});
  statistics.float_mean = at::zeros({6, 1});
  EXPECT_THAT(error(), HasSubstr("float_mean must be [K] = [6], got [6, 1]"));
}

}  // namespace
}  // namespace gptq
