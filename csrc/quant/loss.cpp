#include "quant/loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "quant/product.h"

namespace gptq {

namespace {

constexpr int64_t kRows = 1024;     // rows at a time, which bounds the memory
constexpr int64_t kColumns = 1024;  // columns at a time, enough for a product at full speed

// H is symmetric: only its blocks on and right of the diagonal are multiplied, the latter counted twice.
template <typename Product>
at::Tensor forms_of(const at::Tensor& rows, const at::Tensor& hessian, const Product& multiply) {
  const int64_t k = rows.size(1);
  at::Tensor total = at::zeros({rows.size(0)}, rows.options().dtype(at::kDouble));
  for (int64_t first = 0; first < k; first += kColumns) {
    const int64_t width = std::min(kColumns, k - first), rest = k - first - width;
    const at::Tensor block = hessian.narrow(0, first, k - first).narrow(1, first, width);
    const at::Tensor terms = multiply(rows.narrow(1, first, width), block).mul(rows.narrow(1, first, k - first));
    total.add_(terms.narrow(1, 0, width).sum(1, /*keepdim=*/false, at::kDouble));
    if (rest > 0) {
      total.add_(terms.narrow(1, width, rest).sum(1, /*keepdim=*/false, at::kDouble), 2);
    }
  }
  return total;
}

template <typename Product>
at::Tensor all_forms(const at::Tensor& rows, const at::Tensor& hessian, const Product& multiply) {
  at::Tensor forms = at::empty({rows.size(0)}, rows.options().dtype(at::kDouble));
  for (int64_t first = 0; first < rows.size(0); first += kRows) {
    const int64_t count = std::min(kRows, rows.size(0) - first);
    const at::Tensor part = rows.narrow(0, first, count);
    forms.narrow(0, first, count)
        .copy_(hessian.defined() ? forms_of(part, hessian, multiply)
                                 : part.square().sum(1, /*keepdim=*/false, at::kDouble));
  }
  return forms.clamp_min_(0);  // rounding may take the form of a singular H below 0
}

}  // namespace

at::Tensor row_forms(const at::Tensor& rows, const at::Tensor& hessian) {
  return all_forms(rows, hessian, product);
}

at::Tensor coarse_row_forms(const at::Tensor& rows, const at::Tensor& hessian) {
  return all_forms(rows, hessian.defined() ? coarse(hessian) : hessian,
                   [](const at::Tensor& a, const at::Tensor& b) { return product(coarse(a), b); });
}

double quadratic_form(const at::Tensor& rows, const at::Tensor& hessian) {
  return row_forms(rows, hessian).sum().item<double>();
}

}  // namespace gptq
