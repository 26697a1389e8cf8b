#include "quant/loss.h"

#include <algorithm>

namespace gptq {

double quadratic_form(const at::Tensor& rows, const at::Tensor& hessian) {
  constexpr int64_t batch = 1024;  // bounds the memory
  double total = 0;
  for (int64_t first = 0; first < rows.size(0); first += batch) {
    const at::Tensor part = rows.narrow(0, first, std::min(batch, rows.size(0) - first));
    const at::Tensor product = hessian.defined() ? part.mm(hessian) : part.clone();
    total += product.mul_(part).sum(at::kDouble).item<double>();
  }
  return std::max(total, 0.0);  // rounding may take the form of a singular H below 0
}

}  // namespace gptq
