#include "quant/factor.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace gptq {
namespace {

constexpr int64_t kMaxEscalations = 6;
constexpr double kEscalationFactor = 3;
constexpr double kFirstDamping = 0.01;  // where an escalation starts from no damping
constexpr int64_t kProbes = 4;
// Rounding may change the least determined pivot by about this share.
constexpr double kProbeTolerance = 0.01;

// f64 [K]: the diagonal of Hd, as stored. Dead columns, and all of them if there is no live one, get the mean.
at::Tensor damped_diagonal(const at::Tensor& hessian, double damping) {
  const at::Tensor diagonal = hessian.diagonal().to(at::kDouble);
  const double sum = diagonal.sum().item<double>();
  const double mean = sum > 0 ? sum / static_cast<double>(diagonal.numel()) : 1.0;
  return at::where(diagonal.eq(0), mean, diagonal).add_(damping * mean);
}

// Signs that look random and are the same on every call: the caller's random numbers are not touched.
at::Tensor probe_vectors(int64_t k, at::ScalarType dtype) {
  at::Tensor probes = at::empty({k, kProbes}, at::kDouble);
  auto* values = probes.data_ptr<double>();
  uint64_t state = 0x9E3779B97F4A7C15u;
  for (int64_t i = 0; i < k * kProbes; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    values[i] = (state >> 63) != 0 ? 1.0 : -1.0;
  }
  return probes.to(dtype);
}

// Whether L Lᵀ is as close to A as its pivots need. For random signs v the size of an entry of (A - L Lᵀ) v is that of
// a row of A - L Lᵀ. A NaN counts as no.
bool reproduces(const at::Tensor& lower, const at::Tensor& matrix) {
  const at::Tensor probes = probe_vectors(matrix.size(0), matrix.scalar_type());
  const at::Tensor residual = matrix.mm(probes).sub_(lower.mm(lower.t().mm(probes)));
  const double size = residual.to(at::kDouble).square_().mean().sqrt().item<double>();
  const double least_pivot = lower.diagonal().to(at::kDouble).square().min().item<double>();
  return size <= kProbeTolerance * least_pivot;
}

// The Cholesky factor of the matrix with unit diagonal D Hd D, D = diag(Hd)^-1/2, in reversed sweep order; undefined
// if there is none good enough.
at::Tensor reversed_cholesky(const at::Tensor& hessian, const at::Tensor& reversed, const at::Tensor& diagonal,
                             at::ScalarType dtype) {
  const at::Tensor scale = diagonal.index_select(0, reversed).rsqrt_().to(dtype);
  at::Tensor matrix = hessian.index_select(0, reversed).index_select(1, reversed).to(dtype);
  matrix.mul_(scale.unsqueeze(1)).mul_(scale);
  matrix.diagonal().fill_(1);
  auto [lower, info] = at::linalg_cholesky_ex(matrix);
  if (info.item<int>() != 0 || !reproduces(lower, matrix)) {
    return {};
  }
  return lower;
}

void fill_factor(const at::Tensor& lower, const at::Tensor& diagonal, at::ScalarType dtype, Factor& factor) {
  const at::Tensor root = diagonal.index_select(0, factor.order).sqrt_();
  const at::Tensor corner = lower.diagonal().flip(0).to(at::kDouble) * root;  // R_kk
  at::Tensor multipliers = lower.t().flip({0, 1});                            // row k: column k of R, not yet scaled
  multipliers.mul_(root.to(lower.scalar_type())).div_(corner.to(lower.scalar_type()).unsqueeze(1));
  factor.multipliers = multipliers.to(dtype).contiguous();
  factor.pivots = corner.square();
}

}  // namespace

Factor factorise(const at::Tensor& hessian, const at::Tensor& order, double damping) {
  Factor factor;
  factor.order = order;
  factor.damping = damping;
  factor.float64 = hessian.scalar_type() == at::kDouble;
  const at::Tensor reversed = order.flip(0);
  while (true) {
    const at::Tensor diagonal = damped_diagonal(hessian, factor.damping);
    at::Tensor lower;
    if (!factor.float64) {
      lower = reversed_cholesky(hessian, reversed, diagonal, at::kFloat);
    }
    if (!lower.defined()) {
      factor.float64 = true;
      lower = reversed_cholesky(hessian, reversed, diagonal, at::kDouble);
    }
    if (lower.defined()) {
      fill_factor(lower, diagonal, hessian.scalar_type(), factor);
      factor.added = diagonal.sub(hessian.diagonal()).index_select(0, order);
      return factor;
    }
    TORCH_CHECK(factor.damping_escalations < kMaxEscalations,
                "quantize_weight: hessian must be positive semidefinite: it has no usable Cholesky factor even with "
                "damping ",
                factor.damping, " (asked for: ", damping, ")");
    factor.damping = factor.damping == 0 ? kFirstDamping : factor.damping * kEscalationFactor;
    ++factor.damping_escalations;
  }
}

at::Tensor times_inverse(const at::Tensor& rows, const Factor& factor) {
  // In sweep order Hd = Mᵀ diag(pivots) M, where M, the multipliers, has ones on its diagonal and zeros above it.
  const at::Tensor& m = factor.multipliers;
  at::Tensor half = at::linalg_solve_triangular(m, rows.index_select(1, factor.order), /*upper=*/false, /*left=*/false,
                                                /*unitriangular=*/true);
  half.div_(factor.pivots.to(rows.scalar_type()));
  const at::Tensor swept = at::linalg_solve_triangular(m.t(), half, /*upper=*/true, /*left=*/false,
                                                       /*unitriangular=*/true);
  return at::empty_like(rows).index_copy_(1, factor.order, swept);
}

}  // namespace gptq
