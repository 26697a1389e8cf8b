#include "tools/report.h"

#include <algorithm>
#include <cstdio>

namespace gptq::tools {
namespace {

constexpr double kMegabyte = 1e6;

Json layer_json(const QuantizedLinear& layer) {
  return {{"name", layer.name},
          {"shape", {layer.out_features, layer.in_features}},
          {"bits", layer.bits},
          {"group_size", layer.group_size},
          {"loss", layer.report.loss},
          {"rtn_loss", layer.report.rtn_loss},
          {"relative_error", layer.report.relative_error},
          {"rtn_relative_error", layer.report.rtn_relative_error},
          {"input_error", layer.input_error},
          {"sweep_loss", layer.report.sweep_loss},
          {"refined", layer.report.refined},
          {"guarded_rows", layer.report.guarded_rows},
          {"too_few_samples", layer.report.too_few_samples},
          {"damping", layer.report.damping},
          {"damping_escalations", layer.report.damping_escalations},
          {"dead_columns", layer.report.dead_columns},
          {"samples", layer.nsamples},
          {"dropped", layer.dropped},
          {"seconds", layer.seconds}};
}

}  // namespace

JsonOutput::JsonOutput(const std::string& path) {
  if (!path.empty()) {
    file_.emplace(path);
  }
}

void JsonOutput::write(const Json& value) {
  if (file_) {
    const std::string text = value.dump(2) + "\n";
    file_->write(text.data(), text.size());
    file_->commit();
  }
}

Json to_json(const QuantizeSummary& summary) {
  Json json;
  if (summary.windows) {
    const auto& [baseline, rtn, quantized] =
        std::tie(summary.evaluations[0], summary.evaluations[1], summary.evaluations[2]);
    json["perplexity"] = {
        {"baseline", baseline.perplexity}, {"rtn", rtn.perplexity}, {"quantized", quantized.perplexity}};
    json["kl_divergence"] = {{"rtn", *rtn.mean_kl}, {"quantized", *quantized.mean_kl}};
    json["top1_agreement"] = {{"rtn", *rtn.top1_agreement}, {"quantized", *quantized.top1_agreement}};
    json["tokens_scored"] = baseline.tokens_scored;
    json["window"] = summary.windows->window;
    json["stride"] = summary.windows->effective_stride();
  }
  if (!summary.output_errors.empty()) {
    json["output_error"] = {{"rtn", summary.output_errors[0]}, {"quantized", summary.output_errors[1]}};
  }
  json["seconds"] = {
      {"quantize", summary.seconds_quantize}, {"evaluate", summary.seconds_evaluate}, {"total", summary.seconds_total}};
  json["device"] = summary.device;
  if (summary.device_peak_bytes > 0) {
    json["device_peak_bytes"] = summary.device_peak_bytes;
  }
  json["bytes"] = {{"linears_before", summary.linear_bytes_before}, {"linears_after", summary.linear_bytes_after}};
  json["layers"] = Json::array();
  for (const QuantizedLinear& layer : summary.layers) {
    json["layers"].push_back(layer_json(layer));
  }
  return json;
}

void print_evaluations(const std::vector<std::string>& names, const std::vector<Evaluation>& evaluations,
                       const EvaluationOptions& windows) {
  std::printf("%-18s %12s %14s %16s\n", "model", "perplexity", "KL (nats)", "top-1 agreement");
  for (size_t i = 0; i < evaluations.size(); ++i) {
    const Evaluation& evaluation = evaluations[i];
    std::printf("%-18s %12.4f", names[i].c_str(), evaluation.perplexity);
    if (evaluation.mean_kl) {
      std::printf(" %14.6f %15.2f%%", *evaluation.mean_kl, 100 * *evaluation.top1_agreement);
    }
    std::printf("\n");
  }
  std::printf("%lld tokens scored in windows of %lld, stride %lld\n",
              static_cast<long long>(evaluations.at(0).tokens_scored), static_cast<long long>(windows.window),
              static_cast<long long>(windows.effective_stride()));
}

void print_summary(const QuantizeSummary& summary) {
  if (summary.windows) {
    print_evaluations({"float", "round to nearest", "GPTQ"}, summary.evaluations, *summary.windows);
  }
  if (!summary.output_errors.empty()) {
    std::printf("%-18s %23s\n", "model", "relative output error");
    std::printf("%-18s %23.6f\n%-18s %23.6f\n", "round to nearest", summary.output_errors[0], "GPTQ",
                summary.output_errors[1]);
  }
  const double before = static_cast<double>(summary.linear_bytes_before);
  const double after = static_cast<double>(summary.linear_bytes_after);
  std::printf("%zu linears: %.2f MB before, %.2f MB after (%.2fx smaller)\n", summary.layers.size(), before / kMegabyte,
              after / kMegabyte, after > 0 ? before / after : 0.0);
  const auto rounded = std::count_if(summary.layers.begin(), summary.layers.end(),
                                     [](const QuantizedLinear& layer) { return layer.report.too_few_samples; });
  if (rounded > 0) {
    std::printf("%td of them rounded to nearest: too few calibration inputs came by\n", rounded);
  }
  std::printf("%.1f s: quantizing %.1f s, scoring %.1f s\n", summary.seconds_total, summary.seconds_quantize,
              summary.seconds_evaluate);
}

}  // namespace gptq::tools
