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
