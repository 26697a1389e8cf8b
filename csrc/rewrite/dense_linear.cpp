#include "rewrite/dense_linear.h"

#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "quant/product.h"
#include "rewrite/linear_finder.h"

namespace gptq::rewrite {

void speed_up_linears(torch::jit::Graph& graph, const torch::jit::Module& module) {
  const at::NoGradGuard no_grad;
  for (const LinearNode& linear : find_linears(graph, module)) {
    if (!linear.weight.is_cpu()) {
      continue;
    }
    const torch::jit::WithInsertPoint at_linear(linear.node);
    torch::jit::Value* weight =
        linear.conv1d ? graph.insertConstant(linear.weight.detach().t().contiguous()) : linear.weight_value;
    torch::jit::Value* bias =
        linear.bias_index ? linear.node->input(*linear.bias_index) : graph.insertConstant(c10::IValue());
    torch::jit::Node* dense = graph.insertNode(
        graph.create(c10::Symbol::fromQualString("gptq::linear_dense"), {linear.input(), weight, bias}));
    dense->output()->copyMetadata(linear.node->output());
    linear.node->output()->replaceAllUsesWith(dense->output());
    linear.node->destroy();
  }
}

TORCH_LIBRARY_FRAGMENT(gptq, m) {
  m.def("linear_dense(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", linear_dense);
}

}  // namespace gptq::rewrite
