#include "quant/result_tuple.h"

namespace gptq {
namespace {

c10::Dict<std::string, double> report_dict(const QuantizeReport& report) {
  c10::Dict<std::string, double> dict;
  dict.insert("loss", report.loss);
  dict.insert("rtn_loss", report.rtn_loss);
  dict.insert("relative_error", report.relative_error);
  dict.insert("rtn_relative_error", report.rtn_relative_error);
  dict.insert("sweep_loss", report.sweep_loss);
  dict.insert("refined", report.refined ? 1.0 : 0.0);
  dict.insert("damping", report.damping);
  dict.insert("damping_escalations", static_cast<double>(report.damping_escalations));
  dict.insert("float64", report.float64 ? 1.0 : 0.0);
  dict.insert("dead_columns", static_cast<double>(report.dead_columns));
  dict.insert("guarded_rows", static_cast<double>(report.guarded_rows));
  dict.insert("too_few_samples", report.too_few_samples ? 1.0 : 0.0);
  return dict;
}

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

}  // namespace

ResultTuple result_tuple(const QuantizeResult& result) {
  return {result.codes,
          result.scales,
          result.zeros,
          report_dict(result.report),
          optional(result.bias_shift),
          optional(result.input_order)};
}

}  // namespace gptq
