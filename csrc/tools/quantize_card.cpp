#include "tools/quantize_card.h"

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <filesystem>
#include <set>
#include <string_view>

#include "model/model_card.h"

namespace gptq::tools {
namespace {

namespace fs = std::filesystem;

/// Longer than any number, and than a layer's line.
constexpr size_t kLineBytes = 512;

__attribute__((format(printf, 1, 2))) std::string formatted(const char* format, ...) {
  std::array<char, kLineBytes> line;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line.data(), line.size(), format, arguments);
  va_end(arguments);
  return line.data();
}

/// The last name of a path, without what means something to Markdown or a terminal.
std::string last_name(const std::string& path) {
  std::error_code error;
  const fs::path whole = fs::canonical(path, error);
  std::string name = (error ? fs::path(path) : whole).filename().string();
  for (char& c : name) {
    if (static_cast<unsigned char>(c) < ' ' || c == '\x7f' ||
        std::string_view("`|<>").find(c) != std::string_view::npos) {
      c = '_';
    }
  }
  return name.empty() ? "model" : name;
}

std::string bits_of(const QuantizeSummary& summary) {
  std::set<int64_t> bits;
  for (const QuantizedLinear& layer : summary.layers) {
    bits.insert(layer.bits);
  }
  std::string result;
  for (const int64_t width : bits) {
    result += (result.empty() ? "" : ", ") + std::to_string(width);
  }
  return result;
}

std::string front_matter(const CardSettings& settings) {
  std::string result = "---\n" + inherited_metadata(read_card(settings.source));
  if (!settings.base_model.empty()) {
    result += "base_model: " + settings.base_model + "\nbase_model_relation: quantized\n";
  }
  return result + "library_name: libgptq\ntags:\n- quantized\n- gptq\n- libgptq\n---\n";
}

std::string introduction(const QuantizeSummary& summary, const CardSettings& settings) {
  const std::string name = settings.base_model.empty() ? last_name(settings.source) : settings.base_model;
  const std::string title = "# " + name + ", quantized to " + bits_of(summary) + " bits\n\n";
  const std::string link = settings.base_model.empty()
                               ? "`" + name + "`"
                               : "[" + name + "](https://huggingface.co/" + settings.base_model + ")";
  return title + "The linear layers of " + link + ", quantized by libgptq " GPTQ_VERSION ".\n\n" +
         formatted("Weights of those layers: %.2f MB, %.2f MB before.\n\n",
                   static_cast<double>(summary.linear_bytes_after) / 1e6,
                   static_cast<double>(summary.linear_bytes_before) / 1e6);
}

std::string scores(const QuantizeSummary& summary, const CardSettings& settings) {
  if (!summary.windows) {
    return {};
  }
  std::string result =
      "## Quality\n\n| model | perplexity | KL divergence (nats) | same first token |\n"
      "| --- | ---: | ---: | ---: |\n";
  constexpr std::array kModels = {"float", "rounded to nearest", "this one"};
  for (size_t i = 0; i < kModels.size(); ++i) {
    const Evaluation& evaluation = summary.evaluations.at(i);
    result += formatted("| %s | %.4f |", kModels[i], evaluation.perplexity);
    result += evaluation.mean_kl
                  ? formatted(" %.6f | %.2f %% |\n", *evaluation.mean_kl, 100 * *evaluation.top1_agreement)
                  : " | |\n";
  }
  return result + "\nOn `" + last_name(settings.eval) +
         formatted("`: %lld tokens scored in windows of %lld, stride %lld.\n\n",
                   static_cast<long long>(summary.evaluations[0].tokens_scored),
                   static_cast<long long>(summary.windows->window),
                   static_cast<long long>(summary.windows->effective_stride()));
}

std::string group_size_text(int64_t group_size) {
  return group_size == -1 ? "whole rows" : std::to_string(group_size);
}

std::string how_it_was_made(const CardSettings& settings) {
  const QuantizeOptions& used = settings.options;
  const auto row = [](const char* name, const std::string& value) {
    return std::string("| ") + name + " | " + value + " |\n";
  };
  std::string result = "## How it was made\n\n| setting | |\n| --- | --- |\n";
  result += row("bits", std::to_string(used.bits));
  result += row("group size", used.per_tensor ? "whole weights" : group_size_text(used.group_size));
  result += row("zero points", used.symmetric ? "the middle code" : "one a group");
  result += row("mode", used.mode);
  if (!settings.calibration.empty()) {
    result += row("calibration", formatted("%lld windows of %lld tokens of ", static_cast<long long>(settings.samples),
                                           static_cast<long long>(settings.sequence_length)) +
                                     "`" + last_name(settings.calibration) + "`, drawn with seed " +
                                     std::to_string(settings.seed));
    result += row("act-order", used.act_order);
    result += row("damping", formatted("%g", used.damping) + (used.search_damping ? ", searched" : ""));
    result += row("scale search", used.scale_search);
    result += row("refinement sweeps", std::to_string(used.refine_sweeps));
    result += row("target alpha", formatted("%g", used.target_alpha));
    result += row("row guard", used.row_guard ? "on" : "off");
    result += row("bias correction", used.correct_bias ? "on" : "off");
  }
  return result + "\n";
}

/// The loss as a share of that of rounding to nearest, or a dash where there is none.
std::string relative_loss(const QuantizeReport& report) {
  return report.rtn_loss > 0 ? formatted("%.3f", report.loss / report.rtn_loss) : "–";
}

std::string layers(const QuantizeSummary& summary, const CardSettings& settings) {
  std::string result = "## Layers\n\nThe loss is ";
  result += settings.calibration.empty() ? "the squared error of a layer's weight"
                                         : "twice the mean squared error of a layer's outputs on the calibration text";
  result +=
      "; beside it, the same as a share of that of rounding to nearest.\n\n"
      "| layer | shape | bits | group size | loss | to nearest |\n"
      "| --- | ---: | ---: | ---: | ---: | ---: |\n";
  for (const QuantizedLinear& layer : summary.layers) {
    result += "| " + layer.name +
              formatted(" | %lld × %lld | %lld | ", static_cast<long long>(layer.out_features),
                        static_cast<long long>(layer.in_features), static_cast<long long>(layer.bits)) +
              group_size_text(layer.group_size) + formatted(" | %.4g | ", layer.report.loss) +
              relative_loss(layer.report) + " |\n";
  }
  return result;
}

}  // namespace

std::string model_card(const QuantizeSummary& summary, const CardSettings& settings) {
  return front_matter(settings) + introduction(summary, settings) + loading_section(settings.format) + "\n" +
         scores(summary, settings) + how_it_was_made(settings) + layers(summary, settings);
}

}  // namespace gptq::tools
