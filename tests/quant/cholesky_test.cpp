#include "quant/cholesky.h"

#include <gtest/gtest.h>

#include "tests/quant/random_layer.h"

namespace gptq {
namespace {

TEST(Cholesky, ReproducesMatricesOfEverySize) {
  for (const int64_t k : {1, 2, 31, 32, 33, 63, 64, 65, 127, 129, 401}) {  // around strips of 32 and 64 rows
    const at::Tensor matrix = test::random_layer(1, k, 91).hessian;
    for (const auto dtype : {at::kFloat, at::kDouble}) {
      const at::Tensor a = matrix.to(dtype);
      const at::Tensor lower = cholesky(a).to(at::kDouble);
      // Backward error of a Cholesky factorisation: K + 1 units of rounding of the row and column's norms.
      const double unit = dtype == at::kFloat ? 6e-8 : 1.2e-16;
      const at::Tensor root = matrix.diagonal().sqrt();
      const at::Tensor bound = root.unsqueeze(1) * root * (static_cast<double>(k + 2) * unit);
      EXPECT_TRUE(lower.mm(lower.t()).sub(a.to(at::kDouble)).abs().le(bound).all().item<bool>()) << k << dtype;
      EXPECT_TRUE(lower.triu(1).eq(0).all().item<bool>());
    }
  }
}

TEST(Cholesky, ReadsTheUpperTriangleAlone) {
  const at::Tensor matrix = test::random_layer(1, 500, 92).hessian;
  EXPECT_TRUE(cholesky(matrix.triu() + at::full({500, 500}, 7.0, at::kDouble).tril(-1)).equal(cholesky(matrix)));
}

TEST(Cholesky, TellsWhatIsNotPositiveDefinite) {
  for (const int64_t at_column : {0, 10, 390, 799}) {
    at::Tensor matrix = at::eye(800, at::kDouble);
    matrix[at_column][at_column] = -1;
    EXPECT_FALSE(gptq::cholesky(matrix).defined()) << at_column;
  }
}

}  // namespace
}  // namespace gptq
