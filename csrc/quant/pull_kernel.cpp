// Compiled with contraction, see CMakeLists.txt: each product and sum becomes one fused operation where the processor
// has it. It sees no torch header, whose inline functions could be kept in a form made for a wide instruction set.
#include "quant/pull_kernel.h"

#include <cstring>
#include <type_traits>

#include "quant/pull_bf16_kernel.h"
#include "quant/pull_tile.h"

namespace gptq {
namespace {

// Sums side by side, as the registers of a level allow.
constexpr int64_t columns_of(int64_t bytes) {
  return bytes == 64 ? kTileColumns : bytes == 32 ? 3 : 2;
}

template <int64_t kBytes>
struct Tile : TileShape<kBytes, 4, columns_of(kBytes)> {
  template <typename Vector, typename T>
  static GPTQ_INLINE void multiply_add(Vector& sum, const Vector& column, T m) {
    sum += column * m;
  }
};

// upper[i * step] and lower[i * step] = the two values of pairs[i] for i in [0, count).
GPTQ_INLINE void unpack_pairs(const Bf16Pair* pairs, int64_t count, int64_t step, float* upper, float* lower) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits[2] = {pairs[i] & 0xffff0000U, pairs[i] << 16};
    std::memcpy(upper + i * step, bits, sizeof(float));
    std::memcpy(lower + i * step, bits + 1, sizeof(float));
  }
}

// Pairs are made float32 a panel at a time: each is used as often as the matrix, or the strip, has rows.
template <typename Shape>
GPTQ_INLINE void pull_pairs(const Bf16Pair* matrix, int64_t stride, const Bf16Pair* columns, int64_t from, int64_t to,
                            int64_t count, float* targets) {
  constexpr int64_t rows = kStripRows<float>, pairs = kPanel / 2, together = 8 * Shape::kColumns;
  alignas(64) float panel[kPanel * rows];
  float part[together * kPanel];
  for (int64_t j = from; j < to; j += pairs) {
    const int64_t width = to - j < pairs ? to - j : pairs;
    for (int64_t i = 0; i < width; ++i) {
      unpack_pairs(columns + (j + i) * rows, rows, 1, panel + 2 * i * rows, panel + (2 * i + 1) * rows);
    }
    for (int64_t c = 0; c < count; c += together) {
      const int64_t left = count - c < together ? count - c : together;
      for (int64_t i = 0; i < left; ++i) {
        unpack_pairs(matrix + (c + i) * stride + j, width, 2, part + i * kPanel, part + i * kPanel + 1);
      }
      pull_all<Shape>(part, kPanel, panel, 0, 2 * width, left, targets + c * rows);
    }
  }
}

struct Pull {
  template <int64_t kBytes, typename From, typename T>
  static GPTQ_INLINE void run(const From* matrix, int64_t stride, const From* columns, int64_t from, int64_t to,
                              int64_t count, T* targets) {
    if constexpr (std::is_same_v<From, T>) {
      pull_all<Tile<kBytes>>(matrix, stride, columns, from, to, count, targets);
    } else {
      pull_pairs<Tile<kBytes>>(matrix, stride, columns, from, to, count, targets);
    }
  }
};

bool has_bf16() {
#ifdef GPTQ_X86_LEVELS
  return kPullBf16 != nullptr && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

void pull(const float* matrix, int64_t stride, const float* columns, int64_t from, int64_t to, int64_t count,
          float* targets) {
  run_at_best_level<Pull>(matrix, stride, columns, from, to, count, targets);
}

void pull(const double* matrix, int64_t stride, const double* columns, int64_t from, int64_t to, int64_t count,
          double* targets) {
  run_at_best_level<Pull>(matrix, stride, columns, from, to, count, targets);
}

void pull(const Bf16Pair* matrix, int64_t stride, const Bf16Pair* columns, int64_t from, int64_t to, int64_t count,
          float* targets) {
  static const bool in_hardware = has_bf16();
  if (in_hardware) {
    return kPullBf16(matrix, stride, columns, from, to, count, targets);
  }
  run_at_best_level<Pull>(matrix, stride, columns, from, to, count, targets);
}

void round_to_pairs(const float* first, const float* second, int64_t count, int64_t step, Bf16Pair* pairs) {
  const auto rounded = [](float value) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits + 0x7fffU + ((bits >> 16) & 1U);
  };
  for (int64_t i = 0; i < count; ++i) {
    pairs[i] = (rounded(first[i * step]) & 0xffff0000U) | (rounded(second[i * step]) >> 16);
  }
}

}  // namespace gptq
