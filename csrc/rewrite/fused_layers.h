#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace gptq::rewrite {

/// Spells out the operators that torch's own modules run as a whole in eval mode, so that their linears are seen:
/// aten::_transformer_encoder_layer_fwd, and aten::_native_multi_head_attention where query, key and value are one
/// tensor. The new nodes raise an error where they are given a nested tensor.
void decompose_fused_layers(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace gptq::rewrite
