// Coordinate descent over the codes and the scale of a group: see refine_kernel.h.
#include "quant/cuda/column_steps.h"
#include "quant/cuda/quantize_cuda.h"
#include "quant/lane.h"

namespace gptq {
namespace {

// A code goes to where the loss is least with all others fixed, and what that changes on to the gradients after it.
template <typename T>
struct MoveStep {
  const MovedBlock<T>& block;
  const int64_t row;
  T scale = 1, zero = 0, loss = 0;
  int64_t first = 0;
  int width = 0;
  T levels[kTile], inverses[kTile];  // and then changes

  __device__ __forceinline__ MoveStep(const MovedBlock<T>& moved, int64_t own_row) : block(moved), row(own_row) {}

  __device__ __forceinline__ T curvature(int i) const { return block.hessian[(first + i) * (block.stride + 1)]; }

  __device__ __forceinline__ void load(int64_t first_column, int columns) {
    first = first_column;
    width = columns;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (i < width) {
        levels[i] = block.levels[(first + i) * block.n_rows + row];
        inverses[i] = T(1) / (curvature(i) + block.damping[first + i]);
      }
    }
  }

  __device__ __forceinline__ T operator()(int i, T gradient) {
    const T best = levels[i] * scale + gradient * inverses[i];
    const T moved = nearest_level<T>(best, scale, zero, block.max_code);
    const T change = (levels[i] - moved) * scale;
    levels[i] = moved;
    inverses[i] = change;
    return change;
  }

  // With the error off by d, e Hd eᵀ grows by d (2 gradient + d Hd_kk), and its damping's part by that of H.
  __device__ __forceinline__ void store(const T (&gradients)[kTile]) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (i < width) {
        const int64_t at = (first + i) * block.n_rows + row;
        const T change = inverses[i], error = block.errors[at], damping = block.damping[first + i];
        loss += change * (2 * (gradients[i] - damping * error) + change * curvature(i));
        block.changes[at] = change;
        block.errors[at] = error + change;
        block.levels[at] = levels[i];
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) move_kernel(MovedBlock<T> block) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool active = row < block.n_rows;
  MoveStep<T> step(block, row);
  if (active) {
    step.scale = block.scales[row];
    step.zero = block.zeros[row];
  }
  column_steps(row, block.n_rows, block.n_columns, block.hessian, block.stride, block.gradients, block.changes, step);
  if (active) block.losses[row] += step.loss;
}

// With the errors off by -s · levels, e Hd eᵀ falls by 2 s (levels · gradients) - s² (levels Hd levelsᵀ).
template <typename T>
__global__ void __launch_bounds__(kThreads) fit_kernel(FittedGroup<T> group) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= group.n_rows) return;
  T slope = 0, curvature = 0;
#pragma unroll 4
  for (int64_t c = 0; c < group.n_columns; ++c) {
    const int64_t at = c * group.n_rows + row;
    const T level = group.levels[at], damping = group.damping[c];
    slope += level * (group.gradients[at] + group.changes[at] * damping);
    curvature += level * (group.products[at] + level * damping);
  }
  const T scale = group.scales[row], fitted = half_precision<T, T>(scale + slope / curvature), step = fitted - scale;
  const T change = step * (step * curvature - 2 * slope);
  if (!(change < T(0)) || !is_scale<T>(fitted)) return;  // so do levels that are all 0, whose change is NaN
  group.scales[row] = fitted;
  T damped = 0;
#pragma unroll 4
  for (int64_t c = 0; c < group.n_columns; ++c) {
    const int64_t at = c * group.n_rows + row;
    const T error = group.errors[at], shift = step * group.levels[at];
    damped += group.damping[c] * shift * (shift - 2 * error);
    group.errors[at] = error - shift;
  }
  group.losses[row] += change - damped;
}

template <typename T>
cudaError_t launch_move(const MovedBlock<T>& block, cudaStream_t stream) {
  LaunchShape shape = shape_of_rows(block.n_rows);
  shape.shared_bytes = Panel<T>::kBytes;
  return launch(move_kernel<T>, shape, stream, block);
}

}  // namespace

cudaError_t launch_kernel(const MovedBlock<float>& block, cudaStream_t stream) {
  return launch_move(block, stream);
}

cudaError_t launch_kernel(const MovedBlock<double>& block, cudaStream_t stream) {
  return launch_move(block, stream);
}

cudaError_t launch_kernel(const FittedGroup<float>& group, cudaStream_t stream) {
  return launch(fit_kernel<float>, shape_of_rows(group.n_rows), stream, group);
}

cudaError_t launch_kernel(const FittedGroup<double>& group, cudaStream_t stream) {
  return launch(fit_kernel<double>, shape_of_rows(group.n_rows), stream, group);
}

}  // namespace gptq
