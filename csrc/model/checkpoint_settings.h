#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "model/checkpoint.h"

/// What config.json says of the quantized linears, as each format has it.
namespace gptq {

/// Whether every zero point is the middle code.
bool is_symmetric(const CodedWeight& weight);

/// @param previous the source's; layers quantized earlier stay as they are described, so that quantizing in two steps
///        works
/// @param settings further fields
nlohmann::json libgptq_settings(const nlohmann::json& previous, const std::map<std::string, QuantizedTensors>& replaced,
                                const nlohmann::json& settings);

/// @param meta goes into "meta"
nlohmann::json gptq_settings(const GPT2Config& config, const std::map<std::string, CodedLinear>& replaced,
                             const nlohmann::json& meta);

nlohmann::json compressed_tensors_settings(const GPT2Config& config,
                                           const std::map<std::string, CodedLinear>& replaced);

}  // namespace gptq
