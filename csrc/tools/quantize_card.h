#pragma once

#include <gptq/quantize_weight.h>

#include <cstdint>
#include <string>

#include "model/quantization_config.h"
#include "tools/report.h"

namespace gptq::tools {

/// What a model card says beside the summary.
struct CardSettings {
  CheckpointFormat format = CheckpointFormat::kLibgptq;
  std::string source;       ///< folder of the float model; only its last name is told
  std::string base_model;   ///< name on the hub; empty: not known
  QuantizeOptions options;  ///< of most layers
  std::string calibration;  ///< path of the text, empty: none; only its last name is told
  int64_t samples = 0;
  int64_t sequence_length = 0;
  uint64_t seed = 0;
  std::string eval;  ///< path of the text that was scored, if one was; only its last name is told
};

/// The README.md of a quantized folder: front matter for the hub with what holds of the source's (see
/// inherited_metadata), settings, calibration, perplexities, sizes, how to load it, and a table of the layers.
std::string model_card(const QuantizeSummary& summary, const CardSettings& settings);

}  // namespace gptq::tools
