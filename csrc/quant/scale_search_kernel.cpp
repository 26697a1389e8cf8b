#include "quant/scale_search_kernel.h"

#include "quant/lanes.h"

namespace gptq {
namespace {

constexpr int64_t kTogether = 4;     // candidates scored in one pass over the group
constexpr int64_t kCandidates = 20;  // sizes of the range, from kLeastShare of the largest weight up
constexpr int64_t kRefits = 3;
constexpr double kLeastShare = 0.4;

template <typename T>
struct Best {
  Lanes<T> score, scale, zero;

  GPTQ_INLINE void offer(const Lanes<T>& new_score, const Lanes<T>& new_scale, const Lanes<T>& new_zero) {
    const auto better = (new_score < score) & is_scale<T>(new_scale);  // false for the NaN of a group of zeros
    score = better ? new_score : score;
    scale = better ? new_scale : scale;
    zero = better ? new_zero : zero;
  }
};

// One vector of rows of a group.
template <typename T>
struct Slice {
  const SearchedGroup<T>& group;
  int64_t vector;

  GPTQ_INLINE const Lanes<T>& weight(int64_t column) const {
    return lanes(group.weights + column * kStripRows<T>)[vector];
  }

  GPTQ_INLINE void score(const Lanes<T>* scales, const Lanes<T>& zero, Lanes<T>* scores) const {
    const T rounder = kRounder<T>;
    const Lanes<T> least = -zero, most = group.max_code - zero;
    Lanes<T> inverses[kTogether];
    for (int64_t i = 0; i < kTogether; ++i) {
      inverses[i] = T(1) / scales[i];
      scores[i] = Lanes<T>{};
    }
    for (int64_t c = 0; c < group.n_columns; ++c) {
      const Lanes<T> w = weight(c);
      for (int64_t i = 0; i < kTogether; ++i) {
        Lanes<T> level = w * inverses[i];
        level = level > least ? level : least;
        level = level < most ? level : most;
        const Lanes<T> error = w - ((level + rounder) - rounder) * scales[i];
        scores[i] += group.importance[c] * error * error;
      }
    }
  }

  GPTQ_INLINE void offer_all(const Lanes<T>* scales, const Lanes<T>& zero, Best<T>& best) const {
    Lanes<T> scores[kTogether];
    score(scales, zero, scores);
    for (int64_t i = 0; i < kTogether; ++i) {
      best.offer(scores[i], scales[i], zero);
    }
  }

  // Scales from kLeastShare to most_share of the given one.
  GPTQ_INLINE void offer_range(const Lanes<T>& scale, T most_share, const Lanes<T>& zero, Best<T>& best) const {
    for (int64_t first = 0; first < kCandidates; first += kTogether) {
      Lanes<T> scales[kTogether];
      for (int64_t i = 0; i < kTogether; ++i) {
        const T share = T(kLeastShare) + (most_share - T(kLeastShare)) * T(first + i) / T(kCandidates - 1);
        scales[i] = half_precision<T>(scale * share);
      }
      offer_all(scales, zero, best);
    }
  }

  GPTQ_INLINE void offer_least_squares(Best<T>& best) const {
    const T rounder = kRounder<T>;
    const Lanes<T> least = -best.zero, most = group.max_code - best.zero;
    const Lanes<T> inverse = T(1) / best.scale;
    Lanes<T> product = {}, square = {};
    for (int64_t c = 0; c < group.n_columns; ++c) {
      const Lanes<T> w = weight(c);
      Lanes<T> level = w * inverse;
      level = level > least ? level : least;
      level = level < most ? level : most;
      level = (level + rounder) - rounder;
      product += group.importance[c] * w * level;
      square += group.importance[c] * level * level;
    }
    const Lanes<T> fitted = half_precision<T>(product / square);
    const Lanes<T> scales[kTogether] = {fitted, fitted, fitted, fitted};
    offer_all(scales, best.zero, best);
  }
};

template <typename T>
GPTQ_INLINE void search_slice(const SearchedGroup<T>& group, int64_t vector) {
  const Slice<T> slice{group, vector};
  Lanes<T>& scale = lanes(group.scales)[vector];
  Lanes<T>& zero = lanes(group.zeros)[vector];
  Best<T> best{{}, scale, zero};
  const Lanes<T> present[kTogether] = {scale, scale, scale, scale};
  Lanes<T> scores[kTogether];
  slice.score(present, zero, scores);
  best.score = scores[0];
  if (group.symmetric) {
    const T half = (group.max_code + 1) / 2;
    const Lanes<T> widest = scale * group.max_code / (2 * half);  // the largest |w| at the outermost code
    const T most_share = half / (half - 1);
    const Lanes<T> middle = zero;
    slice.offer_range(widest, most_share, middle, best);
    slice.offer_range(-widest, most_share, middle, best);
  } else {
    slice.offer_range(scale, T(1), zero, best);
    const Lanes<T> lower = zero - T(1), upper = zero + T(1);
    slice.offer_range(scale, T(1), lower < T(0) ? zero : lower, best);
    slice.offer_range(scale, T(1), upper > group.max_code ? zero : upper, best);
  }
  for (int64_t i = 0; i < kRefits; ++i) {
    slice.offer_least_squares(best);
  }
  scale = best.scale;
  zero = best.zero;
}

}  // namespace

GPTQ_CLONES void search_scales(const SearchedGroup<float>& group) {
  for (int64_t vector = 0; vector < kStripVectors<float>; ++vector) {
    search_slice(group, vector);
  }
}

GPTQ_CLONES void search_scales(const SearchedGroup<double>& group) {
  for (int64_t vector = 0; vector < kStripVectors<double>; ++vector) {
    search_slice(group, vector);
  }
}

}  // namespace gptq
