#include "tools/published_gptq.h"

#include <ATen/ATen.h>

#include <cmath>

namespace gptq::tools {
namespace {

constexpr int64_t kBlock = 128;

// Scale of each row for a symmetric grid, from the columns of a group.
at::Tensor row_scales(const at::Tensor& columns, int64_t bits) {
  const at::Tensor largest = columns.abs().amax(1, /*keepdim=*/true);
  return largest.mul(2.0 / (std::pow(2.0, static_cast<double>(bits)) - 1)).clamp_min(1e-8);
}

at::Tensor rounded(const at::Tensor& column, const at::Tensor& scale, int64_t bits) {
  const double half = std::pow(2.0, static_cast<double>(bits - 1));
  return column.div(scale).round_().clamp_(-half, half - 1).mul_(scale);
}

at::Tensor inverse_factor(const at::Tensor& hessian, double damping) {
  at::Tensor damped = hessian.clone();
  damped.diagonal().add_(damping * hessian.diagonal().mean().item<double>());
  return at::linalg_cholesky(at::cholesky_inverse(at::linalg_cholesky(damped)), /*upper=*/true);
}

}  // namespace

at::Tensor published_gptq(const at::Tensor& weight, const at::Tensor& hessian, int64_t bits, int64_t group_size,
                          double damping) {
  const int64_t k = weight.size(1);
  const at::Tensor factor = inverse_factor(hessian, damping);
  at::Tensor w = weight.clone(), quantized = at::zeros_like(weight), scale;
  for (int64_t first = 0; first < k; first += kBlock) {
    const int64_t last = std::min(first + kBlock, k);
    at::Tensor block = w.slice(1, first, last).clone();
    const at::Tensor corner = factor.slice(0, first, last).slice(1, first, last);
    at::Tensor errors = at::zeros_like(block);
    for (int64_t i = 0; i < last - first; ++i) {
      if ((first + i) % group_size == 0) {
        scale = row_scales(w.slice(1, first + i, std::min(first + i + group_size, k)), bits);
      }
      const at::Tensor column = block.select(1, i).unsqueeze(1);
      const at::Tensor value = rounded(column, scale, bits);
      quantized.select(1, first + i).copy_(value.squeeze(1));
      const at::Tensor error = column.sub(value).div_(corner[i][i]);
      block.slice(1, i).sub_(error.matmul(corner[i].slice(0, i).unsqueeze(0)));
      errors.select(1, i).copy_(error.squeeze(1));
    }
    w.slice(1, last).sub_(errors.matmul(factor.slice(0, first, last).slice(1, last)));
  }
  return quantized;
}

int64_t published_add_batch(at::Tensor& hessian, const at::Tensor& batch, int64_t n) {
  const int64_t total = n + batch.size(0);
  hessian.mul_(static_cast<double>(n) / static_cast<double>(total));
  const at::Tensor columns = batch.t().mul(std::sqrt(2.0 / static_cast<double>(total)));
  hessian.add_(columns.matmul(columns.t()));
  return total;
}

}  // namespace gptq::tools
