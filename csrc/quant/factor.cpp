#include "quant/factor.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "quant/cholesky.h"
#include "quant/device_kernels.h"
#include "quant/read_scalars.h"

namespace gptq {
namespace {

constexpr int64_t kMaxEscalations = 6;
constexpr double kEscalationFactor = 3;
constexpr double kFirstDamping = 0.01;    // where an escalation starts from no damping
constexpr int64_t kProbedEntries = 1024;  // of the residual: enough for a good estimate of their size
// Rounding may change the least determined pivot by about this share.
constexpr double kProbeTolerance = 0.01;

// f64 [K]: the diagonal of Hd, as stored. Dead columns, and all of them if there is no live one, get the mean.
at::Tensor damped_diagonal(const at::Tensor& hessian, double damping) {
  const at::Tensor diagonal = hessian.diagonal().to(at::kDouble), sum = diagonal.sum();
  const at::Tensor mean = at::where(sum.gt(0), sum.div(static_cast<double>(diagonal.numel())), 1.0);
  return at::where(diagonal.eq(0), mean, diagonal).add_(mean.mul(damping));
}

// Signs that look random and are the same on every call, [n, K]: the caller's random numbers are not touched.
at::Tensor probe_vectors(int64_t k, const at::TensorOptions& options) {
  at::Tensor probes = at::empty({(kProbedEntries + k - 1) / k, k}, at::kDouble);
  auto* values = probes.data_ptr<double>();
  uint64_t state = 0x9E3779B97F4A7C15u;
  for (int64_t i = 0; i < probes.numel(); ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    values[i] = (state >> 63) != 0 ? 1.0 : -1.0;
  }
  return probes.to(options);
}

// Whether L Lᵀ is as close to A as its pivots need. For random signs v the size of an entry of (A - L Lᵀ) v is that of
// a row of A - L Lᵀ. A NaN counts as no, and so does an info that is not 0.
bool reproduces(const at::Tensor& lower, const at::Tensor& matrix, const at::Tensor& info) {
  const at::Tensor probes = probe_vectors(matrix.size(0), matrix.options());
  const at::Tensor residual = probes.mm(matrix).sub_(probes.mm(lower).mm(lower.t()));
  const auto [size, least_pivot, failed] = read_scalars(residual.to(at::kDouble).square_().mean().sqrt(),
                                                        lower.diagonal().to(at::kDouble).square().min(), info);
  return failed == 0 && size <= kProbeTolerance * least_pivot;
}

// D Hd D in the given order with its diagonal set to 1, in one pass.
template <typename From, typename To>
void gather_scaled(const at::Tensor& hessian, const at::Tensor& order, const at::Tensor& scale, at::Tensor& out) {
  const int64_t k = hessian.size(0);
  const auto* from = hessian.const_data_ptr<From>();
  const auto* index = order.const_data_ptr<int64_t>();
  const auto* share = scale.const_data_ptr<To>();
  auto* to = out.data_ptr<To>();
  at::parallel_for(0, k, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const From* row = from + index[i] * k;
      for (int64_t j = 0; j < k; ++j) {
        to[i * k + j] = static_cast<To>(row[index[j]]) * share[i] * share[j];
      }
      to[i * k + i] = 1;
    }
  });
}

// The Cholesky factor of the matrix with unit diagonal D Hd D, D = diag(Hd)^-1/2, in reversed sweep order; undefined
// if there is none good enough. Also the matrix, whose memory is free to use now: fresh pages are dear.
std::pair<at::Tensor, at::Tensor> reversed_cholesky(const at::Tensor& hessian, const at::Tensor& order,
                                                    const at::Tensor& diagonal, at::ScalarType dtype) {
  const at::Tensor reversed = order.flip(0);
  const at::Tensor scale = diagonal.index_select(0, reversed).rsqrt_().to(dtype);
  if (solved_on_device(hessian)) {
    const at::Tensor ordered = hessian.index_select(0, reversed).index_select(1, reversed);
    const at::Tensor scaled = ordered.to(dtype).mul_(scale.unsqueeze(1)).mul_(scale);
    scaled.diagonal().fill_(1);
    const auto [lower, info] = at::linalg_cholesky_ex(scaled);
    return {reproduces(lower, scaled, info) ? lower : at::Tensor(), scaled};
  }
  at::Tensor matrix = at::empty(hessian.sizes(), dtype);
  if (dtype == at::kFloat) {
    gather_scaled<float, float>(hessian, reversed, scale, matrix);
  } else if (hessian.scalar_type() == at::kFloat) {
    gather_scaled<float, double>(hessian, reversed, scale, matrix);
  } else {
    gather_scaled<double, double>(hessian, reversed, scale, matrix);
  }
  const at::Tensor lower = gptq::cholesky(matrix);  // torch before 2.15 has an at::cholesky
  const bool usable = lower.defined() && reproduces(lower, matrix, /*info=*/at::zeros({}));
  return {usable ? lower : at::Tensor(), matrix};
}

// Row k of the multipliers is column K-1-k of L upside down, without the equilibration, over its entry on the diagonal.
at::Tensor multipliers_on_device(const at::Tensor& lower, const at::Tensor& root, at::ScalarType dtype) {
  const at::Tensor scale = root.div(root.max());  // a common factor, which may be beyond float32, cancels
  const at::Tensor share = lower.diagonal().flip(0).to(at::kDouble).mul_(scale).reciprocal_();
  const at::Tensor mirrored = lower.flip({0, 1}).t().mul(scale.to(lower.scalar_type()));
  return mirrored.mul_(share.to(lower.scalar_type()).unsqueeze(1)).to(dtype).contiguous();
}

// The same on the host.
template <typename From, typename To>
void fill_multipliers(const at::Tensor& lower, const at::Tensor& root, at::Tensor& multipliers) {
  constexpr int64_t tile = 32;
  const int64_t k = lower.size(0);
  const auto* from = lower.const_data_ptr<From>();
  const auto* scale = root.const_data_ptr<double>();
  auto* to = multipliers.data_ptr<To>();
  at::parallel_for(0, (k + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * tile; first < std::min(end * tile, k); first += tile) {
      const int64_t last = std::min(first + tile, k);
      for (int64_t column = 0; column < k; column += tile) {
        for (int64_t row = first; row < last; ++row) {
          const int64_t mirror = k - 1 - row, end = std::min(column + tile, k),
                        filled = std::clamp(row + 1, column, end);
          const double share = 1 / (static_cast<double>(from[mirror * k + mirror]) * scale[row]);
          for (int64_t j = column; j < filled; ++j) {
            to[row * k + j] = static_cast<To>(static_cast<double>(from[(k - 1 - j) * k + mirror]) * (scale[j] * share));
          }
          std::fill(to + row * k + filled, to + row * k + end, To(0));
        }
      }
    }
  });
}

void fill_factor(const at::Tensor& lower, const at::Tensor& diagonal, const at::Tensor& spare, at::ScalarType dtype,
                 Factor& factor) {
  const at::Tensor root = diagonal.index_select(0, factor.order).sqrt_();
  factor.pivots = lower.diagonal().flip(0).to(at::kDouble).mul_(root).square_();
  if (solved_on_device(lower)) {
    factor.multipliers = multipliers_on_device(lower, root, dtype);
    return;
  }
  factor.multipliers = spare.scalar_type() == dtype ? spare : at::empty(lower.sizes(), dtype);
  if (dtype == at::kDouble) {
    fill_multipliers<double, double>(lower, root, factor.multipliers);
  } else if (lower.scalar_type() == at::kDouble) {
    fill_multipliers<double, float>(lower, root, factor.multipliers);
  } else {
    fill_multipliers<float, float>(lower, root, factor.multipliers);
  }
}

}  // namespace

Factor factorise(const at::Tensor& hessian, const at::Tensor& order, double damping) {
  Factor factor;
  factor.order = order;
  factor.damping = damping;
  factor.float64 = hessian.scalar_type() == at::kDouble;
  while (true) {
    const at::Tensor diagonal = damped_diagonal(hessian, factor.damping);
    at::Tensor lower, matrix;
    if (!factor.float64) {
      std::tie(lower, matrix) = reversed_cholesky(hessian, order, diagonal, at::kFloat);
    }
    if (!lower.defined()) {
      factor.float64 = true;
      std::tie(lower, matrix) = reversed_cholesky(hessian, order, diagonal, at::kDouble);
    }
    if (lower.defined()) {
      fill_factor(lower, diagonal, matrix, hessian.scalar_type(), factor);
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
