#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace gptq {

/// How a weight is quantized. The defaults are those of the driver and of Python.
struct QuantizeOptions {
  int64_t bits = 4;             ///< 2, 3, 4 or 8
  int64_t group_size = 128;     ///< columns that share a scale and zero point; -1: one group per row
  bool symmetric = true;        ///< zero point fixed at the middle code, 2^(bits-1)
  bool per_tensor = false;      ///< one scale and zero point for the whole weight; needs group_size -1
  std::string act_order = "static";  ///< "off", or "static": columns by descending diagonal of H, groups as stored
  std::string mode = "default";      ///< "default", "classic" (the published algorithm) or "rtn" (round to nearest)
  double damping = 0.01;        ///< added to the diagonal of H, as a share of the diagonal's mean
  int64_t block_size = 128;     ///< columns per block of the solver; changes speed only
};

/// What happened while a weight was quantized. Losses are tr(E H Eᵀ), E = W - Q, H without damping.
struct QuantizeReport {
  double loss = 0;                ///< of the result
  double rtn_loss = 0;            ///< of round-to-nearest on the same options
  double relative_error = 0;      ///< sqrt(loss / tr(W H Wᵀ)): relative error of the layer's output
  double rtn_relative_error = 0;  ///< the same for round-to-nearest
  double damping = 0;             ///< damping in the end
  int64_t damping_escalations = 0;  ///< how often it had to be raised
  bool float64 = false;           ///< whether the factorisation was redone in float64
  int64_t dead_columns = 0;       ///< inputs that were zero in every sample
};

struct QuantizeResult {
  at::Tensor codes;   ///< u8 [N, K]
  at::Tensor scales;  ///< f16 [n_groups, N]
  at::Tensor zeros;   ///< u8 [n_groups, N]
  int64_t group_size = 0;  ///< columns per group, -1: one group per row
  QuantizeReport report;

  /// f32 [N, K]: (code - zero) * scale.
  at::Tensor dequantize() const;
};

/// Quantizes one weight so that tr(E H Eᵀ) is small: GPTQ (Frantar et al., 2022) in the inverse-free pull form.
/// Neither argument is changed.
///
/// @param weight floating point [N, K]
/// @param hessian floating point [K, K], symmetric positive semidefinite, finite; not read in mode "rtn" except for the
///        report
/// @throws c10::Error naming the argument, the requirement and the value received
QuantizeResult quantize_weight(const at::Tensor& weight, const at::Tensor& hessian, const QuantizeOptions& options = {});

}  // namespace gptq
