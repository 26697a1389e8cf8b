#pragma once

#include <ATen/core/Dict.h>
#include <gptq/quantize_weight.h>

#include <string>

namespace gptq {

/// The report under the names of its fields, for Python and TorchScript.
c10::Dict<std::string, double> report_dict(const QuantizeReport& report);

}  // namespace gptq
