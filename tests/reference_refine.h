#pragma once

// Scale search and refinement in float64 loops.

#include "tests/reference_gptq.h"

namespace gptq::reference {

/// Σ_k importance_k (w_k - q_k)² over one group of one row, rounded to nearest with this scale and zero point.
inline double group_score(const Matrix& w, const std::vector<double>& importance, int64_t row, int64_t first,
                          int64_t last, double scale, double zero, double max_code) {
  double total = 0;
  for (int64_t k = first; k < last; ++k) {
    const double code = std::min(std::max(std::nearbyint(w(row, k) / scale) + zero, 0.0), max_code);
    const double error = w(row, k) - (code - zero) * scale;
    total += importance[static_cast<size_t>(k)] * error * error;
  }
  return total;
}

/// e Hd eᵀ of one row.
inline double row_form(const Matrix& e, const Matrix& hd, int64_t row) {
  double total = 0;
  for (int64_t i = 0; i < e.cols; ++i) {
    for (int64_t j = 0; j < e.cols; ++j) {
      total += e(row, i) * hd(i, j) * e(row, j);
    }
  }
  return total;
}

/// Coordinate descent: group by group each code in turn goes to the grid point where the row's loss is least with all
/// others fixed, found by trying every code; then the group's scale to its least squares value in float16, if that is
/// less. Returns the least difference between the best and the second best code, as a share of the row's loss.
inline double coordinate_descent(const Matrix& w, const Matrix& hd, Groups& groups, Matrix& codes, int64_t sweeps) {
  double least_gap = std::numeric_limits<double>::infinity();
  const auto loss_of = [&](int64_t row) { return row_form(difference(w, dequantize(codes, groups)), hd, row); };
  for (int64_t row = 0; row < w.rows; ++row) {
    for (int64_t step = 0; step < sweeps; ++step) {
      for (int64_t first = 0; first < w.cols; first += groups.group_size) {
        const int64_t last = std::min(first + groups.group_size, w.cols), group = first / groups.group_size;
        for (int64_t k = first; k < last; ++k) {
          double best = std::numeric_limits<double>::infinity(), second = best, best_code = 0;
          for (double code = 0; code <= groups.max_code(); ++code) {
            codes(row, k) = code;
            const double loss = loss_of(row);
            if (loss < best) {
              second = best;
              best = loss;
              best_code = code;
            } else {
              second = std::min(second, loss);
            }
          }
          codes(row, k) = best_code;
          least_gap = std::min(least_gap, (second - best) / best);
        }
        // Loss is a parabola in the scale; its minimum from three points.
        const double s = groups.scales(group, row), h = s / 8, here = loss_of(row);
        groups.scales(group, row) = s + h;
        const double above = loss_of(row);
        groups.scales(group, row) = s - h;
        const double below = loss_of(row);
        const double curvature = above - 2 * here + below;
        const double fitted =
            static_cast<float>(c10::Half(static_cast<float>(s - h * (above - below) / 2 / curvature)));
        groups.scales(group, row) = curvature > 0 ? fitted : s;
        if (loss_of(row) >= here) {
          groups.scales(group, row) = s;
        }
      }
    }
  }
  return least_gap;
}

}  // namespace gptq::reference
