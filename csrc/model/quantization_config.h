#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "model/compressed_tensors_config.h"
#include "model/gptq_format.h"
#include "model/path_pattern.h"

namespace gptq {

/// How the quantized linears of a folder are stored.
enum class CheckpointFormat {
  kLibgptq,            ///< packed, scales and zeros as linear_w4 takes them
  kGptq,               ///< the qweight, qzeros, scales and g_idx of GPTQModel and AutoGPTQ
  kCompressedTensors,  ///< the weight_packed, weight_scale, weight_zero_point and weight_shape of compressed-tensors
};

/// "libgptq", "gptq" or "compressed-tensors", also the quant_method of config.json.
const char* format_name(CheckpointFormat format);

/// The inverse of format_name.
std::optional<CheckpointFormat> format_named(const std::string& name);

/// What config.json says of the linears that are quantized, in its "quantization_config". One of
/// {"quant_method": "libgptq", "format": "w4", "version": 1, "bits": 4, "group_size": 128, "sym": true,
///  "compute": "exact", "modules": {"transformer.h.0.attn.c_attn": {"bits": 4, "group_size": 64}}}; entries of
///  "modules" override;
/// {"quant_method": "gptq", "checkpoint_format": "gptq" or "gptq_v2", "bits": 4, "group_size": 128, "sym": true,
///  "dynamic": {"+:^transformer\\.h\\.0\\.": {"bits": 8}, "-:lm_head": {}}}; "dynamic" overrides by regular expression;
/// or that of CompressedTensorsConfig.
struct QuantizationConfig {
  struct Module {
    int64_t bits;
    int64_t group_size;
  };
  /// An entry of "dynamic".
  struct Pattern {
    std::string text;
    PathPattern pattern;
    std::optional<int64_t> bits;
    std::optional<int64_t> group_size;
  };

  CheckpointFormat format = CheckpointFormat::kLibgptq;
  Module defaults{4, 128};
  bool symmetric = true;
  std::map<std::string, Module> modules;       ///< kLibgptq
  std::string compute = "exact";               ///< kLibgptq: of all linears, see linear_w4
  GptqZeros gptq_zeros = GptqZeros::kLessOne;  ///< kGptq
  std::vector<Pattern> patterns;               ///< kGptq
  CompressedTensorsConfig compressed_tensors;  ///< kCompressedTensors; the others do not hold then

  /// Of kLibgptq and kGptq.
  /// @param path of the linear, "transformer.h.0.attn.c_attn" for one
  /// @throws c10::Error where two patterns that differ match the path: which one comes first is not kept
  Module of(const std::string& path) const;

  /// @param source names the object in errors
  /// @param default_method what quant_method is where it is absent: "gptq" in a quantize_config.json
  /// @throws c10::Error "<source>: <field> must be <requirement>, got <value>"
  static QuantizationConfig parse(const nlohmann::json& json, const std::string& source,
                                  const char* default_method = nullptr);
};

}  // namespace gptq
