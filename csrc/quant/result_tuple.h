#pragma once

#include <ATen/core/Dict.h>
#include <gptq/quantize_weight.h>

#include <optional>
#include <string>
#include <tuple>

namespace gptq {

/// A QuantizeResult for Python and TorchScript: codes, scales, zeros, the report under the names of its fields, bias
/// shift, input order.
using ResultTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, c10::Dict<std::string, double>,
                               std::optional<at::Tensor>, std::optional<at::Tensor>>;

ResultTuple result_tuple(const QuantizeResult& result);

}  // namespace gptq
