#pragma once

#include <map>
#include <optional>
#include <string>

#include "model/coded_weight.h"
#include "model/gpt2_config.h"
#include "model/gpt2_tensors.h"

namespace gptq {

/// Whether the checkpoint holds the linear quantized, in any format.
/// @param path "transformer.h.0.attn.c_attn" for one
bool is_quantized_linear(const GPT2Tensors& tensors, const std::string& path);

/// One linear of a quantized checkpoint, without its bias, as linear_w4 takes it.
/// @param settings of config.json
/// @throws c10::Error naming the file and the tensor, what is required and what is there
QuantizedTensors read_quantized_linear(GPT2Tensors& tensors, const std::optional<QuantizationConfig>& settings,
                                       const std::string& path, LinearShape shape);

/// The same as numbers.
CodedWeight read_coded_linear(GPT2Tensors& tensors, const std::optional<QuantizationConfig>& settings,
                              const std::string& path, LinearShape shape);

/// Every quantized linear of a checkpoint, by its path.
std::map<std::string, CodedWeight> read_coded_linears(const TensorStore& store, const GPT2Config& config);

}  // namespace gptq
