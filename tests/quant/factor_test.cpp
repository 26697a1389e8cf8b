#include "quant/factor.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/error_of.h"
#include "tests/quant/random_layer.h"
#include "tests/reference.h"

namespace gptq {
namespace {

using test::random_layer;

at::Tensor in_order(const at::Tensor& hessian, const at::Tensor& order) {
  return hessian.index_select(0, order).index_select(1, order);
}

// R with Hd = R Rᵀ, from what the sweep gets.
at::Tensor root_of(const Factor& factor) {
  return factor.multipliers.t().to(at::kDouble) * factor.pivots.sqrt();
}

// I - (1 - least) u uᵀ with u = (1, …, 1) / sqrt(k): least is its smallest eigenvalue, all others are 1.
at::Tensor with_least_eigenvalue(int64_t k, double least) {
  return at::eye(k, at::kDouble) - at::full({k, k}, (1 - least) / static_cast<double>(k), at::kDouble);
}

TEST(Factor, ReproducesTheDampedHessian) {
  for (const int64_t k : {1, 2, 7, 64, 129}) {
    const at::Tensor hessian = random_layer(1, k, 31 + k).hessian;
    const at::Tensor order = at::argsort(hessian.diagonal(), true, 0, true);
    const at::Tensor damped = in_order(hessian, order) + 0.02 * hessian.diagonal().mean() * at::eye(k, at::kDouble);
    const double size = damped.diagonal().max().item<double>();
    for (const auto dtype : {at::kFloat, at::kDouble}) {
      const Factor factor = factorise(hessian.to(dtype), order, 0.02);
      EXPECT_EQ(factor.multipliers.scalar_type(), dtype);
      EXPECT_EQ(factor.float64, dtype == at::kDouble);
      EXPECT_TRUE(factor.multipliers.diagonal().sub(1).abs().max().item<double>() < 1e-6);
      EXPECT_TRUE(factor.multipliers.triu(1).eq(0).all().item<bool>());
      const at::Tensor root = root_of(factor);
      // Backward error of a Cholesky factorisation: (K + 1) units of rounding per entry, a few more for scaling.
      const double unit = dtype == at::kFloat ? 6e-8 : 1.2e-16;
      const double error = root.mm(root.t()).sub(damped).abs().max().item<double>();
      EXPECT_LE(error, static_cast<double>(k + 8) * unit * size);
      EXPECT_LE(factor.pivots.sum().item<double>(), damped.diagonal().sum().item<double>() * (1 + 1e-6));
      if (dtype == at::kDouble) {
        // U with Hd⁻¹ = Uᵀ U is the inverse of R.
        const auto u = reference::upper_cholesky(reference::inverse(reference::Matrix(damped)));
        for (int64_t i = 0; i < k; ++i) {
          EXPECT_NEAR(root[i][i].item<double>() * u(i, i), 1, 1e-9);  // condition below 1e4, 129 columns
        }
      }
    }
  }
}

TEST(Factor, GoesToFloat64WhereFloat32IsTooCoarse) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(32);
  const at::Tensor basis = std::get<0>(at::linalg_qr(at::randn({64, 64}, generator, at::kDouble)));
  const at::Tensor order = at::arange(64, at::kLong);
  const auto with_spectrum_to = [&](double least) {
    const at::Tensor hessian = (basis * at::logspace(0, std::log10(least), 64, 10.0, at::kDouble)).mm(basis.t());
    return ((hessian + hessian.t()) / 2).to(at::kFloat);
  };
  // The least pivots are near 1e-7, about the rounding of a float32.
  const Factor factor = factorise(with_spectrum_to(1e-7), order, 1e-6);
  EXPECT_TRUE(factor.float64);
  EXPECT_EQ(factor.damping_escalations, 0);
  EXPECT_EQ(factor.damping, 1e-6);
  EXPECT_EQ(factor.multipliers.scalar_type(), at::kFloat);
  EXPECT_FALSE(factorise(with_spectrum_to(1e-3), order, 0.01).float64);
}

TEST(Factor, RaisesTheDampingWhereNothingElseHelps) {
  const at::Tensor order = at::arange(64, at::kLong);
  // mean diagonal 0.984: 0.01 and 0.03 of it are less than 0.05, 0.09 is more
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    const Factor factor = factorise(with_least_eigenvalue(64, -0.05).to(dtype), order, 0.01);
    EXPECT_EQ(factor.damping_escalations, 2);
    EXPECT_DOUBLE_EQ(factor.damping, 0.09);
    EXPECT_TRUE(factor.float64);
  }
  const Factor from_zero = factorise(with_least_eigenvalue(64, -0.05), order, 0);
  EXPECT_EQ(from_zero.damping_escalations, 3);
  EXPECT_DOUBLE_EQ(from_zero.damping, 0.09);
  const std::string error = test::error_of([&] { factorise(with_least_eigenvalue(64, -20), order, 0.01); });
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "even with damping 7.29 (asked for: 0.01)", error);
}

TEST(Factor, LoudChannelIsEquilibrated) {
  at::Tensor hessian = random_layer(1, 40, 77).hessian;
  hessian.select(0, 5).mul_(1000);
  hessian.select(1, 5).mul_(1000);
  const Factor factor = factorise(hessian.to(at::kFloat), at::argsort(hessian.diagonal(), true, 0, true), 0.01);
  EXPECT_EQ(factor.damping_escalations, 0);
  EXPECT_TRUE(factor.multipliers.isfinite().all().item<bool>());
}

}  // namespace
}  // namespace gptq
