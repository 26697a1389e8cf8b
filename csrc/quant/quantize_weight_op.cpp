#include <gptq/quantize_weight.h>
#include <torch/library.h>

#include <string>

#include "quant/result_tuple.h"

namespace gptq {
namespace {

using OptionalTensor = const std::optional<at::Tensor>&;

ResultTuple quantize_weight_op(const at::Tensor& weight, OptionalTensor hessian, int64_t bits, int64_t group_size,
                               bool symmetric, bool per_tensor, std::string act_order, std::string mode, double damping,
                               int64_t block_size, OptionalTensor drift, double target_alpha, std::string scale_search,
                               int64_t refine_sweeps, bool row_guard, bool correct_bias, bool search_damping,
                               OptionalTensor mean, OptionalTensor float_mean, OptionalTensor half_hessian,
                               OptionalTensor half_drift, bool compare) {
  const auto tensor = [](OptionalTensor given) { return given.value_or(at::Tensor()); };
  const LayerStatistics statistics{tensor(hessian),    tensor(drift),        tensor(mean),
                                   tensor(float_mean), tensor(half_hessian), tensor(half_drift)};
  return result_tuple(quantize_weight(
      weight, statistics,
      {bits, group_size, symmetric, per_tensor, std::move(act_order), std::move(mode), damping, block_size,
       target_alpha, std::move(scale_search), refine_sweeps, row_guard, correct_bias, search_damping,
       /*min_samples=*/0, compare}));
}

}  // namespace

TORCH_LIBRARY_IMPL(gptq, CPU, m) {
  m.impl("quantize_weight", quantize_weight_op);
}

TORCH_LIBRARY_IMPL(gptq, CUDA, m) {
  m.impl("quantize_weight", quantize_weight_op);
}

}  // namespace gptq
