#include "quant/gram.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "quant/product.h"

namespace gptq {

void add_gram(at::Tensor& gram, const at::Tensor& columns) {
  constexpr int64_t block = 512;  // wide enough for the product to run at full speed
  const int64_t k = gram.size(0);
  for (int64_t first = 0; first < k; first += block) {
    const int64_t width = std::min(block, k - first);
    at::Tensor block_row = gram.narrow(0, first, width).narrow(1, first, k - first);
    const at::Tensor left = columns.narrow(0, first, width), right = columns.narrow(0, first, k - first);
    if (gram.is_cpu()) {
      block_row.add_(product(left, right));
    } else {
      block_row.addmm_(left, right.t());
    }
  }
}

// On the CPU by squares that stay in the first cache: at::Tensor::contiguous does this in one thread.
at::Tensor transposed(const at::Tensor& matrix) {
  if (!matrix.is_cpu()) {
    return matrix.t().contiguous();
  }
  constexpr int64_t side = 32;
  const int64_t n = matrix.size(0), k = matrix.size(1);
  const at::Tensor result = at::empty({k, n}, matrix.options());
  const auto* from = matrix.const_data_ptr<float>();
  auto* to = result.data_ptr<float>();
  at::parallel_for(0, at::divup(k, side), 4, [&](int64_t begin, int64_t end) {
    float square[side][side];
    for (int64_t column = begin * side; column < std::min(end * side, k); column += side) {
      const int64_t columns = std::min(side, k - column);
      for (int64_t row = 0; row < n; row += side) {
        const int64_t rows = std::min(side, n - row);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns; ++j) {
            square[j][i] = from[(row + i) * k + column + j];
          }
        }
        for (int64_t j = 0; j < columns; ++j) {
          std::copy_n(square[j], rows, to + (column + j) * n + row);
        }
      }
    }
  });
  return result;
}

ColumnSums column_sums(const at::Tensor& rows, const at::Tensor& weights) {
  constexpr int64_t width = 64;   // columns at a time
  constexpr int64_t chunk = 128;  // rows that are added up in float32
  const int64_t n = rows.size(0), k = rows.size(1);
  if (!rows.is_cpu()) {
    const at::Tensor weighted = weights.defined() ? rows.mul(weights.unsqueeze(1)) : rows;
    return {weighted.sum(0, /*keepdim=*/false, at::kDouble), weighted.mul(rows).sum(0, /*keepdim=*/false, at::kDouble)};
  }
  ColumnSums sums{at::zeros({k}, at::kDouble), at::zeros({k}, at::kDouble)};
  const auto* x = rows.const_data_ptr<float>();
  const auto* w = weights.defined() ? weights.const_data_ptr<float>() : nullptr;
  auto* values = sums.values.data_ptr<double>();
  auto* squares = sums.squares.data_ptr<double>();
  at::parallel_for(0, at::divup(k, width), 4, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * width; first < std::min(end * width, k); first += width) {
      const int64_t count = std::min(width, k - first);
      for (int64_t row = 0; row < n; row += chunk) {
        float value[width] = {}, square[width] = {};
        for (int64_t i = row; i < std::min(row + chunk, n); ++i) {
          const float weight = w != nullptr ? w[i] : 1;
          for (int64_t c = 0; c < count; ++c) {
            const float weighted = weight * x[i * k + first + c];
            value[c] += weighted;
            square[c] += weighted * x[i * k + first + c];
          }
        }
        for (int64_t c = 0; c < count; ++c) {
          values[first + c] += static_cast<double>(value[c]);
          squares[first + c] += static_cast<double>(square[c]);
        }
      }
    }
  });
  return sums;
}

at::Tensor mirrored(const at::Tensor& gram, double scale) {
  at::Tensor full = gram.triu().mul_(scale);
  return full.add_(full.triu(1).t());
}

}  // namespace gptq
