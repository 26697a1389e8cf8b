// The scale search: a thread for each group of each row.
#include "quant/cuda/column_steps.h"
#include "quant/cuda/quantize_cuda.h"
#include "quant/scale_search_lane.h"

namespace gptq {
namespace {

template <typename T>
struct GroupWeights {
  const T* weights;
  int64_t n_rows;

  GPTQ_LANE T operator()(int64_t column) const { return weights[column * n_rows]; }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) search_kernel(SearchedGroups<T> groups, int64_t blocks_per_group) {
  const int64_t row = blockIdx.x % blocks_per_group * kThreads + threadIdx.x;
  const int64_t group = blockIdx.x / blocks_per_group, first = group * groups.group_size;
  if (row >= groups.n_rows) return;
  const int64_t left = groups.n_columns - first, count = left < groups.group_size ? left : groups.group_size;
  T& scale = groups.scales[group * groups.n_rows + row];
  T& zero = groups.zeros[group * groups.n_rows + row];
  const GroupWeights<T> weights = {groups.weights + first * groups.n_rows + row, groups.n_rows};
  ScaleSearch<T, T, GroupWeights<T>> search(weights, count, groups.importance + first, groups.max_code, scale, zero);
  search.run(groups.symmetric);
  scale = search.scale();
  zero = search.zero();
}

template <typename T>
cudaError_t launch_search(const SearchedGroups<T>& groups, cudaStream_t stream) {
  const int64_t n_groups = (groups.n_columns + groups.group_size - 1) / groups.group_size;
  return launch(search_kernel<T>, shape_of_rows(groups.n_rows, n_groups), stream, groups,
                (groups.n_rows + kThreads - 1) / kThreads);
}

}  // namespace

cudaError_t launch_kernel(const SearchedGroups<float>& groups, cudaStream_t stream) {
  return launch_search(groups, stream);
}

cudaError_t launch_kernel(const SearchedGroups<double>& groups, cudaStream_t stream) {
  return launch_search(groups, stream);
}

}  // namespace gptq
