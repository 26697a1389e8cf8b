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
  /// Fills in what the flags say. Throws if one of them makes no sense.
  /// @param keep_head whether the checkpoint to be written cannot hold a quantized lm_head
  void resolve(bool keep_head);

 private:
  std::vector<std::string> skip_;
  std::vector<std::string> overrides_;
  std::string lm_head_ = "w8";
  CLI::Option* lm_head_option_ = nullptr;
  bool asymmetric_ = false;
  bool no_row_guard_ = false;
  bool no_bias_correction_ = false;

  void add_grid_flags(CLI::App& command);
  void add_solver_flags(CLI::App& command);
};

}  // namespace gptq::tools
