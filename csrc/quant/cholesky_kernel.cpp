#include "quant/cholesky_kernel.h"

#include "quant/lanes.h"

namespace gptq {
namespace {

// Subtracts what columns [from, to) of the panel contribute to columns [column, column + count).
template <typename T>
GPTQ_INLINE void subtract_columns(const CholeskyPanel<T>& panel, int64_t from, int64_t to, int64_t column,
                                  int64_t count) {
  pull(panel.lower + column * panel.n_columns, panel.n_columns, panel.strip, from, to, count,
       panel.strip + column * kStripRows<T>);
}

struct FactorCorner {
  template <int64_t kBytes, typename T>
  static GPTQ_INLINE bool run(const CholeskyPanel<T>* panel) {
    constexpr int64_t rows = kStripRows<T>;
    for (int64_t c = 0; c < panel->width; ++c) {
      const int64_t k = panel->first + c;
      subtract_columns(*panel, panel->first, k, k, 1);
      T* column = panel->strip + k * rows;
      const T pivot = column[c];
      if (!(pivot > T(0)) || pivot - pivot != T(0)) {
        return false;
      }
      const T root = sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(static_cast<float>(pivot)))
                                    : static_cast<T>(__builtin_sqrt(static_cast<double>(pivot)));
      for (int64_t r = 0; r < rows; ++r) {
        const T value = r < c ? T(0) : column[r] / root;
        column[r] = -value;
        if (r < panel->width) {
          panel->lower[(panel->first + r) * panel->n_columns + k] = value;
        }
      }
    }
    return true;
  }
};

struct SolvePanel {
  template <int64_t kBytes, typename T>
  static GPTQ_INLINE void run(const CholeskyPanel<T>* panel) {
    const int64_t last = panel->first + panel->width;
    for (int64_t tile = panel->first; tile < last; tile += kTileColumns) {
      const int64_t end = tile + kTileColumns < last ? tile + kTileColumns : last;
      subtract_columns(*panel, panel->first, tile, tile, end - tile);
      for (int64_t k = tile; k < end; ++k) {
        subtract_columns(*panel, tile, k, k, 1);
        const T root = panel->lower[k * panel->n_columns + k];
        for (int64_t v = 0; v < kStripVectors<kBytes, T>; ++v) {
          Lanes<kBytes, T>& values = lanes<kBytes>(panel->strip + k * kStripRows<T>)[v];
          values = -(values / root);
        }
      }
    }
  }
};

}  // namespace

bool factor_corner(const CholeskyPanel<float>& panel) {
  return run_at_best_level<FactorCorner>(&panel);
}

bool factor_corner(const CholeskyPanel<double>& panel) {
  return run_at_best_level<FactorCorner>(&panel);
}

void solve_panel(const CholeskyPanel<float>& panel) {
  run_at_best_level<SolvePanel>(&panel);
}

void solve_panel(const CholeskyPanel<double>& panel) {
  run_at_best_level<SolvePanel>(&panel);
}

}  // namespace gptq
