#include "quant/gram.h"

#include <gtest/gtest.h>

#include "tests/quant/random_layer.h"

namespace gptq {
namespace {

TEST(Gram, IsTheWholeProductForEveryWidth) {
  for (const int64_t k : {1, 2, 511, 512, 513, 700}) {  // around blocks of 512 columns
    const at::Tensor rows = test::random_layer(1, k, 61, /*samples=*/37).inputs.to(at::kFloat);
    at::Tensor gram = at::zeros({k, k});
    add_gram(gram, rows.narrow(0, 0, 20).t().contiguous());
    add_gram(gram, rows.narrow(0, 20, 17).t().contiguous());
    const at::Tensor exact = rows.to(at::kDouble).t().mm(rows.to(at::kDouble));
    // 37 products and sums in float32, bounded by the diagonal: |x_i · x_j| <= ‖x_i‖ ‖x_j‖.
    const at::Tensor norms = exact.diagonal().sqrt();
    const at::Tensor bound = norms.unsqueeze(1) * norms * (40 * 6e-8);
    const at::Tensor full = mirrored(gram, 1);
    EXPECT_TRUE(full.sub(exact).abs().le(bound).all().item<bool>()) << k;
    EXPECT_TRUE(full.equal(full.t())) << k;
    EXPECT_TRUE(mirrored(gram, 0.5).equal(full * 0.5)) << k;
  }
}

TEST(Gram, TransposesEveryShape) {
  for (const auto& [n, k] : {std::pair{1, 1}, {0, 5}, {31, 33}, {32, 32}, {33, 31}, {97, 300}}) {
    const at::Tensor matrix = at::arange(n * k, at::kFloat).reshape({n, k});
    const at::Tensor result = transposed(matrix);
    EXPECT_TRUE(result.equal(matrix.t())) << n;
    EXPECT_TRUE(result.is_contiguous()) << n;
  }
}

TEST(Gram, ColumnSumsOfEveryShape) {
  for (const auto& [n, k] : {std::pair{1, 1}, {127, 63}, {128, 64}, {129, 65}, {300, 700}}) {
    const at::Tensor rows = test::random_layer(1, k, 62, n).inputs.to(at::kFloat), exact = rows.to(at::kDouble);
    const at::Tensor weights = at::arange(n, at::kFloat).remainder(3) / 2;
    for (const at::Tensor& given : {at::Tensor(), weights}) {
      const at::Tensor share = given.defined() ? given.to(at::kDouble).unsqueeze(1) : at::ones({n, 1}, at::kDouble);
      const ColumnSums sums = column_sums(rows, given);
      // 128 float32 sums and two products at a time.
      const at::Tensor size = (exact.abs() * share).sum(0), squares = (exact.square() * share).sum(0);
      EXPECT_TRUE(sums.values.sub((exact * share).sum(0)).abs().le(size * (130 * 6e-8)).all().item<bool>()) << n;
      EXPECT_TRUE(sums.squares.sub(squares).abs().le(squares * (130 * 6e-8)).all().item<bool>()) << n;
    }
  }
}

}  // namespace
}  // namespace gptq
