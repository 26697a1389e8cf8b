#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace gptq {

/// How a weight is quantized. The defaults are those of the driver and of Python.
struct QuantizeOptions {
  /// 2 to 8. Only 4 has a packed form, see pack_w4.
  int64_t bits = 4;
  /// Columns that share a scale and zero point; the last group may be short. -1, or at least K: one group per row.
  int64_t group_size = 128;
  /// Whether the zero point is fixed at the middle code, 2^(bits-1).
  bool symmetric = true;
  /// One scale and zero point for the whole weight; group_size is then not used.
  bool per_tensor = false;
  /// "static": columns by descending diagonal of H, groups as stored; "off": columns as stored; "auto": "static" in
  /// mode "default", "off" in mode "classic".
  std::string act_order = "auto";
  /// "default"; "classic": the published algorithm; "rtn": round to nearest.
  std::string mode = "default";
  /// Added to the diagonal of H, as a share of the diagonal's mean.
  double damping = 0.01;
  /// Columns per block of the solver. Changes speed and nothing else, not even the last bit.
  int64_t block_size = 128;
  /// Mode "default", where the drift of the inputs is known: how far the weight is moved towards the outputs of the
  /// float model before it is quantized, 0..1. Costs a K x K product over all calibration inputs.
  double target_alpha = 0;
};

/// What happened while a weight was quantized. Losses are tr(E H Eᵀ), E = W - Q, with H as given: without damping. If
/// mode "rtn" is given no Hessian, they are those of H = I. With a drift, W is the weight after it was moved.
struct QuantizeReport {
  double loss = 0;                  ///< of the result
  double rtn_loss = 0;              ///< of round-to-nearest with min/max scales and the same options
  double relative_error = 0;        ///< sqrt(loss / tr(W H Wᵀ)): relative error of the layer's output
  double rtn_relative_error = 0;    ///< the same for round-to-nearest
  double damping = 0;               ///< damping in the end
  int64_t damping_escalations = 0;  ///< how often it had to be raised
  bool float64 = false;             ///< whether the factorisation ran in float64
  int64_t dead_columns = 0;         ///< inputs that were zero in every sample
};

struct QuantizeResult {
  at::Tensor codes;        ///< u8 [N, K], 0..2^bits-1
  at::Tensor scales;       ///< f16 [n_groups, N], finite and positive
  at::Tensor zeros;        ///< u8 [n_groups, N]
  int64_t group_size = 0;  ///< columns per group, -1: one group per row
  QuantizeReport report;

  /// f32 [N, K]: (code - zero) * scale.
  at::Tensor dequantize() const;
};

/// Quantizes one weight so that tr(E H Eᵀ) is small: GPTQ (Frantar et al., 2022) in the inverse-free pull form, which
/// gives the codes of the published form at a quarter of the flops.
///
/// Grid. Scales are rounded to float16 before anything is quantized with them. Symmetric: scale = 2 max|w| /
/// (2^bits-1); asymmetric: (max - min) / (2^bits-1) over a range that includes 0, zero point round(-min / scale). A
/// group of zeros has scale 1, so that it stays zero; a scale below the smallest float16 becomes that one; a scale
/// beyond the largest float16 is an error.
///
/// Modes. "default": scales from the weight as it is. "classic": with act_order "off", scales of a group are taken when
/// the sweep reaches it, from weights that hold every update so far (dynamic groups); with act_order "static" as in
/// "default". "rtn": no sweep.
///
/// Damping. Hd = H + damping * mean(diag H) * I is factorised in float32. If the factor does not reproduce Hd closely
/// enough it is redone in float64; if that fails too, the damping is raised threefold (from 0 to 0.01) up to six times.
/// The report says so.
///
/// Dead columns, where the diagonal of H is 0: their diagonal is taken as the mean, which leaves them rounded to
/// nearest, neither receiving nor passing on corrections.
///
/// Drift. A layer behind others that are quantized already sees inputs x̂ where the float model has x. With D = 2/n Σ (x
/// - x̂) x̂ᵀ and H that of x̂, the weight is first moved to W + target_alpha W D Hd⁻¹, which for 1 is the ridge regression
/// of the float model's outputs on x̂ (QEP, Arai and Ichikawa, 2025).
///
/// Arithmetic is float32, float64 for a float64 weight. The codes of a row depend neither on the other rows nor on
/// block size or number of threads.
///
/// @param weight floating point [N, K] on the CPU, finite
/// @param hessian floating point [K, K] on the CPU, symmetric positive semidefinite, finite; may be an undefined tensor
///        in mode "rtn", where it is read for the report only
/// @param drift floating point [K, K], finite: D; an undefined tensor means none. Read in mode "default" only, and not
/// where
///        target_alpha is 0
/// @throws c10::Error naming the argument, the requirement and the value received. The arguments are never changed.
QuantizeResult quantize_weight(const at::Tensor& weight, const at::Tensor& hessian, const QuantizeOptions& options = {},
                               const at::Tensor& drift = {});

}  // namespace gptq
