#include "tools/quantize_flags.h"

#include <algorithm>
#include <charconv>
#include <regex>
#include <set>
#include <sstream>

namespace gptq::tools {
namespace {

std::regex regex_of(const std::string& pattern, const char* flag) {
  try {
    return std::regex(pattern);
  } catch (const std::regex_error& error) {
    TORCH_CHECK(false, flag, ": must be a regular expression, got ", pattern, " (", error.what(), ")");
  }
}

/// REGEX:bits=8,group_size=64 or REGEX:skip
struct Override {
  std::regex pattern;
  std::optional<int64_t> bits;
  std::optional<int64_t> group_size;
  bool skip = false;

  static Override parse(const std::string& text) {
    const size_t colon = text.rfind(':');
    TORCH_CHECK(colon != std::string::npos, "--override: must be REGEX:bits=B,group_size=G or REGEX:skip, got ", text);
    Override result{regex_of(text.substr(0, colon), "--override"), {}, {}};
    std::istringstream settings(text.substr(colon + 1));
    for (std::string setting; std::getline(settings, setting, ',');) {
      const size_t equal = setting.find('=');
      const std::string key = setting.substr(0, equal);
      int64_t value = 0;
      const char* end = setting.data() + setting.size();
      const bool has_number =
          equal != std::string::npos && std::from_chars(setting.data() + equal + 1, end, value).ptr == end;
      TORCH_CHECK(setting == "skip" || (has_number && (key == "bits" || key == "group_size")),
                  "--override: a setting must be bits=B, group_size=G or skip, got ", setting, " in ", text);
      if (setting == "skip") {
        result.skip = true;
      } else {
        (key == "bits" ? result.bits : result.group_size) = value;
      }
    }
    return result;
  }
};

}  // namespace

void QuantizeFlags::resolve(const std::vector<LinearInfo>& linears) {
  options.quantize.symmetric = !asymmetric_;
  options.quantize.row_guard = !no_row_guard_;
  options.quantize.correct_bias = !no_bias_correction_;
  std::vector<Override> overrides;
  overrides.reserve(overrides_.size());
  for (const std::string& text : overrides_) {
    overrides.push_back(Override::parse(text));
  }
  std::set<std::string> heads;
  for (const LinearInfo& linear : linears) {
    if (linear.embedding || linear.name == "lm_head" || linear.name.ends_with(".lm_head")) {
      heads.insert(linear.name);
    }
  }
  std::vector<std::regex> skipped;
  skipped.reserve(skip_.size());
  for (const std::string& pattern : skip_) {
    skipped.push_back(regex_of(pattern, "--skip"));
  }
  const bool keeps_heads = lm_head_ == "keep", wide_heads = lm_head_ == "w8";
  const auto matches = [](const std::string& name) {
    return [&name](const std::regex& pattern) { return std::regex_search(name, pattern); };
  };
  options.skip = [=](const std::string& name) {
    const auto overridden = [&](const Override& override) { return override.skip && matches(name)(override.pattern); };
    return (keeps_heads && heads.count(name) > 0) || std::any_of(skipped.begin(), skipped.end(), matches(name)) ||
           std::any_of(overrides.begin(), overrides.end(), overridden);
  };
  options.quantize_layer = [=, common = options.quantize](const std::string& name) {
    QuantizeOptions result = common;
    if (wide_heads && heads.count(name) > 0) {
      result.bits = 8;
      result.group_size = -1;
    }
    for (const Override& override : overrides) {
      if (matches(name)(override.pattern)) {
        result.bits = override.bits.value_or(result.bits);
        result.group_size = override.group_size.value_or(result.group_size);
      }
    }
    return result;
  };
}

void QuantizeFlags::add_to(CLI::App& command) {
  add_grid_flags(command);
  add_solver_flags(command);
  command.add_option("--skip", skip_, "Regular expressions of layers that keep their weights");
  command
      .add_option(
          "--lm-head", lm_head_,
          "What becomes of lm_head, or a linear whose weight is also an embedding: keep (its weight), w8 (8 bits, "
          "one group per row) or w4 (as all others)")
      ->capture_default_str()
      ->check(CLI::IsMember({"keep", "w8", "w4"}));
  command.add_option("--override", overrides_,
                     "REGEX:bits=B,group_size=G or REGEX:skip for the layers that match; the last one that says so "
                     "counts");
  command.add_flag("--drop-nonfinite", options.drop_nonfinite,
                   "Leave out calibration vectors with NaN or Inf instead of stopping at them");
  lm_head_option_ = command.get_option("--lm-head");
}

void QuantizeFlags::keep_head(const std::string& format) {
  TORCH_CHECK(lm_head_option_->empty() || lm_head_ == "keep", "--lm-head: must be keep with --format ", format,
              ", got ", lm_head_);
  lm_head_ = "keep";
}

void QuantizeFlags::add_grid_flags(CLI::App& command) {
  QuantizeOptions& quantize = options.quantize;
  command.add_option("--bits", quantize.bits, "Bits per weight; stored in 4, or 8 if more")
      ->capture_default_str()
      ->check(CLI::Range(2, 8));
  command.add_option("--group-size", quantize.group_size, "Inputs that share a scale; -1: one group per row")
      ->capture_default_str();
  command.add_flag("--asymmetric", asymmetric_, "A zero point per group instead of the middle code");
  command.add_flag("--per-tensor", quantize.per_tensor, "One scale for each whole weight");
  command
      .add_option("--scale-search", quantize.scale_search,
                  "minmax, weighted (by what an error in each column costs) or auto: weighted in mode default")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "minmax", "weighted"}));
}

void QuantizeFlags::add_solver_flags(CLI::App& command) {
  QuantizeOptions& quantize = options.quantize;
  command.add_option("--mode", quantize.mode, "default, classic (the published algorithm) or rtn (round to nearest)")
      ->capture_default_str()
      ->check(CLI::IsMember({"default", "classic", "rtn"}));
  command
      .add_option("--act-order", quantize.act_order,
                  "Order of columns: auto, static (by the Hessian), dynamic (and groups in that order) or off")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "static", "dynamic", "off"}));
  command.add_option("--damping", quantize.damping, "Share of the Hessian diagonal's mean that is added to it")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command.add_flag("--search-damping", quantize.search_damping,
                   "Choose between 1, 3 and 10 times --damping on half of the calibration inputs, layer by layer");
  command
      .add_option("--target-alpha", quantize.target_alpha,
                  "How far weights are moved towards the float model's outputs, 0 to 1")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0));
  command.add_option("--refine-sweeps", quantize.refine_sweeps, "Passes of coordinate descent after the sweep")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command.add_flag("--no-row-guard", no_row_guard_, "Keep rows that came out worse than rounded to nearest");
  command.add_flag("--no-bias-correction", no_bias_correction_, "Leave biases as they are");
  command.add_option("--min-samples", quantize.min_samples, "Round to nearest where a layer saw fewer vectors")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
}

}  // namespace gptq::tools
