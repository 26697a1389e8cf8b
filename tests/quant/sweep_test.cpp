#include "quant/sweep.h"

#include <gtest/gtest.h>

#include "tests/quant/random_layer.h"
#include "tests/reference.h"

namespace gptq {
namespace {

using reference::Matrix;

// Σ_k D_k (T_k - q_k)² = tr(E Hd Eᵀ), where T_k - q_k = Σ_{j<=k} e_j M_jk follows from the codes alone.
TEST(Sweep, LossIsTheSumOverPivots) {
  const test::RandomLayer layer = test::random_layer(12, 50, 41);
  QuantizeOptions options;
  options.group_size = 16;
  const Plan plan = make_plan(options, 50);
  Grid grid = minmax_grid(layer.weight, plan);
  const Factor factor = factorise(layer.hessian, at::argsort(layer.hessian.diagonal(), true, 0, true), 0.01);
  const SweepResult swept = sweep(layer.weight, factor, plan, grid);
  const at::Tensor& codes = swept.codes;
  const at::Tensor error =
      layer.weight - dequantize_codes(codes, grid.scales, grid.zeros, grid.group_size, at::kDouble);
  const at::Tensor residual = error.index_select(1, factor.order).mm(factor.multipliers.t());
  const double by_pivots = residual.square().mul(factor.pivots).sum().item<double>();
  const Matrix hessian(layer.hessian), damped = reference::damped(hessian, 0.01);
  const double direct = reference::quadratic_form(Matrix(error), damped);
  const double tolerance = 1e-12 * direct;  // 50 columns, condition below 1e4
  EXPECT_NEAR(by_pivots, direct, tolerance);
  const double shift = 0.01 * layer.hessian.diagonal().mean().item<double>();
  EXPECT_NEAR(by_pivots - shift * error.square().sum().item<double>(),
              reference::quadratic_form(Matrix(error), hessian), tolerance);

  EXPECT_NEAR(swept.losses.sum().item<double>(), reference::quadratic_form(Matrix(error), hessian), tolerance);
  EXPECT_TRUE((error.mm(layer.hessian) * error).sum(1).allclose(swept.losses, /*rtol=*/1e-10, /*atol=*/0));

  // Where no code is at an end of the grid, |T_k - q_k| is at most half a step: the bound of Babai's nearest plane.
  const at::Tensor scale = grid.scales.t().index_select(1, factor.order.div(16, "floor")).to(at::kDouble);
  const at::Tensor ordered = codes.index_select(1, factor.order);
  const at::Tensor inside = ordered.gt(0).logical_and(ordered.lt(15));
  const at::Tensor beyond = residual.abs().gt(scale * (0.5 + 1e-9)).logical_and(inside);
  EXPECT_EQ(beyond.sum().item<int64_t>(), 0);
  EXPECT_GT(inside.sum().item<int64_t>(), 0);
}

// A grid so wide that nothing is clipped.
Grid wide_grid(const at::Tensor& weight, const Plan& plan) {
  Grid grid = minmax_grid(weight, plan);
  grid.scales.mul_(4);
  return grid;
}

TEST(Sweep, IsBabaisNearestPlane) {
  for (const int64_t k : {1, 2, 13, 48}) {
    const test::RandomLayer layer = test::random_layer(6, k, 43 + k);
    QuantizeOptions options;
    options.group_size = 5;
    const Plan plan = make_plan(options, k);
    Grid grid = wide_grid(layer.weight, plan);
    const at::Tensor order = at::argsort(layer.hessian.diagonal(), true, 0, true);
    const at::Tensor codes = sweep(layer.weight, factorise(layer.hessian, order, 0.01), plan, grid).codes;
    const at::Tensor scales = grid.scales.t().repeat_interleave(5, 1).narrow(1, 0, k);
    const Matrix expected =
        reference::nearest_plane(Matrix(layer.weight), reference::damped(Matrix(layer.hessian), 0.01), Matrix(scales),
                                 {order.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>() + k});
    EXPECT_TRUE(codes.gt(0).logical_and(codes.lt(15)).all().item<bool>());
    EXPECT_EQ(Matrix(codes.to(at::kDouble) - 8).values, expected.values) << k;
  }
}

TEST(Sweep, RowLossesAreAboutOneThirdOfTheirBound) {
  const test::RandomLayer layer = test::random_layer(1000, 40, 44);
  const Plan plan = make_plan({}, 40);
  Grid grid = wide_grid(layer.weight, plan);
  const Factor factor = factorise(layer.hessian, at::arange(40, at::kLong), 0);
  const at::Tensor losses = sweep(layer.weight, factor, plan, grid).losses;
  const at::Tensor bounds = grid.scales[0].to(at::kDouble).square() * factor.pivots.sum() / 4;
  EXPECT_TRUE(losses.le(bounds * (1 + 1e-9)).all().item<bool>());
  // Rounding errors spread evenly over a step have a third of the largest square; 40,000 of them.
  EXPECT_NEAR(losses.div(bounds).mean().item<double>(), 1.0 / 3, 0.02);
}

TEST(Sweep, StripsOfAnyNumberOfRows) {
  const test::RandomLayer layer = test::random_layer(130, 21, 42);
  const Plan plan = make_plan({}, 21);
  const Factor factor = factorise(layer.hessian, at::arange(21, at::kLong), 0.01);
  Grid all_grid = minmax_grid(layer.weight, plan);
  const at::Tensor all = sweep(layer.weight, factor, plan, all_grid).codes;
  for (const int64_t n : {1, 31, 32, 33, 63, 64, 65, 129}) {  // around strips of 32 rows
    const at::Tensor part = layer.weight.narrow(0, 0, n).contiguous();
    Grid grid = minmax_grid(part, plan);
    EXPECT_TRUE(sweep(part, factor, plan, grid).codes.equal(all.narrow(0, 0, n))) << n;
  }
}

}  // namespace
}  // namespace gptq
