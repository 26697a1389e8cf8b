#pragma once

// The loops of pull, for kernel files alone. A shape says how many registers a tile takes and, as multiply_add, what is
// added to a sum.

#include "quant/levels.h"
#include "quant/pull_kernel.h"

namespace gptq {

inline constexpr int64_t kStripBytes = 256;
inline constexpr int64_t kPanel = 96;  // columns that stay in the first-level cache: 24 KiB

/// How many registers a tile takes: kVectors vectors of kBytes for each of kColumns sums.
template <int64_t kBytes_, int64_t kVectors_, int64_t kColumns_>
struct TileShape {
  static constexpr int64_t kBytes = kBytes_, kVectors = kVectors_, kColumns = kColumns_;
};

template <typename Shape, int64_t kColumns, typename From, typename T>
GPTQ_INLINE void pull_tile(const From* matrix, int64_t stride, const From* columns, int64_t count, T* targets) {
  using Vector = Lanes<Shape::kBytes, T>;
  using Factors = Lanes<Shape::kBytes, From>;
  constexpr int64_t rows = kStripBytes / sizeof(T);
  Vector sums[kColumns][Shape::kVectors];
  for (int64_t c = 0; c < kColumns; ++c) {
    for (int64_t v = 0; v < Shape::kVectors; ++v) {
      sums[c][v] = reinterpret_cast<const Vector*>(targets + c * rows)[v];
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    const auto* column = reinterpret_cast<const Factors*>(columns + j * rows);
    for (int64_t c = 0; c < kColumns; ++c) {
      const From m = matrix[c * stride + j];
      for (int64_t v = 0; v < Shape::kVectors; ++v) {
        Shape::multiply_add(sums[c][v], column[v], m);
      }
    }
  }
  for (int64_t c = 0; c < kColumns; ++c) {
    for (int64_t v = 0; v < Shape::kVectors; ++v) {
      reinterpret_cast<Vector*>(targets + c * rows)[v] = sums[c][v];
    }
  }
}

inline constexpr int64_t kLine = 64;  // bytes

// What the next panel reads of kRows rows of the matrix: too far apart for the processor to see coming.
template <int64_t kRows, typename T>
GPTQ_INLINE void prefetch_rows(const T* matrix, int64_t stride) {
  constexpr int64_t step = kLine / sizeof(T);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t j = 0; j < kPanel; j += step) {
      __builtin_prefetch(matrix + row * stride + j, 0, 2);
    }
  }
}

// Parts [from, to) of count of the next panel's columns.
template <typename T>
GPTQ_INLINE void prefetch_columns(const T* columns, int64_t from, int64_t to, int64_t count) {
  constexpr int64_t lines = kPanel * kStripBytes / kLine, step = kLine / sizeof(T);
  for (int64_t line = lines * from / count; line < lines * to / count; ++line) {
    __builtin_prefetch(columns + line * step, 0, 2);
  }
}

// The columns that are left, at most kMost.
template <typename Shape, int64_t kMost, typename From, typename T>
GPTQ_INLINE void pull_rest(const From* matrix, int64_t stride, const From* columns, int64_t width, int64_t count,
                           T* targets) {
  if constexpr (kMost > 0) {
    if (count == kMost) {
      pull_tile<Shape, kMost>(matrix, stride, columns, width, targets);
    } else {
      pull_rest<Shape, kMost - 1>(matrix, stride, columns, width, count, targets);
    }
  }
}

// more: whether a panel follows.
template <typename Shape, typename From, typename T>
GPTQ_INLINE void pull_panel(const From* matrix, int64_t stride, const From* columns, int64_t width, int64_t count,
                            bool more, T* targets) {
  constexpr int64_t rows = kStripBytes / sizeof(T), lanes = Shape::kVectors * Shape::kBytes / sizeof(T);
  for (int64_t lane = 0; lane < rows; lane += lanes) {
    int64_t c = 0;
    for (; c + Shape::kColumns <= count; c += Shape::kColumns) {
      if (more && lane == 0) {
        prefetch_rows<Shape::kColumns>(matrix + c * stride + kPanel, stride);
        prefetch_columns(columns + kPanel * rows, c, c + Shape::kColumns, count);
      }
      pull_tile<Shape, Shape::kColumns>(matrix + c * stride, stride, columns + lane, width, targets + c * rows + lane);
    }
    pull_rest<Shape, Shape::kColumns - 1>(matrix + c * stride, stride, columns + lane, width, count - c,
                                          targets + c * rows + lane);
  }
}

template <typename Shape, typename From, typename T>
GPTQ_INLINE void pull_all(const From* matrix, int64_t stride, const From* columns, int64_t from, int64_t to,
                          int64_t count, T* targets) {
  constexpr int64_t rows = kStripBytes / sizeof(T);
  for (int64_t j = from; j < to; j += kPanel) {
    const bool more = to - j > kPanel;
    pull_panel<Shape>(matrix + j, stride, columns + j * rows, more ? kPanel : to - j, count, more, targets);
  }
}

}  // namespace gptq
