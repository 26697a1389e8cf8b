#include "quant/refine_kernel.h"

#include "quant/lanes.h"

namespace gptq {
namespace {

// sums[c] += Σ_{i in [from, to)} columns[i] · H_first+i,first+c for c in [tile, tile + width)
template <typename T>
GPTQ_INLINE void pull_within(const RefinedGroup<T>& group, const T* columns, int64_t from, int64_t to, int64_t tile,
                             int64_t width, T* sums) {
  pull(group.hessian + (group.first + tile) * group.n_columns + group.first, group.n_columns, columns, from, to, width,
       sums + tile * kStripRows<T>);
}

// sums[c] += columns[c] · (Hd - H)_cc for c in [tile, end)
template <int64_t kBytes, typename T>
GPTQ_INLINE void add_damped(const RefinedGroup<T>& group, const T* columns, int64_t tile, int64_t end, T* sums) {
  for (int64_t c = tile; c < end; ++c) {
    const T damping = group.damping[group.first + c];
    for (int64_t v = 0; v < kStripVectors<kBytes, T>; ++v) {
      lanes<kBytes>(sums + c * kStripRows<T>)[v] += lanes<kBytes>(columns + c * kStripRows<T>)[v] * damping;
    }
  }
}

// With the error off by d, e Hd eᵀ grows by d (2 gradient + d Hd_kk), and its damping's part by that of H.
template <int64_t kBytes, typename T>
GPTQ_INLINE void move_code(const RefinedGroup<T>& group, int64_t column) {
  constexpr int64_t rows = kStripRows<T>;
  const int64_t k = group.first + column;
  const T curvature = group.hessian[k * group.n_columns + k], damping = group.damping[k];
  const T inverse = T(1) / (curvature + damping);
  for (int64_t v = 0; v < kStripVectors<kBytes, T>; ++v) {
    const Lanes<kBytes, T> scale = lanes<kBytes>(group.scales)[v], zero = lanes<kBytes>(group.zeros)[v];
    const Lanes<kBytes, T> gradient = lanes<kBytes>(group.gradients + column * rows)[v];
    Lanes<kBytes, T>& level = lanes<kBytes>(group.levels + k * rows)[v];
    Lanes<kBytes, T>& error = lanes<kBytes>(group.errors + k * rows)[v];
    const Lanes<kBytes, T> best = level * scale + gradient * inverse;
    const Lanes<kBytes, T> moved = nearest_level<T>(best, scale, zero, group.max_code);
    const Lanes<kBytes, T> change = (level - moved) * scale;
    lanes<kBytes>(group.losses)[v] += change * (2 * (gradient - damping * error) + change * curvature);
    lanes<kBytes>(group.changes + column * rows)[v] = change;
    error += change;
    level = moved;
  }
}

template <int64_t kBytes, typename T>
GPTQ_INLINE void move_codes(const RefinedGroup<T>& group) {
  for (int64_t tile = 0; tile < group.count; tile += kTileColumns) {
    const int64_t end = tile + kTileColumns < group.count ? tile + kTileColumns : group.count;
    pull_within(group, group.changes, 0, tile, tile, end - tile, group.gradients);
    for (int64_t c = tile; c < end; ++c) {
      pull_within(group, group.changes, tile, c, c, 1, group.gradients);
      move_code<kBytes>(group, c);
    }
  }
}

// With the errors off by -s · levels, e Hd eᵀ falls by 2 s (levels · gradients) - s² (levels Hd levelsᵀ).
template <int64_t kBytes, typename T>
GPTQ_INLINE void fit_scales(const RefinedGroup<T>& group) {
  constexpr int64_t rows = kStripRows<T>;
  const T* levels = group.levels + group.first * rows;
  for (int64_t c = 0; c < group.count; ++c) {  // the changes that the gradient of c has not seen
    pull_within(group, group.changes, c, group.count, c, 1, group.gradients);
  }
  add_damped<kBytes>(group, group.changes, 0, group.count, group.gradients);
  Lanes<kBytes, T> slope[kStripVectors<kBytes, T>] = {}, curvature[kStripVectors<kBytes, T>] = {};
  for (int64_t tile = 0; tile < group.count; tile += kTileColumns) {
    const int64_t end = tile + kTileColumns < group.count ? tile + kTileColumns : group.count;
    for (int64_t i = tile * rows; i < end * rows; ++i) {
      group.changes[i] = 0;
    }
    pull_within(group, levels, 0, group.count, tile, end - tile, group.changes);
    add_damped<kBytes>(group, levels, tile, end, group.changes);
    for (int64_t c = tile; c < end; ++c) {
      for (int64_t v = 0; v < kStripVectors<kBytes, T>; ++v) {
        slope[v] += lanes<kBytes>(levels + c * rows)[v] * lanes<kBytes>(group.gradients + c * rows)[v];
        curvature[v] += lanes<kBytes>(levels + c * rows)[v] * lanes<kBytes>(group.changes + c * rows)[v];
      }
    }
  }
  for (int64_t v = 0; v < kStripVectors<kBytes, T>; ++v) {
    const Lanes<kBytes, T> scale = lanes<kBytes>(group.scales)[v];
    const Lanes<kBytes, T> fitted = half_precision<T>(scale + slope[v] / curvature[v]), step = fitted - scale;
    const Lanes<kBytes, T> change = step * (step * curvature[v] - 2 * slope[v]);
    // False for the NaN of levels that are all 0.
    const auto better = (change < T(0)) & is_scale<T>(fitted);
    const Lanes<kBytes, T> taken = better ? step : Lanes<kBytes, T>{};
    lanes<kBytes>(group.scales)[v] = scale + taken;
    Lanes<kBytes, T> damping = {};
    for (int64_t c = 0; c < group.count; ++c) {
      Lanes<kBytes, T>& error = lanes<kBytes>(group.errors + (group.first + c) * rows)[v];
      const Lanes<kBytes, T> shift = taken * lanes<kBytes>(levels + c * rows)[v];
      damping += group.damping[group.first + c] * shift * (shift - 2 * error);
      error -= shift;
    }
    lanes<kBytes>(group.losses)[v] += (better ? change : Lanes<kBytes, T>{}) - damping;
  }
}

struct Refine {
  template <int64_t kBytes, typename T>
  static GPTQ_INLINE void run(const RefinedGroup<T>* group) {
    add_damped<kBytes>(*group, group->errors + group->first * kStripRows<T>, 0, group->count, group->gradients);
    move_codes<kBytes>(*group);
    if (group->fit_scales) {
      fit_scales<kBytes>(*group);
    }
  }
};

struct SubtractProducts {
  template <int64_t kBytes>
  static GPTQ_INLINE void run(const float* values, const float* factors, const float* rows, int64_t rank, int64_t count,
                              float* out) {
    constexpr int64_t tile = 256;  // columns that stay in the first-level cache
    for (int64_t first = 0; first < count; first += tile) {
      const int64_t last = first + tile < count ? first + tile : count;
      for (int64_t j = first; j < last; ++j) {
        out[j] = values[j];
      }
      for (int64_t i = 0; i < rank; ++i) {
        for (int64_t j = first; j < last; ++j) {
          out[j] -= factors[i] * rows[i * count + j];
        }
      }
    }
  }
};

}  // namespace

void refine_group(const RefinedGroup<float>& group) {
  run_at_best_level<Refine>(&group);
}

void refine_group(const RefinedGroup<double>& group) {
  run_at_best_level<Refine>(&group);
}

void subtract_products(const float* values, const float* factors, const float* rows, int64_t rank, int64_t count,
                       float* out) {
  run_at_best_level<SubtractProducts>(values, factors, rows, rank, count, out);
}

}  // namespace gptq
