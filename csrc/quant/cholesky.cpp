#include "quant/cholesky.h"

#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>

#include <algorithm>

#include "quant/product.h"

namespace gptq {

at::Tensor cholesky(const at::Tensor& matrix) {
  constexpr int64_t block = 384;
  const int64_t k = matrix.size(0);
  at::Tensor lower = matrix.clone();
  for (int64_t first = 0; first < k; first += block) {
    const int64_t width = std::min(block, k - first), below = k - first - width;
    at::Tensor columns = lower.narrow(0, first, k - first).narrow(1, first, width);
    if (first > 0) {
      const at::Tensor done = lower.narrow(0, first, k - first).narrow(1, 0, first);
      columns.sub_(product(done, done.narrow(0, 0, width)));
    }
    at::Tensor corner = columns.narrow(0, 0, width);
    const auto [factor, info] = at::linalg_cholesky_ex(corner);
    if (info.item<int>() != 0) {
      return {};
    }
    corner.copy_(factor);
    if (below > 0) {
      at::Tensor panel = columns.narrow(0, width, below);
      panel.copy_(at::linalg_solve_triangular(factor.t(), panel, /*upper=*/true, /*left=*/false));
    }
  }
  return lower.tril_();
}

}  // namespace gptq
