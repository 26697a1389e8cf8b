#include "quant/plan.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace gptq {

Plan make_plan(const QuantizeOptions& options, int64_t k) {
  TORCH_CHECK(options.bits >= 2 && options.bits <= 8, "quantize_weight: bits must be in 2..8, got ", options.bits);
  TORCH_CHECK(options.group_size == -1 || options.group_size >= 1,
              "quantize_weight: group_size must be at least 1, or -1 for one group per row, got ", options.group_size);
  TORCH_CHECK(options.mode == "default" || options.mode == "classic" || options.mode == "rtn",
              "quantize_weight: mode must be \"default\", \"classic\" or \"rtn\", got \"", options.mode, "\"");
  TORCH_CHECK(options.act_order == "auto" || options.act_order == "off" || options.act_order == "static",
              "quantize_weight: act_order must be \"auto\", \"off\" or \"static\", got \"", options.act_order, "\"");
  TORCH_CHECK(std::isfinite(options.damping) && options.damping >= 0,
              "quantize_weight: damping must be finite and at least 0, got ", options.damping);
  TORCH_CHECK(options.target_alpha >= 0 && options.target_alpha <= 1,
              "quantize_weight: target_alpha must be in 0..1, got ", options.target_alpha);
  TORCH_CHECK(options.block_size >= 1, "quantize_weight: block_size must be at least 1, got ", options.block_size);

  const bool classic = options.mode == "classic";
  const bool one_group = options.per_tensor || options.group_size == -1;
  Plan plan{};
  plan.rule = {options.bits, options.symmetric};
  plan.group_size = one_group ? k : std::min(options.group_size, k);
  plan.per_tensor = options.per_tensor;
  plan.sweep = options.mode != "rtn";
  plan.act_order = options.act_order == "static" || (options.act_order == "auto" && !classic);
  plan.dynamic_groups = classic && !plan.act_order && !plan.per_tensor;
  plan.damping = options.damping;
  plan.target_alpha = options.mode == "default" ? options.target_alpha : 0;
  plan.block_size = std::min(options.block_size, k);
  return plan;
}

}  // namespace gptq
