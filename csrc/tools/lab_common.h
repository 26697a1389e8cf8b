#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <gptq/quantize_weight.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "tools/report.h"

namespace gptq::tools {

/// One run of a study: its flags, its seed, and the folder of what it found.
///
/// results.json depends on the settings alone; what depends on the machine and the moment is in manifest.json.
class Study {
 public:
  explicit Study(std::string name) : name_(std::move(name)) {}

  /// Adds -o, --seed and --threads.
  void add_to(CLI::App& sub);

  /// Adds a flag whose value is on record with the results; the value must outlive the study.
  template <typename T>
  CLI::Option* setting(CLI::App& sub, const std::string& name, T& value, const std::string& help) {
    settings_.emplace_back(name, [&value] { return Json(value); });
    return sub.add_option("--" + name, value, help)->capture_default_str();
  }

  /// Checks the output folder before long work is begun, sets the number of threads and starts the clock.
  void begin();
  /// A generator of its own for each purpose: draws for one leave the others as they are.
  at::Generator generator(uint64_t purpose = 0) const;
  /// Writes results.json, manifest.json and, if there are tensors, layers.safetensors: all of them or nothing.
  void finish(Json results, const std::vector<std::pair<std::string, at::Tensor>>& layers = {}) const;

 private:
  Json settings() const;
  Json manifest() const;

  std::string name_;
  std::string output_;
  int64_t seed_ = 42;
  int64_t threads_ = 0;
  std::vector<std::pair<std::string, std::function<Json()>>> settings_;
  std::chrono::system_clock::time_point started_;
};

/// Lets -1 and positive numbers pass.
CLI::Validator group_size_check();

/// How the studies that go through quantize_weight do so.
struct QuantizerFlags {
  std::string mode = "default";
  std::string act_order = "auto";
  std::string grid = "symmetric";
  double damping = 0.01;

  /// Adds --mode, --act-order, --grid and --damping.
  void add_to(CLI::App& sub, Study& study);
  QuantizeOptions options(int64_t bits, int64_t group_size) const;
};

/// A random weight.
struct WeightFlags {
  int64_t rows;
  int64_t columns;
  double std = 0.02;

  /// Adds --rows, --columns and --std.
  void add_to(CLI::App& sub, Study& study);
  at::Tensor draw(at::Generator generator) const;  ///< f32 [N, K], normal
};

/// Normal inputs of unit variance, independent or correlated: x = sqrt(1 - shared) e + sqrt(shared) Fᵀ z with r factors
/// z, the i-th of them with a variance proportional to 1 / i. Like activations, most of their variance lies in few
/// directions and none lacks it.
class Inputs {
 public:
  static Inputs independent(int64_t columns);
  static Inputs correlated(int64_t columns, int64_t factors, double shared, at::Generator generator);

  /// Scales the channels, [K].
  void scale_channels(const at::Tensor& by);
  at::Tensor draw(int64_t samples, at::Generator generator) const;  ///< f32 [samples, K]
  at::Tensor covariance() const;                                    ///< f32 [K, K]
  /// 1/n Σ x xᵀ over n new draws, f32 [K, K].
  at::Tensor hessian(int64_t samples, at::Generator generator) const;

 private:
  at::Tensor scale_;    // f32 [K]
  at::Tensor factors_;  // f32 [r, K], undefined: none
  double noise_ = 1;    // standard deviation of e
};

/// How inputs are correlated.
struct InputFlags {
  int64_t factors = 0;
  double shared = 0.9;

  /// Adds --factors and --shared.
  void add_to(CLI::App& sub, Study& study);
  Inputs correlated(int64_t columns, at::Generator generator) const;
};

/// How far quantized values are from a weight. Losses are tr(E H Eᵀ), the mean square error of the layer's outputs
/// summed over outputs.
struct Distance {
  double mse = 0;
  double loss = 0;            ///< on the calibration's H
  double heldout_loss = 0;    ///< on the H of other inputs
  double relative_error = 0;  ///< sqrt(heldout_loss / tr(W H Wᵀ)), H of the other inputs

  Json json() const;
};

/// Measures what a weight is quantized to.
class Yardstick {
 public:
  /// @param heldout the H of other inputs, undefined: I
  Yardstick(at::Tensor weight, at::Tensor heldout);

  /// With GPTQ.
  Distance quantized(const at::Tensor& hessian, const QuantizeOptions& options) const;
  /// Rounded to nearest. @param hessian may be undefined: I
  Distance rounded(const at::Tensor& hessian, QuantizeOptions options) const {
    options.mode = "rtn";
    return quantized(hessian, options);
  }

 private:
  at::Tensor weight_;
  at::Tensor heldout_;
  double norm_;  // tr(W H Wᵀ), H of the other inputs
};

/// Bits per weight with a float16 scale and, on an asymmetric grid, a zero point of `bits` bits for every group. A
/// weight with one scale for all of it (per_tensor) counts one.
double effective_bits(int64_t rows, int64_t columns, const QuantizeOptions& options);

// Each adds one study to `gptq lab`.
void add_toy_study(CLI::App& lab);
void add_group_size_study(CLI::App& lab);
void add_calibration_study(CLI::App& lab);
void add_bits_study(CLI::App& lab);

}  // namespace gptq::tools
