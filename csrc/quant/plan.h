#pragma once

#include <gptq/quantize_weight.h>

namespace gptq {

/// How a row's values become grid points.
struct GridRule {
  int64_t bits;
  bool symmetric;

  int64_t max_code() const { return (int64_t{1} << bits) - 1; }
};

/// QuantizeOptions after checking, with names resolved.
struct Plan {
  GridRule rule;
  int64_t group_size;  ///< 1..K
  bool per_tensor;
  bool sweep;            ///< false: round to nearest
  bool by_diagonal;      ///< columns by descending diagonal of H
  bool permute;          ///< groups of columns that follow each other in that order
  bool dynamic_groups;   ///< group scales from the updated weights
  bool weighted_scales;  ///< scale search
  bool row_guard;
  bool correct_bias;
  bool search_damping;
  bool compare;  ///< report round-to-nearest and relative errors
  int64_t refine_sweeps;
  double damping;
  double target_alpha;
  int64_t block_size;
};

/// @throws c10::Error naming the option
Plan make_plan(const QuantizeOptions& options, int64_t k);

}  // namespace gptq
