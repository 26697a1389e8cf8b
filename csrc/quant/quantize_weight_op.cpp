#include <gptq/quantize_weight.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "quant/report_dict.h"

namespace gptq {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, c10::Dict<std::string, double>> quantize_weight_cpu(
    const at::Tensor& weight, const std::optional<at::Tensor>& hessian, int64_t bits, int64_t group_size,
    bool symmetric, bool per_tensor, std::string act_order, std::string mode, double damping, int64_t block_size,
    const std::optional<at::Tensor>& drift, double target_alpha) {
  const QuantizeResult result = quantize_weight(weight, hessian.value_or(at::Tensor()),
                                                {bits, group_size, symmetric, per_tensor, std::move(act_order),
                                                 std::move(mode), damping, block_size, target_alpha},
                                                drift.value_or(at::Tensor()));
  return {result.codes, result.scales, result.zeros, report_dict(result.report)};
}

}  // namespace

TORCH_LIBRARY_IMPL(gptq, CPU, m) {
  m.impl("quantize_weight", quantize_weight_cpu);
}

}  // namespace gptq
