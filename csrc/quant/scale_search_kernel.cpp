#include "quant/scale_search_kernel.h"

#include "quant/lanes.h"
#include "quant/scale_search_lane.h"

namespace gptq {
namespace {

// One vector of rows of a group.
template <typename T>
struct Slice {
  const T* weights;
  int64_t vector;

  GPTQ_INLINE const Lanes<T>& operator()(int64_t column) const {
    return lanes(weights + column * kStripRows<T>)[vector];
  }
};

template <typename T>
GPTQ_INLINE void search_all(const SearchedGroup<T>& group) {
  for (int64_t vector = 0; vector < kStripVectors<T>; ++vector) {
    const Slice<T> slice{group.weights, vector};
    Lanes<T>& scale = lanes(group.scales)[vector];
    Lanes<T>& zero = lanes(group.zeros)[vector];
    ScaleSearch<T, Lanes<T>, Slice<T>> search(slice, group.n_columns, group.importance, group.max_code, scale, zero);
    search.run(group.symmetric);
    scale = search.scale();
    zero = search.zero();
  }
}

}  // namespace

GPTQ_CLONES void search_scales(const SearchedGroup<float>& group) {
  search_all(group);
}

GPTQ_CLONES void search_scales(const SearchedGroup<double>& group) {
  search_all(group);
}

}  // namespace gptq
