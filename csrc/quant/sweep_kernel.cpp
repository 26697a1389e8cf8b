#include "quant/sweep_kernel.h"

#include "quant/lanes.h"

namespace gptq {
namespace {

template <int64_t kBytes, typename T>
GPTQ_INLINE void quantize_column(const SweepStrip<T>& strip, int64_t k, const T* targets) {
  constexpr int64_t rows = kStripRows<T>;
  const int64_t column = strip.order[k], group = column / strip.group_size;
  const T* scales = strip.scales + group * rows;
  const T* zeros = strip.zeros + group * rows;
  const T pivot = strip.pivots[k], damping = strip.damping[k];
  for (int64_t v = 0; v < kStripVectors<kBytes, T>; ++v) {
    const Lanes<kBytes, T> scale = lanes<kBytes>(scales)[v], zero = lanes<kBytes>(zeros)[v],
                           target = lanes<kBytes>(targets)[v];
    const Lanes<kBytes, T> level = nearest_level<T>(target, scale, zero, strip.max_code);
    const Lanes<kBytes, T> value = level * scale;
    const Lanes<kBytes, T> error = lanes<kBytes>(strip.weights + column * rows)[v] - value, rounding = target - value;
    lanes<kBytes>(strip.losses)[v] += pivot * rounding * rounding - damping * error * error;
    lanes<kBytes>(strip.errors + k * rows)[v] = error;
    code_lanes<kBytes, T>(strip.codes + column * rows)[v] = __builtin_convertvector(level + zero, CodeLanes<kBytes, T>);
  }
}

struct Sweep {
  template <int64_t kBytes, typename T>
  static GPTQ_INLINE void run(const SweepStrip<T>* strip, int64_t first, int64_t count, T* targets) {
    const auto pull_block = [&](int64_t from, int64_t to, int64_t column, int64_t columns) {
      pull(strip->multipliers + column * strip->n_columns, strip->n_columns, strip->errors, from, to, columns,
           targets + (column - first) * kStripRows<T>);
    };
    for (int64_t tile = first; tile < first + count; tile += kTileColumns) {
      const int64_t end = tile + kTileColumns < first + count ? tile + kTileColumns : first + count;
      pull_block(first, tile, tile, end - tile);
      for (int64_t k = tile; k < end; ++k) {
        pull_block(tile, k, k, 1);
        quantize_column<kBytes>(*strip, k, targets + (k - first) * kStripRows<T>);
      }
    }
  }
};

}  // namespace

void sweep_block(const SweepStrip<float>& strip, int64_t first, int64_t count, float* targets) {
  run_at_best_level<Sweep>(&strip, first, count, targets);
}

void sweep_block(const SweepStrip<double>& strip, int64_t first, int64_t count, double* targets) {
  run_at_best_level<Sweep>(&strip, first, count, targets);
}

}  // namespace gptq
