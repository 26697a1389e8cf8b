#include "quant/report_dict.h"

namespace gptq {

c10::Dict<std::string, double> report_dict(const QuantizeReport& report) {
  c10::Dict<std::string, double> dict;
  dict.insert("loss", report.loss);
  dict.insert("rtn_loss", report.rtn_loss);
  dict.insert("relative_error", report.relative_error);
  dict.insert("rtn_relative_error", report.rtn_relative_error);
  dict.insert("damping", report.damping);
  dict.insert("damping_escalations", static_cast<double>(report.damping_escalations));
  dict.insert("float64", report.float64 ? 1.0 : 0.0);
  dict.insert("dead_columns", static_cast<double>(report.dead_columns));
  return dict;
}

}  // namespace gptq
