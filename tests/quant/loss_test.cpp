#include "quant/loss.h"

#include <gtest/gtest.h>

#include "tests/quant/random_layer.h"
#include "tests/reference.h"

namespace gptq {
namespace {

TEST(Loss, EqualsTheReferenceAndTheErrorOnRealInputs) {
  for (const int64_t n : {1, 3, 1025}) {  // one more than is multiplied at a time
    const test::RandomLayer layer = test::random_layer(n, 9, 51 + n);
    const double loss = quadratic_form(layer.weight, layer.hessian);
    // Sums of n * 81 terms of one sign at most; 2/samples ‖A Xᵀ‖² is the same number.
    const double tolerance = 1.2e-16 * static_cast<double>(n * 81) * loss;
    EXPECT_NEAR(loss, reference::quadratic_form(reference::Matrix(layer.weight), reference::Matrix(layer.hessian)),
                tolerance);
    const double outputs = layer.weight.mm(layer.inputs.t()).square().sum().item<double>();
    EXPECT_NEAR(loss, outputs * 2 / static_cast<double>(layer.inputs.size(0)), tolerance);
    EXPECT_NEAR(quadratic_form(layer.weight, {}), layer.weight.square().sum().item<double>(), tolerance);
  }
}

TEST(Loss, ColumnsInBlocks) {
  for (const int64_t k : {255, 256, 257, 513}) {  // around blocks of 256 columns
    const test::RandomLayer layer = test::random_layer(3, k, 52);
    const double expected =
        reference::quadratic_form(reference::Matrix(layer.weight), reference::Matrix(layer.hessian));
    EXPECT_NEAR(quadratic_form(layer.weight, layer.hessian), expected,
                1.2e-16 * static_cast<double>(3 * k * k) * expected)
        << k;
  }
}

TEST(Loss, IsNotNegative) {
  const at::Tensor rows = at::tensor({1.0f, -1.0f}).view({1, 2});
  EXPECT_EQ(quadratic_form(rows, at::tensor({1.0f, 1.0000001f, 1.0000001f, 1.0f}).view({2, 2})), 0);
}

}  // namespace
}  // namespace gptq
