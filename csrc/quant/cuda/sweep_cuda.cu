// The sweep over the columns of a block: see sweep_kernel.h.
#include "quant/cuda/column_steps.h"
#include "quant/cuda/quantize_cuda.h"
#include "quant/lane.h"

namespace gptq {
namespace {

// A column goes to its nearest level, and its error on to the columns after it.
template <typename T>
struct QuantizeStep {
  const SweptBlock<T>& block;
  const int64_t row;
  T loss = 0;
  int64_t first = 0;
  int width = 0;
  T weights[kTile], scales[kTile], zeros[kTile];  // and then errors, values, codes

  __device__ __forceinline__ QuantizeStep(const SweptBlock<T>& swept, int64_t own_row) : block(swept), row(own_row) {}

  __device__ __forceinline__ void load(int64_t first_column, int columns) {
    first = first_column;
    width = columns;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (i < width) {
        const int64_t group = block.order[first + i] / block.group_size * block.n_rows + row;
        weights[i] = block.weights[(first + i) * block.n_rows + row];
        scales[i] = block.scales[group];
        zeros[i] = block.zeros[group];
      }
    }
  }

  __device__ __forceinline__ T operator()(int i, T target) {
    const T level = nearest_level<T>(target, scales[i], zeros[i], block.max_code);
    scales[i] = level * scales[i];
    zeros[i] = level + zeros[i];
    weights[i] = weights[i] - scales[i];
    return weights[i];
  }

  __device__ __forceinline__ void store(const T (&targets)[kTile]) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (i < width) {
        const int64_t at = (first + i) * block.n_rows + row;
        const T error = weights[i], rounding = targets[i] - scales[i];
        loss += block.pivots[first + i] * rounding * rounding - block.damping[first + i] * error * error;
        block.errors[at] = error;
        block.codes[at] = static_cast<uint8_t>(static_cast<int>(zeros[i]));
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) sweep_kernel(SweptBlock<T> block) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  QuantizeStep<T> step(block, row);
  if (row < block.n_rows) step.loss = block.losses[row];
  column_steps(row, block.n_rows, block.n_columns, block.multipliers, block.stride, block.targets, block.errors, step);
  if (row < block.n_rows) block.losses[row] = step.loss;
}

// The unknown of a column, taken off the targets of those after it.
template <typename T>
struct SolveStep {
  const SolvedBlock<T>& block;
  const int64_t row;
  int64_t first = 0;
  int width = 0;

  __device__ __forceinline__ void load(int64_t first_column, int columns) {
    first = first_column;
    width = columns;
  }
  __device__ __forceinline__ T operator()(int, T target) { return -target; }
  __device__ __forceinline__ void store(const T (&targets)[kTile]) {
#pragma unroll
    for (int i = 0; i < kTile; ++i)
      if (i < width) block.negated[(first + i) * block.n_rows + row] = -targets[i];
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) solve_kernel(SolvedBlock<T> block) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  SolveStep<T> step = {block, row};
  column_steps(row, block.n_rows, block.n_columns, block.multipliers, block.stride, block.targets, block.negated, step);
}

template <typename T, typename Block>
cudaError_t launch_steps(void (*kernel)(Block), const Block& block, cudaStream_t stream) {
  LaunchShape shape = shape_of_rows(block.n_rows);
  shape.shared_bytes = Panel<T>::kBytes;
  return launch(kernel, shape, stream, block);
}

}  // namespace

cudaError_t launch_kernel(const SweptBlock<float>& block, cudaStream_t stream) {
  return launch_steps<float>(sweep_kernel<float>, block, stream);
}

cudaError_t launch_kernel(const SweptBlock<double>& block, cudaStream_t stream) {
  return launch_steps<double>(sweep_kernel<double>, block, stream);
}

cudaError_t launch_kernel(const SolvedBlock<float>& block, cudaStream_t stream) {
  return launch_steps<float>(solve_kernel<float>, block, stream);
}

cudaError_t launch_kernel(const SolvedBlock<double>& block, cudaStream_t stream) {
  return launch_steps<double>(solve_kernel<double>, block, stream);
}

}  // namespace gptq
