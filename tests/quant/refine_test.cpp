#include "quant/refine.h"

#include <gtest/gtest.h>

#include <tuple>

#include "quant/loss.h"
#include "tests/quant/plain_options.h"
#include "tests/quant/random_layer.h"
#include "tests/reference.h"

namespace gptq {
namespace {

using reference::Groups;
using reference::Matrix;

QuantizeOptions options_with(int64_t bits, int64_t group_size, bool symmetric, int64_t sweeps) {
  QuantizeOptions options = test::plain_options();
  options.bits = bits;
  options.group_size = group_size;
  options.symmetric = symmetric;
  options.refine_sweeps = sweeps;
  return options;
}

at::Tensor weight_error(const at::Tensor& weight, const at::Tensor& codes, const Grid& grid) {
  return weight - dequantize_codes(codes, grid.scales, grid.zeros, grid.group_size, weight.scalar_type());
}

class RefineShapes : public testing::TestWithParam<std::tuple<int64_t, int64_t, int64_t>> {};

TEST_P(RefineShapes, EqualsCoordinateDescentByTryingEveryCode) {
  const auto [n, k, group_size] = GetParam();
  for (const int64_t bits : {2, 3, 4}) {
    for (const bool symmetric : {true, false}) {
      const test::RandomLayer layer = test::random_layer(n, k, 700 + n + k + bits);
      const Matrix w(layer.weight), hd = reference::damped(Matrix(layer.hessian), 0.01);
      Groups groups = reference::make_groups(w, bits, group_size, symmetric);
      Matrix codes = reference::round_to_nearest(w, groups).codes;
      const double gap = reference::coordinate_descent(w, hd, groups, codes, 2);
      ASSERT_GT(gap, 1e-10) << "choose another seed";

      const Plan plan = make_plan(options_with(bits, group_size, symmetric, 2), k);
      Grid grid = minmax_grid(layer.weight, plan);
      at::Tensor refined = round_to_grid(layer.weight, grid);
      at::Tensor losses = row_forms(weight_error(layer.weight, refined, grid), layer.hessian);
      const double shift = 0.01 * layer.hessian.diagonal().mean().item<double>();
      refine_codes(layer.weight, layer.hessian, at::full({k}, shift, at::kDouble), 2, /*fit_scales=*/true, grid,
                   refined, losses);
      EXPECT_EQ(Matrix(refined).values, codes.values) << bits << symmetric;
      EXPECT_EQ(Matrix(grid.scales).values, groups.scales.values) << bits << symmetric;
      const Matrix error(weight_error(layer.weight, refined, grid));
      for (int64_t row = 0; row < n; ++row) {
        const double loss = reference::row_form(error, Matrix(layer.hessian), row);
        // A few hundred float64 sums of terms of the size of the weight's own form.
        const double size = reference::row_form(w, Matrix(layer.hessian), row);
        EXPECT_NEAR(losses[row].item<double>(), loss, 1e-13 * size) << row;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, RefineShapes,
                         testing::Values(std::tuple{1, 1, 1}, std::tuple{2, 7, 3}, std::tuple{33, 5, -1},
                                         std::tuple{3, 13, 13}, std::tuple{2, 17, 8}));

TEST(Refine, NeverIncreasesALoss) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    for (const int64_t group_size : {1, 31, 64, -1}) {
      const test::RandomLayer layer = test::random_layer(70, 129, 711);
      QuantizeOptions options = options_with(3, group_size, true, 0);
      const at::Tensor weight = layer.weight.to(dtype), hessian = layer.hessian.to(dtype);
      const Matrix hd = reference::damped(Matrix(layer.hessian), options.damping);
      std::vector<double> losses;
      for (const int64_t sweeps : {0, 1, 2, 5}) {
        options.refine_sweeps = sweeps;
        const at::Tensor error = layer.weight - quantize_weight(weight, hessian, options).dequantize();
        losses.push_back(reference::quadratic_form(Matrix(error), hd));
        // In float32 the gradients are of bfloat16 (see GradientFactor), which may move a code too far by 2^-8 of it.
        const double slack = dtype == at::kFloat ? 1e-3 : 1e-12;
        EXPECT_LE(losses.back(), losses[losses.size() > 1 ? losses.size() - 2 : 0] * (1 + slack)) << group_size;
      }
      EXPECT_LT(losses.back(), 0.99 * losses.front());
    }
  }
}

// The best codes there are, by trying all of them.
double least_loss(const Matrix& w, const Matrix& hd, const Groups& groups) {
  const auto count = static_cast<int64_t>(groups.max_code()) + 1;
  int64_t total = 1;
  for (int64_t k = 0; k < w.cols; ++k) {
    total *= count;
  }
  double best = INFINITY;
  Matrix codes(1, w.cols);
  for (int64_t number = 0; number < total; ++number) {
    for (int64_t k = 0, rest = number; k < w.cols; ++k, rest /= count) {
      codes(0, k) = static_cast<double>(rest % count);
    }
    best =
        std::min(best, reference::quadratic_form(reference::difference(w, reference::dequantize(codes, groups)), hd));
  }
  return best;
}

TEST(Refine, LiesBetweenTheBestCodesAndTheSweep) {
  int better = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    const test::RandomLayer layer = test::random_layer(1, 7, 720 + seed, /*samples=*/4);
    const Matrix w(layer.weight), hd = reference::damped(Matrix(layer.hessian), 0.01);
    const Plan plan = make_plan(options_with(2, -1, true, 0), 7);
    const QuantizeResult swept = quantize_weight(layer.weight, layer.hessian, options_with(2, -1, true, 0));
    Grid grid{plan.rule, 7, swept.scales.clone(), swept.zeros};
    at::Tensor codes = swept.codes.clone();
    at::Tensor losses = at::zeros({1}, at::kDouble);
    const double shift = 0.01 * layer.hessian.diagonal().mean().item<double>();
    refine_codes(layer.weight, layer.hessian, at::full({7}, shift, at::kDouble), 3, /*fit_scales=*/false, grid, codes,
                 losses);
    EXPECT_TRUE(grid.scales.equal(swept.scales));
    const Groups groups = reference::make_groups(w, 2, -1, true);
    const auto loss = [&](const at::Tensor& of) {
      return reference::quadratic_form(reference::difference(w, reference::dequantize(Matrix(of), groups)), hd);
    };
    EXPECT_LE(loss(codes), loss(swept.codes) * (1 + 1e-12));
    EXPECT_GE(loss(codes), least_loss(w, hd, groups) * (1 - 1e-12));
    better += loss(codes) < loss(swept.codes) ? 1 : 0;
  }
  EXPECT_GT(better, 0);
}

TEST(Refine, TheRowGuardKeepsEveryRowAtLeastAsGoodAsRoundedToNearest) {
  int64_t guarded = 0;
  for (const int64_t sweeps : {0, 1}) {
    const test::RandomLayer layer = test::random_layer(600, 12, 731, /*samples=*/14);
    QuantizeOptions options = options_with(2, -1, true, sweeps), rtn = options;
    options.row_guard = true;
    options.damping = 0.5;
    rtn.mode = "rtn";
    const QuantizeResult result = quantize_weight(layer.weight, layer.hessian, options);
    const at::Tensor error = layer.weight - result.dequantize();
    const at::Tensor nearest = layer.weight - quantize_weight(layer.weight, layer.hessian, rtn).dequantize();
    for (int64_t row = 0; row < 600; ++row) {
      const double loss = reference::row_form(Matrix(error), Matrix(layer.hessian), row);
      EXPECT_LE(loss, reference::row_form(Matrix(nearest), Matrix(layer.hessian), row) * (1 + 1e-9)) << row;
    }
    guarded += result.report.guarded_rows;
    EXPECT_NEAR(result.report.loss, reference::quadratic_form(Matrix(error), Matrix(layer.hessian)),
                1e-9 * result.report.loss);
  }
  EXPECT_GT(guarded, 0);
}

TEST(Refine, WeightsOnTheGridStay) {
  const test::RandomLayer layer = test::random_layer(9, 64, 741);
  auto generator = at::make_generator<at::CPUGeneratorImpl>(742);
  at::Tensor codes = at::randint(0, 16, {9, 64}, generator, at::kFloat);
  codes.view({9, 2, 32}).select(2, 0).fill_(0);
  codes.view({9, 2, 32}).select(2, 31).fill_(15);
  const at::Tensor weight = (codes - 5) * 0.03125;  // a power of two, so that every step is exact
  QuantizeOptions options;
  options.group_size = 32;
  options.symmetric = false;
  options.refine_sweeps = 3;
  const QuantizeResult result = quantize_weight(weight, layer.hessian, options);
  EXPECT_TRUE(result.dequantize().equal(weight));
  EXPECT_EQ(result.report.loss, 0);
}

}  // namespace
}  // namespace gptq
