#include "quant/cholesky.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "quant/cholesky_kernel.h"
#include "quant/strips.h"

namespace gptq {
namespace {

// What is left of columns [first, first + width) of A in the strip that starts at row `row`: read from the rows of A,
// which are its columns.
template <typename T>
void load_remainder(const T* matrix, int64_t row, const CholeskyPanel<T>& panel) {
  constexpr int64_t rows = kStripRows<T>;
  const int64_t k = panel.n_columns, count = std::min(rows, k - row);
  T* targets = panel.strip + panel.first * rows;
  for (int64_t c = 0; c < panel.width; ++c) {
    std::copy_n(matrix + (panel.first + c) * k + row, count, targets + c * rows);
    std::fill_n(targets + c * rows + count, rows - count, T(0));
  }
  pull(panel.lower + panel.first * k, k, panel.strip, 0, panel.first, panel.width, targets);
}

template <typename T>
at::Tensor cholesky_of(const at::Tensor& matrix) {
  constexpr int64_t rows = kStripRows<T>;
  const int64_t k = matrix.size(0), n_strips = (k + rows - 1) / rows;
  at::Tensor lower = at::zeros_like(matrix);
  const at::Tensor strips = at::empty({n_strips, k, rows}, matrix.options());
  const auto panel_of = [&](int64_t strip, int64_t block) {
    return CholeskyPanel<T>{strip_data<T>(strips, strip), lower.data_ptr<T>(), k, block * rows,
                            std::min(rows, k - block * rows)};
  };
  for (int64_t block = 0; block < n_strips; ++block) {
    at::parallel_for(block, n_strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        load_remainder(matrix.const_data_ptr<T>(), s * rows, panel_of(s, block));
      }
    });
    if (!factor_corner(panel_of(block, block))) {
      return {};
    }
    at::parallel_for(block + 1, n_strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const CholeskyPanel<T> panel = panel_of(s, block);
        solve_panel(panel);
        store_strip(panel.strip + panel.first * rows, std::min(rows, k - s * rows), panel.width,
                    panel.lower + s * rows * k + panel.first, k, [](T value) { return -value; });
      }
    });
  }
  return lower;
}

}  // namespace

at::Tensor cholesky(const at::Tensor& matrix) {
  return matrix.scalar_type() == at::kDouble ? cholesky_of<double>(matrix) : cholesky_of<float>(matrix);
}

}  // namespace gptq
