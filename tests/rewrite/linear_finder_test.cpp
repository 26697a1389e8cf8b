#include <gptq/quantize_module.h>
#include <gtest/gtest.h>
#include <torch/script.h>

#include "tests/rewrite/modules.h"

namespace gptq {
namespace {

using test::random_tensor;

TEST(FindLinears, TellsLinearsByWhatTheyCompute) {
  torch::jit::Module model("Model");
  model.register_parameter("w", random_tensor({3, 5}, 1), false);
  model.register_parameter("table", random_tensor({5, 5}, 2), false);
  model.define(
      "def forward(self, x: Tensor) -> Tensor:\n"
      "    y = torch.matmul(x, self.w.t())\n"              // [N, K], transposed
      "    z = torch.mm(x, self.table)\n"                  // [K, N]
      "    s = torch.matmul(x, z.t())\n"                   // no weight
      "    u = torch.addmm(z, x, self.table, beta=0.5)\n"  // scaled
      "    return torch.cat([y, z, s, u], 1)\n");
  const std::vector<LinearInfo> found = find_linears(model);
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].name, "w");
  EXPECT_FALSE(found[0].conv1d);
  EXPECT_EQ(found[0].out_features, 3);
  EXPECT_EQ(found[1].name, "table");
  EXPECT_TRUE(found[1].conv1d);
}

}  // namespace
}  // namespace gptq
