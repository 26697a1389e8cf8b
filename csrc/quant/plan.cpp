#include "quant/plan.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace gptq {
namespace {

void check_names(const QuantizeOptions& options) {
  TORCH_CHECK(options.mode == "default" || options.mode == "classic" || options.mode == "rtn",
              "quantize_weight: mode must be \"default\", \"classic\" or \"rtn\", got \"", options.mode, "\"");
  TORCH_CHECK(options.act_order == "auto" || options.act_order == "off" || options.act_order == "static" ||
                  options.act_order == "dynamic",
              "quantize_weight: act_order must be \"auto\", \"off\", \"static\" or \"dynamic\", got \"",
              options.act_order, "\"");
  TORCH_CHECK(options.scale_search == "auto" || options.scale_search == "minmax" || options.scale_search == "weighted",
              "quantize_weight: scale_search must be \"auto\", \"minmax\" or \"weighted\", got \"",
              options.scale_search, "\"");
}

void check_numbers(const QuantizeOptions& options) {
  TORCH_CHECK(options.bits >= 2 && options.bits <= 8, "quantize_weight: bits must be in 2..8, got ", options.bits);
  TORCH_CHECK(options.group_size == -1 || options.group_size >= 1,
              "quantize_weight: group_size must be at least 1, or -1 for one group per row, got ", options.group_size);
  TORCH_CHECK(std::isfinite(options.damping) && options.damping >= 0,
              "quantize_weight: damping must be finite and at least 0, got ", options.damping);
  TORCH_CHECK(options.target_alpha >= 0 && options.target_alpha <= 1,
              "quantize_weight: target_alpha must be in 0..1, got ", options.target_alpha);
  TORCH_CHECK(options.block_size >= 1, "quantize_weight: block_size must be at least 1, got ", options.block_size);
  TORCH_CHECK(options.refine_sweeps >= 0, "quantize_weight: refine_sweeps must be at least 0, got ",
              options.refine_sweeps);
  TORCH_CHECK(options.min_samples >= 0, "quantize_weight: min_samples must be at least 0, got ", options.min_samples);
}

}  // namespace

Plan make_plan(const QuantizeOptions& options, int64_t k) {
  check_names(options);
  check_numbers(options);
  const bool classic = options.mode == "classic", ours = options.mode == "default";
  const bool one_group = options.per_tensor || options.group_size == -1;
  Plan plan{};
  plan.rule = {options.bits, options.symmetric};
  plan.group_size = one_group ? k : std::min(options.group_size, k);
  plan.per_tensor = options.per_tensor;
  plan.sweep = options.mode != "rtn";
  plan.permute = plan.sweep && options.act_order == "dynamic";
  plan.by_diagonal = plan.permute || options.act_order == "static" || (options.act_order == "auto" && !classic);
  plan.dynamic_groups = classic && (plan.permute || !plan.by_diagonal) && !plan.per_tensor;
  plan.weighted_scales =
      !plan.per_tensor && (options.scale_search == "weighted" || (options.scale_search == "auto" && ours));
  plan.row_guard = ours && options.row_guard;
  plan.correct_bias = ours && options.correct_bias;
  plan.search_damping = ours && options.search_damping;
  plan.compare = options.compare;
  plan.refine_sweeps = ours ? options.refine_sweeps : 0;
  plan.damping = options.damping;
  plan.target_alpha = ours ? options.target_alpha : 0;
  plan.block_size = std::min(options.block_size, k);
  return plan;
}

}  // namespace gptq
