#pragma once

#include <gptq/quantize_module.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "model/atomic_output.h"
#include "model/perplexity.h"

namespace gptq::tools {

using Json = nlohmann::ordered_json;

/// A JSON file, opened before the long work and written after it, complete or not at all. An empty path: no file.
class JsonOutput {
 public:
  explicit JsonOutput(const std::string& path);
  void write(const Json& value);

 private:
  std::optional<AtomicFile> file_;
};

/// What the quantize command has to tell.
struct QuantizeSummary {
  std::vector<QuantizedLinear> layers;
  std::optional<EvaluationOptions> windows;  ///< set if a text was scored
  std::vector<Evaluation> evaluations;       ///< float, round to nearest, quantized
  std::vector<double> output_errors;         ///< of rounding to nearest and quantized, if batches were scored
  int64_t linear_bytes_before = 0;           ///< in the checkpoint's own dtype
  int64_t linear_bytes_after = 0;
  std::string device = "cpu";
  int64_t device_peak_bytes = 0;  ///< of tensors, while quantizing; 0 on the CPU
  double seconds_quantize = 0;
  double seconds_evaluate = 0;
  double seconds_total = 0;
};

Json to_json(const QuantizeSummary& summary);
void print_summary(const QuantizeSummary& summary);

/// One row a model: perplexity and, for those after the first, divergence from the first.
void print_evaluations(const std::vector<std::string>& names, const std::vector<Evaluation>& evaluations,
                       const EvaluationOptions& windows);

}  // namespace gptq::tools
