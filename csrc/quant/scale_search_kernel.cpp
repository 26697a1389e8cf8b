#include "quant/scale_search_kernel.h"

#include "quant/lanes.h"
#include "quant/scale_search_lane.h"

namespace gptq {
namespace {

// One vector of rows of a group.
template <int64_t kBytes, typename T>
struct Slice {
  const T* weights;
  int64_t vector;

  GPTQ_INLINE const Lanes<kBytes, T>& operator()(int64_t column) const {
    return lanes<kBytes>(weights + column * kStripRows<T>)[vector];
  }
};

struct Search {
  template <int64_t kBytes, typename T>
  static GPTQ_INLINE void run(const SearchedGroup<T>* group) {
    using V = Lanes<kBytes, T>;
    for (int64_t vector = 0; vector < kStripVectors<kBytes, T>; ++vector) {
      const Slice<kBytes, T> slice{group->weights, vector};
      V& scale = lanes<kBytes>(group->scales)[vector];
      V& zero = lanes<kBytes>(group->zeros)[vector];
      ScaleSearch<T, V, Slice<kBytes, T>> search(slice, group->n_columns, group->importance, group->max_code, scale,
                                                 zero);
      search.run(group->symmetric);
      scale = search.scale();
      zero = search.zero();
    }
  }
};

}  // namespace

void search_scales(const SearchedGroup<float>& group) {
  run_at_best_level<Search>(&group);
}

void search_scales(const SearchedGroup<double>& group) {
  run_at_best_level<Search>(&group);
}

}  // namespace gptq
