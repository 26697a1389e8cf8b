#pragma once

// GPTQ and its relatives in float64 loops, straight from their definitions.

#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

namespace gptq::reference {

/// Row-major float64 matrix.
struct Matrix {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<double> values;

  Matrix(int64_t rows_, int64_t cols_, double fill = 0)
      : rows(rows_), cols(cols_), values(static_cast<size_t>(rows_ * cols_), fill) {}
  explicit Matrix(const at::Tensor& tensor) : Matrix(tensor.size(0), tensor.size(1)) {
    const at::Tensor copy = tensor.detach().to(at::kDouble).contiguous();
    std::copy_n(copy.const_data_ptr<double>(), copy.numel(), values.begin());
  }

  double& operator()(int64_t i, int64_t j) { return values[static_cast<size_t>(i * cols + j)]; }
  double operator()(int64_t i, int64_t j) const { return values[static_cast<size_t>(i * cols + j)]; }
};

/// Scales and zero points, one per group and row, and the codes' range.
struct Groups {
  int64_t bits;
  int64_t group_size;  ///< 1..K
  bool symmetric;
  Matrix scales;  ///< [n_groups, N]
  Matrix zeros;   ///< [n_groups, N]

  double max_code() const { return std::pow(2.0, static_cast<double>(bits)) - 1; }
};

/// Codes, and how far each rounding decision was from going the other way, in steps of the grid.
struct Codes {
  Matrix codes;    ///< [N, K]
  Matrix margins;  ///< [N, K]

  Codes(int64_t n, int64_t k) : codes(n, k), margins(n, k) {}
  double least_margin() const { return *std::min_element(margins.values.begin(), margins.values.end()); }
};

/// Scale and zero point for values in [lo, hi], the scale in float16.
inline std::pair<double, double> minmax(double lo, double hi, int64_t bits, bool symmetric) {
  const double max_code = std::pow(2.0, static_cast<double>(bits)) - 1;
  lo = std::min(lo, 0.0);
  hi = std::max(hi, 0.0);
  if (symmetric) {
    hi = std::max(hi, -lo);
    lo = -hi;
  }
  const double middle = (max_code + 1) / 2;
  if (hi == lo) {
    return {1.0, symmetric ? middle : 0.0};
  }
  const double scale = static_cast<float>(c10::Half(static_cast<float>((hi - lo) / max_code)));
  return {scale, symmetric ? middle : std::min(std::max(std::nearbyint(-lo / scale), 0.0), max_code)};
}

/// Sets the scale and zero point of one row's group from columns [first, last) of w.
inline void set_group(Groups& groups, const Matrix& w, int64_t row, int64_t group, int64_t first, int64_t last) {
  double lo = 0, hi = 0;
  for (int64_t k = first; k < last; ++k) {
    lo = std::min(lo, w(row, k));
    hi = std::max(hi, w(row, k));
  }
  const auto [scale, zero] = minmax(lo, hi, groups.bits, groups.symmetric);
  groups.scales(group, row) = scale;
  groups.zeros(group, row) = zero;
}

/// Min/max groups of a weight as it is. group_size -1: one group per row.
inline Groups make_groups(const Matrix& w, int64_t bits, int64_t group_size, bool symmetric) {
  const int64_t size = group_size == -1 ? w.cols : std::min(group_size, w.cols);
  const int64_t n_groups = (w.cols + size - 1) / size;
  Groups groups{bits, size, symmetric, Matrix(n_groups, w.rows), Matrix(n_groups, w.rows)};
  for (int64_t row = 0; row < w.rows; ++row) {
    for (int64_t group = 0; group < n_groups; ++group) {
      set_group(groups, w, row, group, group * size, std::min((group + 1) * size, w.cols));
    }
  }
  return groups;
}

/// Rounds target to the grid of (row, column k), records code and margin, returns the grid value.
inline double quantize_one(double target, const Groups& groups, int64_t row, int64_t k, Codes& out) {
  const double scale = groups.scales(k / groups.group_size, row);
  const double zero = groups.zeros(k / groups.group_size, row);
  const double level = target / scale + zero;
  const double code = std::min(std::max(std::nearbyint(target / scale) + zero, 0.0), groups.max_code());
  const double inside = std::min(std::max(level, 0.0), groups.max_code());
  const double to_boundary = std::abs(inside - std::floor(inside) - 0.5);
  out.codes(row, k) = code;
  out.margins(row, k) = to_boundary + std::abs(level - inside);
  return (code - zero) * scale;
}

inline Codes round_to_nearest(const Matrix& w, const Groups& groups) {
  Codes out(w.rows, w.cols);
  for (int64_t row = 0; row < w.rows; ++row) {
    for (int64_t k = 0; k < w.cols; ++k) {
      quantize_one(w(row, k), groups, row, k, out);
    }
  }
  return out;
}

inline Matrix dequantize(const Matrix& codes, const Groups& groups) {
  Matrix values(codes.rows, codes.cols);
  for (int64_t row = 0; row < codes.rows; ++row) {
    for (int64_t k = 0; k < codes.cols; ++k) {
      const int64_t group = k / groups.group_size;
      values(row, k) = (codes(row, k) - groups.zeros(group, row)) * groups.scales(group, row);
    }
  }
  return values;
}

/// tr(A H Aᵀ)
inline double quadratic_form(const Matrix& a, const Matrix& h) {
  double total = 0;
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t i = 0; i < a.cols; ++i) {
      for (int64_t j = 0; j < a.cols; ++j) {
        total += a(row, i) * h(i, j) * a(row, j);
      }
    }
  }
  return total;
}

inline Matrix difference(const Matrix& a, const Matrix& b) {
  Matrix out = a;
  for (size_t i = 0; i < out.values.size(); ++i) {
    out.values[i] -= b.values[i];
  }
  return out;
}

/// H + damping * mean(diag H) * I
inline Matrix damped(const Matrix& h, double damping) {
  double mean = 0;
  for (int64_t k = 0; k < h.rows; ++k) {
    mean += h(k, k) / static_cast<double>(h.rows);
  }
  Matrix out = h;
  for (int64_t k = 0; k < h.rows; ++k) {
    out(k, k) += damping * mean;
  }
  return out;
}

inline std::vector<int64_t> stored_order(int64_t k) {
  std::vector<int64_t> order(static_cast<size_t>(k));
  std::iota(order.begin(), order.end(), 0);
  return order;
}

/// Columns by descending diagonal.
inline std::vector<int64_t> descending_order(const Matrix& h) {
  auto order = stored_order(h.rows);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return h(i, i) > h(j, j); });
  return order;
}

/// Inverse by Gauss-Jordan elimination; for positive definite matrices.
inline Matrix inverse(Matrix a) {
  Matrix out(a.rows, a.rows);
  for (int64_t i = 0; i < a.rows; ++i) {
    out(i, i) = 1;
  }
  for (int64_t p = 0; p < a.rows; ++p) {
    const double pivot = a(p, p);
    for (int64_t j = 0; j < a.rows; ++j) {
      a(p, j) /= pivot;
      out(p, j) /= pivot;
    }
    for (int64_t i = 0; i < a.rows; ++i) {
      const double factor = a(i, p);
      for (int64_t j = 0; i != p && j < a.rows; ++j) {
        a(i, j) -= factor * a(p, j);
        out(i, j) -= factor * out(p, j);
      }
    }
  }
  return out;
}

/// The ridge regression W' of the outputs W x on the inputs x̂: it makes Σ |W x - W' x̂|² 2/n + damping * mean(diag H) *
/// |W' - W|² least, H = 2/n Σ x̂ x̂ᵀ. Inputs are rows.
inline Matrix ridge_regression(const Matrix& w, const Matrix& x, const Matrix& x_hat, double damping) {
  const int64_t k = w.cols;
  const double share = 2.0 / static_cast<double>(x.rows);
  Matrix h(k, k), cross(k, k);
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        h(i, j) += share * x_hat(t, i) * x_hat(t, j);
        cross(i, j) += share * x(t, i) * x_hat(t, j);
      }
    }
  }
  const Matrix hd = damped(h, damping);
  const Matrix inverse_hd = inverse(hd);
  Matrix right(w.rows, k), out(w.rows, k);
  for (int64_t n = 0; n < w.rows; ++n) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        right(n, j) += w(n, i) * (cross(i, j) + hd(i, j) - h(i, j));
      }
    }
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        out(n, j) += right(n, i) * inverse_hd(i, j);
      }
    }
  }
  return out;
}

/// Upper triangular U with A = Uᵀ U.
inline Matrix upper_cholesky(const Matrix& a) {
  Matrix u(a.rows, a.rows);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = i; j < a.rows; ++j) {
      double value = a(i, j);
      for (int64_t m = 0; m < i; ++m) {
        value -= u(m, i) * u(m, j);
      }
      if (i == j && value <= 0) {
        throw std::domain_error("not positive definite");
      }
      u(i, j) = i == j ? std::sqrt(value) : value / u(i, i);
    }
  }
  return u;
}

/// Upper triangular R with A = R Rᵀ.
inline Matrix reversed_cholesky(const Matrix& a) {
  Matrix r(a.rows, a.rows);
  for (int64_t k = a.rows - 1; k >= 0; --k) {
    for (int64_t j = k; j >= 0; --j) {
      double value = a(j, k);
      for (int64_t m = k + 1; m < a.rows; ++m) {
        value -= r(j, m) * r(k, m);
      }
      r(j, k) = j == k ? std::sqrt(value) : value / r(k, k);
    }
  }
  return r;
}

inline Matrix permuted(const Matrix& a, const std::vector<int64_t>& order) {
  Matrix out(a.rows, a.rows);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.rows; ++j) {
      out(i, j) = a(order[static_cast<size_t>(i)], order[static_cast<size_t>(j)]);
    }
  }
  return out;
}

/// Optimal brain quantization in a fixed order: after each column the other weights of the row absorb its error by the
/// explicit inverse, and the inverse loses that column by a rank-1 downdate. With dynamic groups (order as stored)
/// scales are taken from the updated weights when a group is reached.
inline Codes obq(Matrix w, const Matrix& hd, Groups& groups, const std::vector<int64_t>& order,
                 bool dynamic_groups = false) {
  Codes out(w.rows, w.cols);
  Matrix inv = inverse(hd);
  for (const int64_t k : order) {
    for (int64_t row = 0; row < w.rows; ++row) {
      if (dynamic_groups && k % groups.group_size == 0) {
        set_group(groups, w, row, k / groups.group_size, k, std::min(k + groups.group_size, w.cols));
      }
      const double error = (w(row, k) - quantize_one(w(row, k), groups, row, k, out)) / inv(k, k);
      for (int64_t j = 0; j < w.cols; ++j) {
        w(row, j) -= error * inv(k, j);
      }
    }
    const Matrix before = inv;
    for (int64_t i = 0; i < w.cols; ++i) {
      for (int64_t j = 0; j < w.cols; ++j) {
        inv(i, j) -= before(i, k) * before(k, j) / before(k, k);
      }
    }
  }
  return out;
}

/// The published form: U with Hd⁻¹ = Uᵀ U in sweep order, errors pushed to the right along its rows.
inline Codes gptq_u_form(Matrix w, const Matrix& hd, const Groups& groups, const std::vector<int64_t>& order) {
  Codes out(w.rows, w.cols);
  const Matrix u = upper_cholesky(inverse(permuted(hd, order)));
  for (size_t k = 0; k < order.size(); ++k) {
    const auto pk = static_cast<int64_t>(k);
    for (int64_t row = 0; row < w.rows; ++row) {
      const double value = w(row, order[k]);
      const double error = (value - quantize_one(value, groups, row, order[k], out)) / u(pk, pk);
      for (size_t j = k + 1; j < order.size(); ++j) {
        w(row, order[j]) -= error * u(pk, static_cast<int64_t>(j));
      }
    }
  }
  return out;
}

/// Babai's nearest plane. Each row of w, as Σ w_k v_k with v_i · v_j = Hd_ij, is rounded to the lattice of the s_k v_k
/// by Gram-Schmidt, the planes of the column swept first coming first. Integers, [N, K].
inline Matrix nearest_plane(const Matrix& w, const Matrix& hd, const Matrix& scales,
                            const std::vector<int64_t>& order) {
  const int64_t k = w.cols;
  const Matrix u = upper_cholesky(hd);  // v_k is its column k
  const auto dot = [&](const std::vector<double>& a, const std::vector<double>& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
  };
  Matrix out(w.rows, k);
  for (int64_t row = 0; row < w.rows; ++row) {
    std::vector<std::vector<double>> basis, planes;
    std::vector<double> target(static_cast<size_t>(k));
    for (auto column = order.rbegin(); column != order.rend(); ++column) {
      std::vector<double> vector(static_cast<size_t>(k));
      for (int64_t i = 0; i < k; ++i) {
        vector[static_cast<size_t>(i)] = scales(row, *column) * u(i, *column);
        target[static_cast<size_t>(i)] += w(row, *column) * u(i, *column);
      }
      basis.push_back(vector);
      for (const auto& plane : planes) {
        const double share = dot(vector, plane) / dot(plane, plane);
        for (size_t i = 0; i < vector.size(); ++i) {
          vector[i] -= share * plane[i];
        }
      }
      planes.push_back(vector);
    }
    for (size_t i = planes.size(); i-- > 0;) {
      const double level = std::nearbyint(dot(target, planes[i]) / dot(planes[i], planes[i]));
      out(row, order[planes.size() - 1 - i]) = level;
      for (size_t j = 0; j < target.size(); ++j) {
        target[j] -= level * basis[i][j];
      }
    }
  }
  return out;
}

/// The inverse-free form: T_k = w_k + Σ_{j<k} e_j R_jk / R_kk with Hd = R Rᵀ in sweep order.
inline Codes gptq_pull_form(const Matrix& w, const Matrix& hd, const Groups& groups,
                            const std::vector<int64_t>& order) {
  Codes out(w.rows, w.cols);
  Matrix errors(w.rows, w.cols);  // in sweep order
  const Matrix r = reversed_cholesky(permuted(hd, order));
  for (size_t k = 0; k < order.size(); ++k) {
    const auto pk = static_cast<int64_t>(k);
    for (int64_t row = 0; row < w.rows; ++row) {
      double target = w(row, order[k]);
      for (int64_t j = 0; j < pk; ++j) {
        target += errors(row, j) * r(j, pk) / r(pk, pk);
      }
      errors(row, pk) = w(row, order[k]) - quantize_one(target, groups, row, order[k], out);
    }
  }
  return out;
}

}  // namespace gptq::reference
