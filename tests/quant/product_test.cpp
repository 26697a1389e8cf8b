#include "quant/product.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/quant/random_layer.h"

namespace gptq {
namespace {

TEST(Product, IsABTransposedForEveryShape) {
  for (const auto& [m, n, k] : {std::tuple{1, 1, 1}, {31, 33, 32}, {32, 32, 31}, {33, 32, 65}, {257, 64, 300}}) {
    const at::Tensor a = test::random_layer(m, k, 11).weight, b = test::random_layer(n, k, 12).weight;
    const at::Tensor exact = a.mm(b.t()), size = a.abs().mm(b.abs().t());
    EXPECT_TRUE(product(a, b).sub(exact).abs().le(size * (1.2e-16 * (k + 1))).all().item<bool>());
    const at::Tensor x = a.to(at::kFloat), y = b.to(at::kFloat);
    const at::Tensor rounded = x.to(at::kDouble).mm(y.to(at::kDouble).t());
    EXPECT_TRUE(product(x, y).sub(rounded).abs().le(size * (6e-8 * (k + 1))).all().item<bool>()) << m;
    EXPECT_TRUE(product(x, y).is_contiguous());
    // Factors and result in bfloat16: three roundings of 2^-9, the last of the result.
    const at::Tensor coarse = coarse_product(x, y);
    EXPECT_EQ(coarse.scalar_type(), at::kFloat);
    EXPECT_TRUE(coarse.sub(rounded).abs().le(size * (3.1 / 512)).all().item<bool>()) << m;
  }
}

TEST(Product, LinearDenseIsLinearForEveryShapeAndDtype) {
  for (const auto& [tokens, k, n] : {std::tuple{1, 64, 64}, {31, 33, 40}, {32, 32, 32}, {45, 100, 33}, {40, 31, 64}}) {
    const at::Tensor w = test::random_layer(n, k, 15).weight, x = test::random_layer(2 * tokens, k, 16).weight;
    const at::Tensor b = test::random_layer(1, n, 17).weight.squeeze(0);
    const at::Tensor size = x.abs().mm(w.abs().t()) + b.abs();
    for (const auto dtype : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16}) {
      // Sums in float32 or float64, and the rounding of the result.
      const double rounding = (dtype == at::kDouble ? 1.2e-16 : 6e-8) * (k + 3) + (dtype == at::kHalf       ? 1. / 2048
                                                                                   : dtype == at::kBFloat16 ? 1. / 256
                                                                                                            : 0);
      const at::Tensor input = x.to(dtype), weight = w.to(dtype), bias = b.to(dtype);
      const auto holds = [&](const at::Tensor& got, const at::Tensor& added) {
        const at::Tensor exact = input.to(at::kDouble).mm(weight.to(at::kDouble).t()) + added.to(at::kDouble);
        return got.scalar_type() == dtype &&
               got.reshape({2 * tokens, n}).sub(exact).abs().le(size * rounding).all().item<bool>();
      };
      EXPECT_TRUE(holds(linear_dense(input, weight, bias), bias)) << tokens << " " << dtype;
      const at::Tensor without = linear_dense(input.view({2, tokens, k}), weight, std::nullopt);
      EXPECT_EQ(without.sizes(), (at::IntArrayRef{2, tokens, n}));
      EXPECT_TRUE(holds(without, at::zeros({n}))) << tokens << " " << dtype;
      const at::Tensor strided = at::stack({input, input}, 1).select(1, 1);
      EXPECT_TRUE(holds(linear_dense(strided, weight.t().contiguous().t(), bias), bias)) << tokens << " " << dtype;
    }
  }
  const at::Tensor learned = at::ones({40, 64}).requires_grad_();
  EXPECT_TRUE(linear_dense(at::ones({50, 64}), learned, std::nullopt).requires_grad());
  EXPECT_TRUE(linear_dense(at::ones({50, 64}), at::ones({40, 64}), at::ones({1})).eq(65).all().item<bool>());
  EXPECT_EQ(linear_dense(at::ones({64}), at::ones({40, 64}), std::nullopt).sizes(), at::IntArrayRef{40});
  EXPECT_EQ(linear_dense(at::ones({0, 64}), at::ones({40, 64}), std::nullopt).sizes(), (at::IntArrayRef{0, 40}));
}

TEST(Product, TakesViews) {
  const at::Tensor a = test::random_layer(80, 90, 13).weight.to(at::kFloat), b = test::random_layer(90, 70, 14).weight;
  const at::Tensor left = a.narrow(0, 10, 40).narrow(1, 20, 50), right = b.to(at::kFloat).narrow(0, 5, 50).t();
  EXPECT_TRUE(product(left, right).allclose(left.mm(right.t()), 1e-5, 1e-5));
}

}  // namespace
}  // namespace gptq
