#include "rewrite/fused_layers.h"

#include <gptq/quantize_module.h>
#include <gtest/gtest.h>
#include <torch/script.h>

#include "tests/rewrite/modules.h"

namespace gptq {
namespace {

using test::random_tensor;

constexpr int64_t kWidth = 12, kHidden = 20;

/// A module with the weights of one encoder layer.
torch::jit::Module with_weights(const std::string& source) {
  torch::jit::Module module("Layer");
  uint64_t seed = 1;
  const auto add = [&](const std::string& name, at::IntArrayRef shape, double scale, double offset) {
    module.register_parameter(name, random_tensor(shape, seed++, scale) + offset, false);
  };
  for (const auto& [name, n, k] : {std::tuple{"qkv", 3 * kWidth, kWidth},
                                   {"proj", kWidth, kWidth},
                                   {"ffn_1", kHidden, kWidth},
                                   {"ffn_2", kWidth, kHidden}}) {
    add(name + std::string("_weight"), {n, k}, 0.4, 0);
    add(name + std::string("_bias"), {n}, 0.3, 0);
  }
  for (const char* name : {"norm_1", "norm_2"}) {
    add(name + std::string("_weight"), {kWidth}, 0.2, 1);
    add(name + std::string("_bias"), {kWidth}, 0.2, 0);
  }
  module.define(source);
  module.eval();
  return module;
}

torch::jit::Module encoder_layer(const std::string& flags, const std::string& mask_type) {
  return with_weights(
      "def forward(self, x: Tensor, mask: Optional[Tensor] = None):\n"
      "    return torch._transformer_encoder_layer_fwd(x, 12, 3, self.qkv_weight, self.qkv_bias, self.proj_weight,\n"
      "        self.proj_bias, " +
      flags +
      ", 1e-5, self.norm_1_weight, self.norm_1_bias, self.norm_2_weight, self.norm_2_bias,\n"
      "        self.ffn_1_weight, self.ffn_1_bias, self.ffn_2_weight, self.ffn_2_bias, mask, " +
      mask_type + ")\n");
}

torch::jit::Module attention(const std::string& inputs, const std::string& flags) {
  return with_weights(
      "def forward(self, x: Tensor, mask: Optional[Tensor] = None):\n"
      "    z = x + 1.0\n"
      "    return torch._native_multi_head_attention(" +
      inputs + ", 12, 3, self.qkv_weight, self.qkv_bias, self.proj_weight, self.proj_bias, mask, " + flags + ")\n");
}

bool has_fused(const torch::jit::Module& module) {
  const std::string graph = module.get_method("forward").graph()->toString();
  return graph.find("aten::_transformer_encoder_layer_fwd") != std::string::npos ||
         graph.find("aten::_native_multi_head_attention") != std::string::npos;
}

/// The module with its fused operators spelt out and every weight as it was.
torch::jit::Module decomposed(const torch::jit::Module& module) {
  QuantizeModuleOptions options;
  options.quantize.mode = "rtn";
  options.skip = [](const std::string&) { return true; };
  return quantize_module(module, {}, options).module;
}

void expect_close(const at::Tensor& got, const at::Tensor& expected, const std::string& what) {
  ASSERT_EQ(got.sizes(), expected.sizes()) << what;
  // The operators are the same but for blocking: some roundings of values of size 10.
  EXPECT_LT((got - expected).abs().max().item<float>(), 1e-5) << what;
}

/// A mask of each type for x [2, 5, K]; no row of it leaves out every position.
at::Tensor mask_of(const std::string& type) {
  if (type == "0") {
    return at::ones({5, 5}).triu(1).to(at::kBool);
  }
  if (type == "1") {
    return at::arange(5).gt(at::tensor({2, 4}).unsqueeze(1));
  }
  return at::ones({2, 3, 5, 5}).triu(1).mul(-1e9);  // as a float, where what is not zero is left out
}

TEST(FusedLayers, AnEncoderLayerComputesTheSameSpeltOut) {
  const at::NoGradGuard no_grad;
  const at::Tensor x = random_tensor({2, 5, kWidth}, 50);
  for (const char* flags : {"False, False", "True, False", "False, True", "True, True"}) {  // gelu, norm first
    for (const std::string type : {"None", "0", "1", "2"}) {
      torch::jit::Module fused = encoder_layer(flags, type);
      torch::jit::Module spelt_out = decomposed(fused);
      ASSERT_TRUE(has_fused(fused));
      ASSERT_FALSE(has_fused(spelt_out));
      const c10::IValue mask = type == "None" ? c10::IValue() : c10::IValue(mask_of(type));
      expect_close(spelt_out.forward({x, mask}).toTensor(), fused.forward({x, mask}).toTensor(),
                   std::string(flags) + ", mask type " + type);
    }
  }
}

TEST(FusedLayers, AnAttentionComputesTheSameSpeltOut) {
  const at::NoGradGuard no_grad;
  const at::Tensor x = random_tensor({2, 5, kWidth}, 51);
  for (const char* weights : {"True, True", "True, False", "False, True"}) {  // needed, averaged
    for (const std::string type : {"0", "1", "2"}) {
      torch::jit::Module fused = attention("x, x, x", std::string(weights) + ", " + type);
      torch::jit::Module spelt_out = decomposed(fused);
      ASSERT_FALSE(has_fused(spelt_out));
      const auto expected = fused.forward({x, mask_of(type)}).toTuple()->elements().vec();
      const auto got = spelt_out.forward({x, mask_of(type)}).toTuple()->elements().vec();
      expect_close(got[0].toTensor(), expected[0].toTensor(), std::string(weights) + ", mask type " + type);
      if (std::string(weights) != "False, True") {
        expect_close(got[1].toTensor(), expected[1].toTensor(), std::string(weights) + ", mask type " + type);
      }
    }
  }
}

TEST(FusedLayers, TheLinearsOfThemAreFound) {
  const std::vector<LinearInfo> layer = find_linears(encoder_layer("False, False", "None"));
  ASSERT_EQ(layer.size(), 4u);
  EXPECT_EQ(layer[0].name, "qkv_weight");
  EXPECT_EQ(layer[3].name, "ffn_2_weight");
  EXPECT_EQ(layer[3].in_features, kHidden);
  EXPECT_EQ(find_linears(attention("x, x, x", "False, True, None")).size(), 2u);
  // One weight for three inputs is no linear.
  EXPECT_EQ(find_linears(attention("x, z, z", "False, True, None")).size(), 0u);
}

TEST(FusedLayers, ANestedTensorIsAnError) {
  const at::NoGradGuard no_grad;
  torch::jit::Module spelt_out = decomposed(encoder_layer("False, False", "None"));
  const at::Tensor nested = at::_nested_tensor_from_mask(random_tensor({2, 5, kWidth}, 52), mask_of("1").logical_not());
  EXPECT_THROW(spelt_out.forward({nested}), std::exception);
}

}  // namespace
}  // namespace gptq
