#include "quant/loss.h"

#include <algorithm>

namespace gptq {

namespace {

constexpr int64_t kRows = 1024;    // rows at a time, which bounds the memory
constexpr int64_t kColumns = 256;  // columns at a time, enough for a product at full speed

double sum_of(const at::Tensor& values) {
  return values.sum(at::kDouble).item<double>();
}

// H is symmetric: only its blocks on and right of the diagonal are multiplied, the latter counted twice.
double form_of(const at::Tensor& rows, const at::Tensor& hessian) {
  const int64_t k = rows.size(1);
  double total = 0;
  for (int64_t first = 0; first < k; first += kColumns) {
    const int64_t width = std::min(kColumns, k - first), rest = k - first - width;
    const at::Tensor right = rows.narrow(1, first, k - first);
    const at::Tensor block = hessian.narrow(0, first, width).narrow(1, first, k - first);
    const at::Tensor terms = rows.narrow(1, first, width).mm(block).mul_(right);
    total += sum_of(terms.narrow(1, 0, width)) + (rest > 0 ? 2 * sum_of(terms.narrow(1, width, rest)) : 0);
  }
  return total;
}

}  // namespace

double quadratic_form(const at::Tensor& rows, const at::Tensor& hessian) {
  double total = 0;
  for (int64_t first = 0; first < rows.size(0); first += kRows) {
    const at::Tensor part = rows.narrow(0, first, std::min(kRows, rows.size(0) - first));
    total += hessian.defined() ? form_of(part, hessian) : sum_of(part.square());
  }
  return std::max(total, 0.0);  // rounding may take the form of a singular H below 0
}

}  // namespace gptq
