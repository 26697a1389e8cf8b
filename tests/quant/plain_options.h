#pragma once

#include <gptq/quantize_weight.h>

namespace gptq::test {

/// Mode "default" with everything left out that the references for the sweep alone do not do.
inline QuantizeOptions plain_options() {
  QuantizeOptions options;
  options.scale_search = "minmax";
  options.refine_sweeps = 0;
  options.row_guard = false;
  options.correct_bias = false;
  options.target_alpha = 0;
  return options;
}

}  // namespace gptq::test
