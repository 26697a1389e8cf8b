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
template <typename T>
GPTQ_INLINE void add_damped(const RefinedGroup<T>& group, const T* columns, int64_t tile, int64_t end, T* sums) {
  for (int64_t c = tile; c < end; ++c) {
    const T damping = group.damping[group.first + c];
    for (int64_t v = 0; v < kStripVectors<T>; ++v) {
      lanes(sums + c * kStripRows<T>)[v] += lanes(columns + c * kStripRows<T>)[v] * damping;
    }
  }
}

// With the error off by d, e Hd eᵀ grows by d (2 gradient + d Hd_kk), and its damping's part by that of H.
template <typename T>
GPTQ_INLINE void move_code(const RefinedGroup<T>& group, int64_t column) {
  constexpr int64_t rows = kStripRows<T>;
  const int64_t k = group.first + column;
  const T curvature = group.hessian[k * group.n_columns + k], damping = group.damping[k];
  const T inverse = T(1) / (curvature + damping);
  for (int64_t v = 0; v < kStripVectors<T>; ++v) {
    const Lanes<T> scale = lanes(group.scales)[v], zero = lanes(group.zeros)[v];
    const Lanes<T> gradient = lanes(group.gradients + column * rows)[v];
    Lanes<T>& level = lanes(group.levels + k * rows)[v];
    Lanes<T>& error = lanes(group.errors + k * rows)[v];
    const Lanes<T> best = level * scale + gradient * inverse;
    const Lanes<T> moved = nearest_level<T>(best, scale, zero, group.max_code);
    const Lanes<T> change = (level - moved) * scale;
    lanes(group.losses)[v] += change * (2 * (gradient - damping * error) + change * curvature);
    lanes(group.changes + column * rows)[v] = change;
    error += change;
    level = moved;
  }
}

template <typename T>
GPTQ_INLINE void move_codes(const RefinedGroup<T>& group) {
  for (int64_t tile = 0; tile < group.count; tile += kTileColumns) {
    const int64_t end = tile + kTileColumns < group.count ? tile + kTileColumns : group.count;
    pull_within(group, group.changes, 0, tile, tile, end - tile, group.gradients);
    for (int64_t c = tile; c < end; ++c) {
      pull_within(group, group.changes, tile, c, c, 1, group.gradients);
      move_code(group, c);
    }
  }
}

// With the errors off by -s · levels, e Hd eᵀ falls by 2 s (levels · gradients) - s² (levels Hd levelsᵀ).
template <typename T>
GPTQ_INLINE void fit_scales(const RefinedGroup<T>& group) {
  constexpr int64_t rows = kStripRows<T>;
  const T* levels = group.levels + group.first * rows;
  for (int64_t c = 0; c < group.count; ++c) {  // the changes that the gradient of c has not seen
    pull_within(group, group.changes, c, group.count, c, 1, group.gradients);
  }
  add_damped(group, group.changes, 0, group.count, group.gradients);
  Lanes<T> slope[kStripVectors<T>] = {}, curvature[kStripVectors<T>] = {};
  for (int64_t tile = 0; tile < group.count; tile += kTileColumns) {
    const int64_t end = tile + kTileColumns < group.count ? tile + kTileColumns : group.count;
    for (int64_t i = tile * rows; i < end * rows; ++i) {
      group.changes[i] = 0;
    }
    pull_within(group, levels, 0, group.count, tile, end - tile, group.changes);
    add_damped(group, levels, tile, end, group.changes);
    for (int64_t c = tile; c < end; ++c) {
      for (int64_t v = 0; v < kStripVectors<T>; ++v) {
        slope[v] += lanes(levels + c * rows)[v] * lanes(group.gradients + c * rows)[v];
        curvature[v] += lanes(levels + c * rows)[v] * lanes(group.changes + c * rows)[v];
      }
    }
  }
  for (int64_t v = 0; v < kStripVectors<T>; ++v) {
    const Lanes<T> scale = lanes(group.scales)[v];
    const Lanes<T> fitted = half_precision<T>(scale + slope[v] / curvature[v]), step = fitted - scale;
    const Lanes<T> change = step * (step * curvature[v] - 2 * slope[v]);
    // False for the NaN of levels that are all 0.
    const auto better = (change < T(0)) & is_scale<T>(fitted);
    const Lanes<T> taken = better ? step : Lanes<T>{};
    lanes(group.scales)[v] = scale + taken;
    Lanes<T> damping = {};
    for (int64_t c = 0; c < group.count; ++c) {
      Lanes<T>& error = lanes(group.errors + (group.first + c) * rows)[v];
      const Lanes<T> shift = taken * lanes(levels + c * rows)[v];
      damping += group.damping[group.first + c] * shift * (shift - 2 * error);
      error -= shift;
    }
    lanes(group.losses)[v] += (better ? change : Lanes<T>{}) - damping;
  }
}

template <typename T>
GPTQ_INLINE void refine(const RefinedGroup<T>& group) {
  add_damped(group, group.errors + group.first * kStripRows<T>, 0, group.count, group.gradients);
  move_codes(group);
  if (group.fit_scales) {
    fit_scales(group);
  }
}

}  // namespace

GPTQ_CLONES void refine_group(const RefinedGroup<float>& group) {
  refine(group);
}

GPTQ_CLONES void refine_group(const RefinedGroup<double>& group) {
  refine(group);
}

GPTQ_CLONES void subtract_products(const float* values, const float* factors, const float* rows, int64_t rank,
                                   int64_t count, float* out) {
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

}  // namespace gptq
