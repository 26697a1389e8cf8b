// What the sweep and the refinement have in common: columns of a block one after another, each of which moves the
// targets of those after it. One row of the weight in each thread. Products and sums stay apart where they are written
// apart, see CMakeLists.txt, so that a row takes the steps that it takes on the CPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/launch.h"

namespace gptq {

inline constexpr int kThreads = 128;
inline constexpr int kTile = 16;   // columns whose targets a thread holds in registers
inline constexpr int kDepth = 64;  // columns that are pulled with one panel of the matrix
inline constexpr int kAhead = 8;   // columns that are loaded ahead of their use
static_assert(kDepth % kTile == 0 && kTile % kAhead == 0);

/// A thread for each row.
inline LaunchShape shape_of_rows(int64_t n_rows, int64_t blocks_per_row = 1) {
  const int64_t blocks = (n_rows + kThreads - 1) / kThreads * blocks_per_row;
  return {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)};
}

__device__ __forceinline__ float fused(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ __forceinline__ double fused(double a, double b, double c) {
  return fma(a, b, c);
}

/// Part of the matrix in shared memory, transposed: what one column brings to the targets of a tile lies together.
template <typename T>
struct Panel {
  static constexpr int kPitch = kTile + 16 / static_cast<int>(sizeof(T));  // keeps 16 bytes aligned, parts the banks
  static constexpr size_t kBytes = sizeof(T) * kDepth * kPitch;

  T* values = reinterpret_cast<T*>(shared_memory());

  /// Rows [0, rows) and columns [0, columns) of the matrix. Rows from there to kTile are 0.
  __device__ __forceinline__ void load(const T* matrix, int64_t stride, int rows, int columns) const {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth; i += kThreads) {
      const int row = i / kDepth, column = i % kDepth;
      if (column < columns) values[column * kPitch + row] = row < rows ? matrix[row * stride + column] : T(0);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void pull(T source, int column, int from, T (&targets)[kTile]) const {
#pragma unroll
    for (int i = 0; i < kTile; ++i)
      if (i >= from) targets[i] = fused(source, values[column * kPitch + i], targets[i]);
  }
};

/// targets[i] += Σ_j sources[j] · panel[j][i], j ascending.
template <typename T>
__device__ __forceinline__ void pull_columns(const Panel<T>& panel, const T* sources, int64_t n_rows, int count,
                                             T (&targets)[kTile]) {
  T next[kAhead];
#pragma unroll
  for (int j = 0; j < kAhead; ++j) next[j] = sources[j * n_rows];
  for (int first = 0; first < count; first += kAhead) {
    T now[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) now[j] = next[j];
    if (first + kAhead < count) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) next[j] = sources[(first + kAhead + j) * n_rows];
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) panel.pull(now[j], first + j, 0, targets);
  }
}

/// For each column c of a block in turn: target_c += Σ_{j<c} source_j · matrix_cj, and source_c is what the step makes
/// of it. A Step works on a tile of columns at a time: load(first column, columns), then step(i, target) for column
/// first + i, which returns the source, then store(targets), which stores the sources too.
/// @param row of this thread, which may be none, n_rows or more
/// @param targets, sources [n_columns][n_rows]
template <typename T, typename Step>
__device__ __forceinline__ void column_steps(int64_t row, int64_t n_rows, int64_t n_columns, const T* matrix,
                                             int64_t stride, const T* targets, const T* sources, Step& step) {
  const Panel<T> panel;
  const bool active = row < n_rows;
  for (int64_t first = 0; first < n_columns; first += kTile) {
    const int width = n_columns - first < kTile ? static_cast<int>(n_columns - first) : kTile;
    T sums[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) sums[i] = active && i < width ? targets[(first + i) * n_rows + row] : T(0);
    if (active) step.load(first, width);
    for (int64_t from = 0; from < first; from += kDepth) {
      const int count = first - from < kDepth ? static_cast<int>(first - from) : kDepth;
      panel.load(matrix + first * stride + from, stride, width, count);
      if (active) pull_columns(panel, sources + from * n_rows + row, n_rows, count, sums);
    }
    panel.load(matrix + first * stride + first, stride, width, width);
    if (!active) continue;
#pragma unroll
    for (int i = 0; i < kTile; ++i)
      if (i < width) panel.pull(step(i, sums[i]), i, i + 1, sums);
    step.store(sums);
  }
}

}  // namespace gptq
