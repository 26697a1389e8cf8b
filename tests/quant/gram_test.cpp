#include "quant/gram.h"

#include <gtest/gtest.h>

#include "tests/quant/random_layer.h"

namespace gptq {
namespace {

TEST(Gram, IsTheWholeProductForEveryWidth) {
  for (const int64_t k : {1, 2, 255, 256, 257, 600}) {  // around blocks of 256 columns
    const at::Tensor rows = test::random_layer(1, k, 61, /*samples=*/37).inputs.to(at::kFloat);
    at::Tensor gram = at::zeros({k, k});
    add_gram(gram, rows.narrow(0, 0, 20));
    add_gram(gram, rows.narrow(0, 20, 17));
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

}  // namespace
}  // namespace gptq
