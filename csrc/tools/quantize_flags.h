#pragma once

#include <gptq/quantize_module.h>

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace gptq::tools {

/// The flags that say how layers are quantized.
struct QuantizeFlags {
  QuantizeModuleOptions options;

  void add_to(CLI::App& command);
  /// Makes --lm-head keep the default, for a checkpoint that cannot hold a quantized head. Throws if it was given
  /// otherwise. Before resolve.
  /// @param format of the checkpoint, for the error
  void keep_head(const std::string& format);
  /// Fills in what the flags say of a model with these linears. Throws if one of them makes no sense.
  void resolve(const std::vector<LinearInfo>& linears);

 private:
  std::vector<std::string> skip_;
  std::vector<std::string> overrides_;
  std::string lm_head_ = "w8";
  bool asymmetric_ = false;
  bool no_row_guard_ = false;
  bool no_bias_correction_ = false;
  CLI::Option* lm_head_option_ = nullptr;

  void add_grid_flags(CLI::App& command);
  void add_solver_flags(CLI::App& command);
};

}  // namespace gptq::tools
