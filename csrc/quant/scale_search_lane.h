#pragma once

#include <cstdint>

#include "quant/lane.h"

namespace gptq {

/// The search of scale_search_kernel.h for one row, or a vector of rows, of a group; T and V as in lane.h. Weights is
/// called with a column and returns its V.
template <typename T, typename V, typename Weights>
class ScaleSearch {
 public:
  GPTQ_LANE ScaleSearch(const Weights& weights, int64_t n_columns, const T* importance, T max_code, V scale, V zero)
      : weights_(weights),
        n_columns_(n_columns),
        importance_(importance),
        max_code_(max_code),
        scale_(scale),
        zero_(zero) {
    score<1>(&scale_, zero, &score_);
  }

  GPTQ_LANE void run(bool symmetric) {
    const V scale = scale_, zero = zero_;
    if (symmetric) {
      const T half = (max_code_ + 1) / 2;
      const V widest = scale * max_code_ / (2 * half);  // the largest |w| at the outermost code
      const T most_share = half / (half - 1);
      offer_range(widest, most_share, zero);
      offer_range(-widest, most_share, zero);
    } else {
      offer_range(scale, T(1), zero);
      const V lower = zero - T(1), upper = zero + T(1);
      offer_range(scale, T(1), lower < T(0) ? zero : lower);
      offer_range(scale, T(1), upper > max_code_ ? zero : upper);
    }
    for (int i = 0; i < kRefits; ++i) {
      offer_least_squares();
    }
  }

  GPTQ_LANE const V& scale() const { return scale_; }
  GPTQ_LANE const V& zero() const { return zero_; }

 private:
  static constexpr int kTogether = 4;     // candidates scored in one pass over the group
  static constexpr int kCandidates = 20;  // sizes of the range, from kLeastShare of the largest weight up
  static constexpr int kRefits = 3;
  static constexpr double kLeastShare = 0.4;

  template <int kCount>
  GPTQ_LANE void score(const V* scales, const V& zero, V* scores) const {
    const T rounder = kRounder<T>;
    const V least = -zero, most = max_code_ - zero;
    V inverses[kCount];
    for (int i = 0; i < kCount; ++i) {
      inverses[i] = T(1) / scales[i];
      scores[i] = V{};
    }
    for (int64_t c = 0; c < n_columns_; ++c) {
      const V w = weights_(c);
      for (int i = 0; i < kCount; ++i) {
        const V level = clamped<V>(w * inverses[i], least, most);
        const V error = w - ((level + rounder) - rounder) * scales[i];
        scores[i] += importance_[c] * error * error;
      }
    }
  }

  template <int kCount>
  GPTQ_LANE void offer(const V* scales, const V& zero) {
    V scores[kCount];
    score<kCount>(scales, zero, scores);
    for (int i = 0; i < kCount; ++i) {
      const auto better = (scores[i] < score_) & is_scale<T>(scales[i]);  // false for the NaN of a group of zeros
      score_ = better ? scores[i] : score_;
      scale_ = better ? scales[i] : scale_;
      zero_ = better ? zero : zero_;
    }
  }

  // Scales from kLeastShare to most_share of the given one.
  GPTQ_LANE void offer_range(const V& scale, T most_share, const V& zero) {
    for (int first = 0; first < kCandidates; first += kTogether) {
      V scales[kTogether];
      for (int i = 0; i < kTogether; ++i) {
        const T share = T(kLeastShare) + (most_share - T(kLeastShare)) * T(first + i) / T(kCandidates - 1);
        scales[i] = half_precision<T, V>(scale * share);
      }
      offer<kTogether>(scales, zero);
    }
  }

  GPTQ_LANE void offer_least_squares() {
    const T rounder = kRounder<T>;
    const V zero = zero_, least = -zero, most = max_code_ - zero, inverse = T(1) / scale_;
    V product = {}, square = {};
    for (int64_t c = 0; c < n_columns_; ++c) {
      const V w = weights_(c);
      const V level = (clamped<V>(w * inverse, least, most) + rounder) - rounder;
      product += importance_[c] * w * level;
      square += importance_[c] * level * level;
    }
    const V fitted = half_precision<T, V>(product / square);
    offer<1>(&fitted, zero);
  }

  const Weights& weights_;
  int64_t n_columns_;
  const T* importance_;
  T max_code_;
  V score_, scale_, zero_;  // the best so far
};

}  // namespace gptq
