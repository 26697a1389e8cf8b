#include <ATen/core/dispatch/Dispatcher.h>
#include <gptq/quantize_weight.h>
#include <gtest/gtest.h>
#include <torch/script.h>

#include "tests/quant/random_layer.h"

namespace gptq {
namespace {

TEST(QuantizeWeightOp, ReturnsWhatTheFunctionReturns) {
  const test::RandomLayer layer = test::random_layer(10, 40, 81);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gptq::quantize_weight", "");
  torch::jit::Stack stack{layer.weight, layer.hessian, 3, 16, false};
  stack.insert(
      stack.end(),
      {c10::IValue(false), c10::IValue("off"), c10::IValue("default"), c10::IValue(0.05), c10::IValue(32),
       c10::IValue(0.1 * layer.hessian), c10::IValue(0.5), c10::IValue("weighted"), c10::IValue(2), c10::IValue(false),
       c10::IValue(true), c10::IValue(true), c10::IValue(layer.inputs.mean(0)), c10::IValue(layer.inputs.mean(0) + 0.1),
       c10::IValue(0.9 * layer.hessian), c10::IValue(0.2 * layer.hessian), c10::IValue(false)});
  op.callBoxed(&stack);
  const QuantizeOptions options{3,   16,         false, false, "off", "default", 0.05, 32,
                                0.5, "weighted", 2,     false, true,  true,      0,    false};
  const LayerStatistics statistics{layer.hessian,        0.1 * layer.hessian,
                                   layer.inputs.mean(0), layer.inputs.mean(0) + 0.1,
                                   0.9 * layer.hessian,  0.2 * layer.hessian};
  const QuantizeResult expected = quantize_weight(layer.weight, statistics, options);
  ASSERT_EQ(stack.size(), 6);
  EXPECT_TRUE(stack[0].toTensor().equal(expected.codes));
  EXPECT_TRUE(stack[1].toTensor().equal(expected.scales));
  EXPECT_TRUE(stack[2].toTensor().equal(expected.zeros));
  const auto report = stack[3].toGenericDict();
  EXPECT_EQ(report.at("loss").toDouble(), expected.report.loss);
  EXPECT_EQ(report.at("damping").toDouble(), expected.report.damping);
  EXPECT_EQ(report.size(), 12);
  EXPECT_TRUE(stack[4].toTensor().equal(expected.bias_shift));
  EXPECT_TRUE(stack[5].isNone());
}

}  // namespace
}  // namespace gptq
