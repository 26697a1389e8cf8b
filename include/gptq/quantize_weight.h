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
  /// "static": columns by descending diagonal of H, groups as stored; "dynamic": the same order, and groups of columns
  /// that follow each other in it, see QuantizeResult::input_order; "off": columns as stored; "auto": "static" in mode
  /// "default", "off" in mode "classic".
  std::string act_order = "auto";
  /// "default"; "classic": the published algorithm; "rtn": round to nearest.
  std::string mode = "default";
  /// Added to the diagonal of H, as a share of the diagonal's mean.
  double damping = 0.01;
  /// Columns per block of the solver. Changes speed and nothing else, not even the last bit.
  int64_t block_size = 128;
  /// Mode "default", where the drift of the inputs is known: how far the weight is moved towards the outputs of the
  /// float model before it is quantized, 0..1.
  double target_alpha = 1;
  /// "minmax"; "weighted": scales, negative ones too, that make the error of each group small, weighted by what each
  /// column costs; "auto": "weighted" in mode "default", "minmax" in the others. Not with per_tensor or dynamic groups.
  std::string scale_search = "auto";
  /// Mode "default": passes of coordinate descent over codes and scales after the sweep.
  int64_t refine_sweeps = 1;
  /// Mode "default": rows that came out worse than rounded to nearest are rounded to nearest.
  bool row_guard = true;
  /// Mode "default", where the mean of the inputs is known: leave the mean error of the outputs to the bias. Off here,
  /// since the caller has to add QuantizeResult::bias_shift to it; on in quantize_module and the driver, which do.
  bool correct_bias = false;
  /// Mode "default", where the Hessian of half the inputs is known: choose between 1, 3 and 10 times damping, and
  /// whether to refine, by the loss on that half when the other is fitted.
  bool search_damping = false;
  /// With fewer inputs the weight is rounded to nearest. Read where the number of inputs is known.
  int64_t min_samples = 1;
  /// Whether rtn_loss and the relative errors are reported. They cost two products of the weight and the Hessian, about
  /// what the sweep does; without it they are NaN.
  bool compare = true;
};

/// What the inputs of a layer tell about it. Its n inputs are x̂; behind other quantized layers they are not the inputs
/// x of the float model. All are floating point, finite and on the device of the weight; an undefined tensor is not
/// known.
struct LayerStatistics {
  at::Tensor hessian;       ///< [K, K], symmetric positive semidefinite: H = 2/n Σ x̂ x̂ᵀ
  at::Tensor drift;         ///< [K, K]: D = 2/n Σ (x - x̂) x̂ᵀ
  at::Tensor mean;          ///< [K]: of x̂
  at::Tensor float_mean;    ///< [K]: of x; if undefined, that of x̂
  at::Tensor half_hessian;  ///< [K, K]: H of half of the same inputs
  at::Tensor half_drift;    ///< [K, K]: D of that half
  int64_t nsamples = -1;    ///< n; -1: not known
};

/// What happened while a weight was quantized. Losses are 2/n Σ |error of the output|² = tr(E H Eᵀ), E = W - Q, without
/// damping; with a bias shift, after it; with a drift, W is the weight after it was moved. If mode "rtn" is given no
/// Hessian, they are those of H = I. Those of comparison, rtn_loss and the relative errors, are of the weight in
/// bfloat16 where the processor, or a CUDA device, multiplies that faster: good to three digits.
struct QuantizeReport {
  double loss = 0;                  ///< of the result
  double rtn_loss = 0;              ///< of round-to-nearest with min/max scales and the same options
  double relative_error = 0;        ///< sqrt(loss / tr(W H Wᵀ)): relative error of the layer's output
  double rtn_relative_error = 0;    ///< the same for round-to-nearest
  double sweep_loss = 0;            ///< after the sweep, before refinement and row guard
  bool refined = false;             ///< whether there was refinement
  double damping = 0;               ///< damping in the end
  int64_t damping_escalations = 0;  ///< how often it had to be raised
  bool float64 = false;             ///< whether the factorisation ran in float64
  int64_t dead_columns = 0;         ///< inputs that were zero in every sample
  int64_t guarded_rows = 0;         ///< rows that the row guard rounded to nearest
  bool too_few_samples = false;     ///< whether the weight was rounded to nearest for lack of inputs
};

struct QuantizeResult {
  at::Tensor codes;        ///< u8 [N, K], 0..2^bits-1
  at::Tensor scales;       ///< f16 [n_groups, N], finite and not 0; negative only by scale search
  at::Tensor zeros;        ///< u8 [n_groups, N]
  int64_t group_size = 0;  ///< columns per group, -1: one group per row
  QuantizeReport report;
  at::Tensor bias_shift;   ///< f32 [N] to add to the layer's bias; undefined: none
  at::Tensor input_order;  ///< i32 [K], act_order "dynamic": column k of codes is column input_order[k] of the weight;
                           ///< undefined: as stored

  /// f32 [N, K], columns as in the weight: (code - zero) * scale.
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
/// Modes. "default": scales from the weight as it is. "classic": with act_order "off" or "dynamic", scales of a group
/// are taken when the sweep reaches it, from weights that hold every update so far (dynamic groups); with act_order
/// "static" as in "default". "rtn": no sweep.
///
/// Scale search. Of a fine grid of clipped ranges and least-squares fits, the scale that makes Σ D_k (w_k - q_k)²
/// least, where Hd = R Rᵀ and D_k = R_kk²: what an error in column k costs after all later columns have made up for it.
/// Without a sweep D_k is the diagonal of H.
/// A symmetric scale may be negative, so that the code without an opposite covers the larger extreme.
///
/// Refinement. Each code in turn goes to where tr(E Hd Eᵀ) is least with all others fixed, then the scale of its group
/// to its least squares value; no step increases the loss. For a float32 weight the products that this takes are of
/// bfloat16, but for the 16 leading directions of H: a step may then be off by 2^-8 of its size.
///
/// Damping. Hd = H + damping * mean(diag H) * I is factorised in float32. If the factor does not reproduce Hd closely
/// enough it is redone in float64; if that fails too, the damping is raised threefold (from 0 to 0.01) up to six times.
/// The report says so.
///
/// Dead columns, where the diagonal of H is 0: their diagonal is taken as the mean, which leaves them rounded to
/// nearest, neither receiving nor passing on corrections.
///
/// Drift. With D known the weight is first moved to W + target_alpha W D Hd⁻¹, which for 1 is the ridge regression of
/// the float model's outputs on x̂ (QEP, Arai and Ichikawa, 2025).
///
/// Bias. With the means μ of x and μ̂ of x̂ known, everything is done with the covariance of the inputs, 2/n Σ (x̂ - μ̂)
/// (x̂ - μ̂)ᵀ, in place of H, and the bias is shifted by W μ - Q μ̂, which makes the mean error of the outputs zero.
///
/// Arithmetic is float32, float64 for a float64 weight. On the CPU the codes of a row depend neither on the other rows
/// nor on block size or number of threads.
///
/// A weight on a CUDA device is quantized there, on the current stream, with the codes of the CPU but for targets that
/// rounding takes across a tie. Products are those of ATen: in full float32 unless TF32 is allowed for them. A library
/// without CUDA kernels copies it to the CPU and the result back.
///
/// @param weight floating point [N, K] on the CPU or a CUDA device, finite
/// @param statistics the Hessian may be undefined only in mode "rtn", where it is read for the report alone
/// @throws c10::Error naming the argument, the requirement and the value received. The arguments are never changed.
QuantizeResult quantize_weight(const at::Tensor& weight, const LayerStatistics& statistics,
                               const QuantizeOptions& options = {});

/// The same where nothing but the Hessian is known, an undefined tensor in mode "rtn".
QuantizeResult quantize_weight(const at::Tensor& weight, const at::Tensor& hessian,
                               const QuantizeOptions& options = {});

}  // namespace gptq
