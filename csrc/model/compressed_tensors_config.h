#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "model/compressed_tensors_format.h"
#include "model/path_pattern.h"

namespace gptq {

class JsonFields;

/// The "quantization_config" of compressed-tensors in the format "pack-quantized":
/// {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
///  "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": true,
///                                                                   "strategy": "group", "group_size": 128}}}}
/// A target, and an entry of "ignore", is the path of a linear, "re:" and a regular expression, or the class "Linear"
/// (of GPT-2 also "Conv1D").
class CompressedTensorsConfig {
 public:
  /// Of the targets that match, a path comes before an expression and that before a class, as in the package.
  /// @param path of a linear that is stored packed
  /// @throws c10::Error where no target matches it, or "ignore" does
  CompressedTensorsLayout of(const std::string& path) const;

  /// @throws c10::Error "<source>: <field> must be <requirement>, got <value>"
  static CompressedTensorsConfig parse(const JsonFields& fields);

 private:
  struct Target {
    std::string text;
    std::optional<PathPattern> pattern;  ///< of "re:"
  };
  struct Group {
    Target target;
    CompressedTensorsLayout layout;
  };

  static Target parse_target(const nlohmann::json& json, const std::string& where);
  static bool names(const Target& target, const std::string& path);
  void add_group(const nlohmann::json& json, const std::string& where);

  std::vector<Group> groups_;  ///< one a target, in the order in which they count
  std::vector<Target> ignore_;
};

/// Those settings. The most frequent layout has the target "Linear", and each other one names its linears.
/// @param linears that are stored packed, by path
/// @param ignore paths of the others
nlohmann::json compressed_tensors_settings(const std::map<std::string, CompressedTensorsLayout>& linears,
                                           const std::vector<std::string>& ignore);

}  // namespace gptq
