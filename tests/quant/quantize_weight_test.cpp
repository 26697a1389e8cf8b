#include <ATen/Parallel.h>
#include <gptq/quantize_weight.h>
#include <gtest/gtest.h>

#include <string>
#include <tuple>

#include "tests/error_of.h"
#include "tests/quant/plain_options.h"
#include "tests/quant/random_layer.h"
#include "tests/reference.h"

namespace gptq {
namespace {

using reference::Codes;
using reference::Groups;
using reference::Matrix;
using test::plain_options;
using test::random_layer;
using test::RandomLayer;

struct Case {
  int64_t bits, group_size;
  bool symmetric, act_order;

  QuantizeOptions options() const {
    QuantizeOptions options = plain_options();
    options.bits = bits;
    options.group_size = group_size;
    options.symmetric = symmetric;
    options.act_order = act_order ? "static" : "off";
    return options;
  }
};

const Case kCases[] = {{4, 128, true, true}, {4, 32, false, false}, {4, -1, false, true}, {3, 31, true, false},
                       {2, 64, false, true}, {8, 1000, true, true}, {2, 1, true, false},  {3, -1, false, false}};

// How far rounding can move a target, in steps of the grid: a sum of K terms and a triangular factor of Hd, each
// computed with relative error at most about K * epsilon, the factor's magnified by its condition; targets of at most
// twice 2^bits steps.
double margin_bound(const at::Tensor& hessian, double damping, int64_t bits, double epsilon) {
  const at::Tensor eigenvalues = at::linalg_eigvalsh(hessian);
  const double shift = damping * hessian.diagonal().mean().item<double>();
  const double condition = (eigenvalues.max().item<double>() + shift) / (eigenvalues.min().item<double>() + shift);
  const auto k = static_cast<double>(hessian.size(0));
  return 2 * k * epsilon * condition * std::pow(2.0, static_cast<double>(bits));
}

int64_t differences(const at::Tensor& codes, const Matrix& expected) {
  const Matrix got(codes);
  int64_t count = 0;
  for (size_t i = 0; i < got.values.size(); ++i) {
    count += got.values[i] != expected.values[i] ? 1 : 0;
  }
  return count;
}

std::vector<int64_t> order_of(const RandomLayer& layer, bool act_order) {
  const Matrix h(layer.hessian);
  return act_order ? reference::descending_order(h) : reference::stored_order(h.rows);
}

class QuantizeWeightShapes : public testing::TestWithParam<std::tuple<int64_t, int64_t>> {};

TEST_P(QuantizeWeightShapes, EqualsObqUFormAndPullFormInFloat64) {
  const auto [n, k] = GetParam();
  const RandomLayer layer = random_layer(n, k, 1000 * n + k);
  const Matrix w(layer.weight), hd = reference::damped(Matrix(layer.hessian), 0.01);
  for (const Case& c : kCases) {
    SCOPED_TRACE(testing::Message() << "bits " << c.bits << " group_size " << c.group_size << " symmetric "
                                    << c.symmetric << " act_order " << c.act_order);
    Groups groups = reference::make_groups(w, c.bits, c.group_size, c.symmetric);
    const auto order = order_of(layer, c.act_order);
    const Codes expected = reference::obq(w, hd, groups, order);
    ASSERT_GT(expected.least_margin(), margin_bound(layer.hessian, 0.01, c.bits, 1.1e-16)) << "choose another seed";
    EXPECT_EQ(reference::gptq_u_form(w, hd, groups, order).codes.values, expected.codes.values);
    EXPECT_EQ(reference::gptq_pull_form(w, hd, groups, order).codes.values, expected.codes.values);

    const QuantizeResult result = quantize_weight(layer.weight, layer.hessian, c.options());
    EXPECT_EQ(differences(result.codes, expected.codes), 0);
    EXPECT_EQ(Matrix(result.scales).values, groups.scales.values);
    EXPECT_EQ(Matrix(result.zeros).values, groups.zeros.values);
    EXPECT_TRUE(result.report.float64);

    // The sweep's loss has the factor's backward error, k units of rounding of the largest eigenvalue, and its sum.
    const Matrix error = reference::difference(w, reference::dequantize(expected.codes, groups));
    const double loss = reference::quadratic_form(error, Matrix(layer.hessian));
    double squares = 0;
    for (const double e : error.values) {
      squares += e * e;
    }
    const double largest = at::linalg_eigvalsh(layer.hessian).max().item<double>();
    EXPECT_NEAR(result.report.loss, loss, 4e-16 * static_cast<double>(k + 4) * largest * squares);
  }
}

TEST_P(QuantizeWeightShapes, Float32DiffersOnlyWhereRoundingDecides) {
  const auto [n, k] = GetParam();
  const RandomLayer layer = random_layer(n, k, 2000 * n + k);
  const at::Tensor weight = layer.weight.to(at::kFloat), hessian = layer.hessian.to(at::kFloat);
  const Matrix w(weight), hd = reference::damped(Matrix(hessian), 0.01);
  for (const Case& c : kCases) {
    SCOPED_TRACE(testing::Message() << "bits " << c.bits << " group_size " << c.group_size);
    Groups groups = reference::make_groups(w, c.bits, c.group_size, c.symmetric);
    const auto order = order_of({weight, {}, hessian}, c.act_order);
    const Codes expected = reference::obq(w, hd, groups, order);
    const QuantizeResult result = quantize_weight(weight, hessian, c.options());
    EXPECT_FALSE(result.report.float64);
    const double bound = margin_bound(hessian.to(at::kDouble), 0.01, c.bits, 6e-8);
    const Matrix codes(result.codes);
    for (int64_t row = 0; row < n; ++row) {
      for (const int64_t column : order) {
        if (codes(row, column) != expected.codes(row, column)) {
          EXPECT_LT(expected.margins(row, column), bound) << "row " << row << " column " << column;
          break;  // what follows in this row follows from it
        }
      }
    }
  }
}

TEST_P(QuantizeWeightShapes, ClassicTakesScalesFromUpdatedWeights) {
  const auto [n, k] = GetParam();
  const RandomLayer layer = random_layer(n, k, 3000 * n + k);
  const Matrix w(layer.weight), hd = reference::damped(Matrix(layer.hessian), 0.01);
  for (const int64_t group_size : {int64_t{1}, int64_t{7}, int64_t{32}, int64_t{128}, int64_t{13}, int64_t{-1}}) {
    const int64_t bits = 2 + (group_size + 7) % 7;
    const bool symmetric = group_size != 7 && group_size != 128;
    Groups groups = reference::make_groups(w, bits, group_size, symmetric);
    const Codes expected = reference::obq(w, hd, groups, reference::stored_order(k), /*dynamic_groups=*/true);
    QuantizeOptions options = plain_options();
    options.mode = "classic";
    options.bits = bits;
    options.symmetric = symmetric;
    options.group_size = group_size;
    for (const int64_t block_size : {int64_t{3}, int64_t{32}, int64_t{128}}) {
      options.block_size = block_size;
      const QuantizeResult result = quantize_weight(layer.weight, layer.hessian, options);
      EXPECT_EQ(Matrix(result.scales).values, groups.scales.values) << group_size << " " << block_size;
      EXPECT_EQ(differences(result.codes, expected.codes), 0) << group_size << " " << block_size;
    }
  }
}

TEST_P(QuantizeWeightShapes, DynamicOrderGroupsColumnsThatFollowEachOther) {
  const auto [n, k] = GetParam();
  const RandomLayer layer = random_layer(n, k, 5000 * n + k);
  const auto order = order_of(layer, true);
  const at::Tensor index = at::tensor(at::ArrayRef<int64_t>(order), at::kLong);
  const Matrix w(layer.weight.index_select(1, index));
  const Matrix hd = reference::damped(reference::permuted(Matrix(layer.hessian), order), 0.01);
  for (const char* mode : {"default", "classic"}) {
    for (const int64_t group_size : {int64_t{7}, int64_t{32}, int64_t{-1}}) {
      Groups groups = reference::make_groups(w, 4, group_size, true);
      const bool dynamic_scales = std::string(mode) == "classic";
      const Codes expected = reference::obq(w, hd, groups, reference::stored_order(k), dynamic_scales);
      QuantizeOptions options = plain_options();
      options.mode = mode;
      options.act_order = "dynamic";
      options.group_size = group_size;
      const QuantizeResult result = quantize_weight(layer.weight, layer.hessian, options);
      EXPECT_TRUE(result.input_order.equal(index.to(at::kInt)));
      EXPECT_EQ(Matrix(result.scales).values, groups.scales.values) << mode << group_size;
      EXPECT_EQ(differences(result.codes, expected.codes), 0) << mode << group_size;
      const at::Tensor swept = result.dequantize().index_select(1, index);
      EXPECT_TRUE(
          swept.to(at::kDouble)
              .allclose(at::tensor(reference::dequantize(expected.codes, groups).values, at::kDouble).view({n, k}),
                        1e-6, 1e-9));
    }
  }
}

TEST_P(QuantizeWeightShapes, RoundToNearest) {
  const auto [n, k] = GetParam();
  const RandomLayer layer = random_layer(n, k, 4000 * n + k);
  const at::Tensor weight = layer.weight.to(at::kFloat);
  for (const Case& c : kCases) {
    QuantizeOptions options = c.options();
    options.mode = "rtn";
    const Groups groups = reference::make_groups(Matrix(weight), c.bits, c.group_size, c.symmetric);
    const Codes expected = reference::round_to_nearest(Matrix(weight), groups);
    // A quotient in float32 is off by half a unit in the last place of at most 2^bits.
    ASSERT_GT(expected.least_margin(), 6e-8 * std::pow(2.0, static_cast<double>(c.bits)));
    const QuantizeResult result = quantize_weight(weight, at::Tensor(), options);
    EXPECT_EQ(differences(result.codes, expected.codes), 0);
    EXPECT_EQ(result.report.loss, result.report.rtn_loss);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, QuantizeWeightShapes,
                         testing::Values(std::tuple{1, 1}, std::tuple{1, 7}, std::tuple{5, 1}, std::tuple{31, 17},
                                         std::tuple{33, 32}, std::tuple{7, 127}, std::tuple{16, 128},
                                         std::tuple{3, 129}, std::tuple{65, 64}));

TEST(QuantizeWeight, DiagonalHessianOrHugeDampingGivesRoundToNearest) {
  const RandomLayer layer = random_layer(40, 70, 11);
  QuantizeOptions rtn = plain_options();
  rtn.mode = "rtn";
  rtn.group_size = 32;
  QuantizeOptions gptq = rtn;
  gptq.mode = "default";
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    const at::Tensor weight = layer.weight.to(dtype), hessian = layer.hessian.to(dtype);
    const at::Tensor nearest = quantize_weight(weight, at::Tensor(), rtn).codes;
    const at::Tensor diagonal = at::diag(hessian.diagonal());
    EXPECT_TRUE(quantize_weight(weight, diagonal, gptq).codes.equal(nearest));
    EXPECT_FALSE(quantize_weight(weight, hessian, gptq).codes.equal(nearest));
    QuantizeOptions damped = gptq;
    damped.damping = 1e12;  // corrections of 1e-12: far below the least margin of 2,800 random weights
    EXPECT_TRUE(quantize_weight(weight, hessian, damped).codes.equal(nearest));
  }
}

TEST(QuantizeWeight, WeightsOnTheGridStay) {
  const RandomLayer layer = random_layer(9, 64, 12);
  auto generator = at::make_generator<at::CPUGeneratorImpl>(13);
  at::Tensor codes = at::randint(0, 16, {9, 64}, generator, at::kFloat);
  codes.view({9, 2, 32}).select(2, 0).fill_(0);
  codes.view({9, 2, 32}).select(2, 31).fill_(15);
  const at::Tensor weight = (codes - 5) * 0.03125;  // a power of two, so that every step is exact
  QuantizeOptions options = plain_options();
  options.group_size = 32;
  options.symmetric = false;
  for (const char* mode : {"default", "classic", "rtn"}) {
    options.mode = mode;
    const QuantizeResult result = quantize_weight(weight, layer.hessian, options);
    EXPECT_TRUE(result.codes.equal(codes.to(at::kByte))) << mode;
    EXPECT_TRUE(result.dequantize().equal(weight)) << mode;
    EXPECT_EQ(result.report.loss, 0) << mode;
  }
}

TEST(QuantizeWeight, CodesDependOnNothingThatChangesSpeed) {
  const RandomLayer layer = random_layer(133, 300, 14);
  const at::Tensor weight = layer.weight.to(at::kFloat), hessian = layer.hessian.to(at::kFloat);
  for (const char* mode : {"default", "classic"}) {
    QuantizeOptions options = plain_options();
    options.mode = mode;
    options.group_size = 48;
    const QuantizeResult expected = quantize_weight(weight, hessian, options);
    for (const int64_t block_size : {1, 2, 31, 64, 299, 300, 5000}) {
      options.block_size = block_size;
      EXPECT_TRUE(quantize_weight(weight, hessian, options).codes.equal(expected.codes)) << mode << block_size;
    }
    for (const auto& [first, count] : {std::pair{0, 1}, std::pair{1, 32}, std::pair{33, 100}}) {
      const QuantizeResult part = quantize_weight(weight.narrow(0, first, count), hessian, options);
      EXPECT_TRUE(part.codes.equal(expected.codes.narrow(0, first, count))) << mode << first;
      EXPECT_TRUE(part.scales.equal(expected.scales.narrow(1, first, count))) << mode << first;
    }
  }
}

TEST(QuantizeWeight, CodesDoNotDependOnThreads) {
  const RandomLayer layer = random_layer(133, 100, 15);  // a factorisation this small is not split among threads
  const at::Tensor weight = layer.weight.to(at::kFloat), hessian = layer.hessian.to(at::kFloat);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const at::Tensor expected = quantize_weight(weight, hessian).codes;
  for (const int count : {2, 3, 5}) {
    at::set_num_threads(count);
    EXPECT_TRUE(quantize_weight(weight, hessian).codes.equal(expected)) << count;
  }
  at::set_num_threads(threads);
}

TEST(QuantizeWeight, ScalesWithWeightAndHessian) {
  const RandomLayer layer = random_layer(20, 90, 16);
  const at::Tensor weight = layer.weight.to(at::kFloat), hessian = layer.hessian.to(at::kFloat);
  const QuantizeResult expected = quantize_weight(weight, hessian);
  const QuantizeResult larger = quantize_weight(weight * 8, hessian * 4);  // powers of two: exact
  EXPECT_TRUE(larger.codes.equal(expected.codes));
  EXPECT_TRUE(larger.scales.equal(expected.scales * 8));
  EXPECT_NEAR(larger.report.loss, 256 * expected.report.loss, 1e-9 * larger.report.loss);
  EXPECT_NEAR(larger.report.relative_error, expected.report.relative_error, 1e-9);
}

TEST(QuantizeWeight, PermutedColumnsGivePermutedCodes) {
  const RandomLayer layer = random_layer(20, 90, 17);
  auto generator = at::make_generator<at::CPUGeneratorImpl>(18);
  const at::Tensor permutation = at::randperm(90, generator);
  QuantizeOptions options = plain_options();
  options.group_size = -1;
  const at::Tensor expected = quantize_weight(layer.weight, layer.hessian, options).codes;
  const at::Tensor hessian = layer.hessian.index_select(0, permutation).index_select(1, permutation);
  const at::Tensor codes = quantize_weight(layer.weight.index_select(1, permutation), hessian, options).codes;
  EXPECT_TRUE(codes.equal(expected.index_select(1, permutation)));
}

TEST(QuantizeWeight, BeatsRoundToNearestOnAverage) {
  const RandomLayer layer = random_layer(1100, 96, 19);
  for (const int64_t bits : {2, 3, 4, 8}) {
    for (const char* mode : {"default", "classic"}) {
      QuantizeOptions options = plain_options();
      options.bits = bits;
      options.mode = mode;
      options.group_size = 32;
      const QuantizeReport report = quantize_weight(layer.weight.to(at::kFloat), layer.hessian, options).report;
      EXPECT_LT(report.loss, report.rtn_loss) << bits << mode;
      EXPECT_GT(report.loss, 0);
      EXPECT_LT(report.relative_error, report.rtn_relative_error);
    }
  }
}

TEST(QuantizeWeight, PerTensorHasOneGrid) {
  const RandomLayer layer = random_layer(64, 33, 20);
  for (const bool symmetric : {true, false}) {
    QuantizeOptions options = plain_options();
    options.per_tensor = true;
    options.symmetric = symmetric;
    const QuantizeResult result = quantize_weight(layer.weight, layer.hessian, options);
    EXPECT_EQ(result.group_size, -1);
    EXPECT_EQ(result.scales.sizes(), at::IntArrayRef({1, 64}));
    EXPECT_TRUE(result.scales.eq(result.scales[0][0]).all().item<bool>());
    EXPECT_LE(std::get<0>(at::_unique(result.dequantize())).numel(), 16);
  }
}

TEST(QuantizeWeight, HalfPrecisionWeightsAreComputedInFloat32) {
  const RandomLayer layer = random_layer(17, 40, 21);
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    const at::Tensor weight = layer.weight.to(dtype);
    const QuantizeResult half = quantize_weight(weight, layer.hessian.to(at::kFloat));
    const QuantizeResult full = quantize_weight(weight.to(at::kFloat), layer.hessian.to(at::kFloat));
    EXPECT_TRUE(half.codes.equal(full.codes));
    EXPECT_TRUE(half.scales.equal(full.scales));
    EXPECT_EQ(half.report.loss, full.report.loss);
  }
}

TEST(QuantizeWeight, DeadColumnsAreRoundedToNearest) {
  RandomLayer layer = random_layer(30, 40, 22);
  layer.inputs.select(1, 3).zero_();
  layer.inputs.select(1, 39).zero_();
  const at::Tensor hessian = layer.inputs.t().mm(layer.inputs);
  QuantizeOptions options = plain_options();
  options.group_size = 16;
  const QuantizeResult result = quantize_weight(layer.weight, hessian, options);
  options.mode = "rtn";
  const QuantizeResult nearest = quantize_weight(layer.weight, hessian, options);
  EXPECT_EQ(result.report.dead_columns, 2);
  for (const int64_t column : {3, 39}) {
    EXPECT_TRUE(result.codes.select(1, column).equal(nearest.codes.select(1, column)));
  }
  // Without the dead columns the others come out the same.
  at::Tensor alive = at::ones({40}, at::kBool);
  alive[3] = false;
  alive[39] = false;
  const at::Tensor index = alive.nonzero().squeeze(1);
  options.mode = "default";
  options.group_size = -1;
  options.damping = 0;  // damping is a share of the mean, which the dead columns lower
  const at::Tensor some =
      quantize_weight(layer.weight.index_fill(1, at::tensor({3, 39}, at::kLong), 0), hessian, options).codes;
  const at::Tensor fewer = quantize_weight(layer.weight.index_select(1, index),
                                           hessian.index_select(0, index).index_select(1, index), options)
                               .codes;
  EXPECT_TRUE(some.index_select(1, index).equal(fewer));
}

TEST(QuantizeWeight, ZeroHessianGivesRoundToNearest) {
  const RandomLayer layer = random_layer(5, 12, 23);
  QuantizeOptions rtn = plain_options();
  rtn.mode = "rtn";
  const at::Tensor zero = at::zeros({12, 12});
  const QuantizeResult result = quantize_weight(layer.weight, zero, plain_options());
  EXPECT_TRUE(result.codes.equal(quantize_weight(layer.weight, at::Tensor(), rtn).codes));
  EXPECT_EQ(result.report.dead_columns, 12);
  EXPECT_EQ(result.report.relative_error, 0);
}

TEST(QuantizeWeight, SingularHessianAndLoudChannelStayFinite) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    RandomLayer layer = random_layer(24, 64, 24, /*samples=*/7);
    layer.inputs.select(1, 10).mul_(1000);
    const at::Tensor hessian = layer.inputs.t().mm(layer.inputs);
    for (const double damping : {0.0, 1e-6, 0.01}) {
      QuantizeOptions options = plain_options();
      options.damping = damping;
      const QuantizeResult result = quantize_weight(layer.weight.to(dtype), hessian, options);
      EXPECT_TRUE(result.dequantize().isfinite().all().item<bool>());
      EXPECT_TRUE(std::isfinite(result.report.loss));
      EXPECT_LE(result.report.loss, result.report.rtn_loss);
      EXPECT_GE(result.report.damping, damping);
      EXPECT_EQ(result.report.damping > damping, result.report.damping_escalations > 0);
    }
  }
}

TEST(QuantizeWeight, ChangesNeitherArgumentsNorTheGlobalGenerator) {
  const RandomLayer layer = random_layer(6, 20, 25);
  at::Tensor weight = layer.weight.to(at::kFloat).requires_grad_();
  const at::Tensor weight_before = weight.detach().clone(), hessian_before = layer.hessian.clone();
  const at::Tensor state = at::globalContext().defaultGenerator(at::kCPU).get_state();
  const QuantizeResult result = quantize_weight(weight, layer.hessian);
  EXPECT_TRUE(weight.detach().equal(weight_before));
  EXPECT_TRUE(layer.hessian.equal(hessian_before));
  EXPECT_TRUE(at::globalContext().defaultGenerator(at::kCPU).get_state().equal(state));
  EXPECT_FALSE(result.dequantize().requires_grad());
  EXPECT_TRUE(quantize_weight(weight, layer.hessian).codes.equal(result.codes));
}

void expect_error(const at::Tensor& weight, const at::Tensor& hessian, const std::string& part,
                  const QuantizeOptions& options = plain_options()) {
  EXPECT_PRED_FORMAT2(testing::IsSubstring, part, test::error_of([&] { quantize_weight(weight, hessian, options); }));
}

TEST(QuantizeWeight, RoundingToNearestCanSearchItsScalesToo) {
  const RandomLayer layer = random_layer(40, 64, 29);
  QuantizeOptions options;
  options.mode = "rtn";
  options.bits = 3;
  for (const at::Tensor& hessian : {layer.hessian, at::Tensor()}) {
    options.scale_search = "auto";
    const QuantizeResult nearest = quantize_weight(layer.weight, hessian, options);
    options.scale_search = "weighted";
    const QuantizeResult searched = quantize_weight(layer.weight, hessian, options);
    EXPECT_EQ(searched.report.rtn_loss, nearest.report.loss);
    EXPECT_LT(searched.report.loss, nearest.report.loss);
  }
}

TEST(QuantizeWeight, FewSamplesAreRoundedToNearest) {
  const RandomLayer layer = random_layer(4, 6, 28);
  LayerStatistics statistics;
  statistics.hessian = layer.hessian;
  QuantizeOptions options, rtn;
  options.min_samples = 10;
  rtn.mode = "rtn";
  statistics.nsamples = 9;
  const QuantizeResult nearest = quantize_weight(layer.weight, statistics, options);
  EXPECT_TRUE(nearest.report.too_few_samples);
  EXPECT_TRUE(nearest.codes.equal(quantize_weight(layer.weight, layer.hessian, rtn).codes));
  for (const int64_t samples : {10, -1}) {
    statistics.nsamples = samples;
    EXPECT_FALSE(quantize_weight(layer.weight, statistics, options).report.too_few_samples);
  }
  statistics = {};
  statistics.nsamples = 0;
  EXPECT_TRUE(quantize_weight(layer.weight, statistics).report.too_few_samples);
}

TEST(QuantizeWeight, ComparesOnRequestAlone) {
  const RandomLayer layer = random_layer(20, 30, 29);
  QuantizeOptions options, alone;
  alone.compare = false;
  const QuantizeResult with = quantize_weight(layer.weight, layer.hessian, options);
  const QuantizeResult without = quantize_weight(layer.weight, layer.hessian, alone);
  EXPECT_TRUE(with.codes.equal(without.codes) && with.scales.equal(without.scales));
  EXPECT_EQ(with.report.loss, without.report.loss);
  EXPECT_LT(with.report.loss, with.report.rtn_loss);
  EXPECT_TRUE(std::isnan(without.report.rtn_loss) && std::isnan(without.report.relative_error));
}

TEST(QuantizeWeight, RejectsBadTensors) {
  const RandomLayer layer = random_layer(4, 6, 26);
  const at::Tensor weight = layer.weight, hessian = layer.hessian;
  expect_error(weight[0], hessian, "weight must be [N, K] with at least one row and one column, got [6]");
  expect_error(at::empty({0, 6}), hessian, "got [0, 6]");
  expect_error(weight.to(at::kInt), hessian, "weight must be floating point, got Int");
  expect_error(weight, at::Tensor(), "hessian is required in mode \"default\"");
  expect_error(weight.to(at::kMeta), hessian, "weight must be on the CPU or a CUDA device, got meta");
  expect_error(weight, hessian.to(at::kMeta), "hessian must be on the device of the weight, cpu, got meta");
  expect_error(weight, hessian.narrow(0, 0, 5), "hessian must be [K, K] = [6, 6], got [5, 6]");
  expect_error(weight, at::eye(7), "hessian must be [K, K] = [6, 6], got [7, 7]");
  expect_error(weight, hessian.to(at::kLong), "hessian must be floating point, got Long");
  at::Tensor bad = weight.clone();
  bad[1][2] = std::nan("");
  bad[3][5] = INFINITY;
  expect_error(bad, hessian, "weight must be finite in Double, got 2 NaN or Inf values of 24");
  expect_error(weight.to(at::kFloat), hessian * 1e300, "hessian must be finite in Float, got 36");
  bad = hessian.clone();
  bad[0][5] += 1;
  expect_error(weight, bad, "hessian must be symmetric");
  expect_error(weight, -hessian, "hessian must be positive semidefinite");
  expect_error(weight, at::eye(6) - 3 * (at::ones({6, 6}) - at::eye(6)),
               "no usable Cholesky factor even with damping 7.29");
  expect_error(at::full({1, 6}, 1e6), hessian, "scales are float16, at most 65504");
}

TEST(QuantizeWeight, LossesWithoutHessianAreThoseOfTheIdentity) {
  const RandomLayer layer = random_layer(4, 30, 27);
  QuantizeOptions options = plain_options();
  options.mode = "rtn";
  const QuantizeReport without = quantize_weight(layer.weight, at::Tensor(), options).report;
  const QuantizeReport identity = quantize_weight(layer.weight, at::eye(30, at::kDouble), options).report;
  EXPECT_NEAR(without.loss, identity.loss, 1e-14 * identity.loss * 120);  // 120 terms in another order
  EXPECT_GT(without.loss, 0);
}

}  // namespace
}  // namespace gptq
