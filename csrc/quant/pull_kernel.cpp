// Compiled with contraction, see CMakeLists.txt: each product and sum becomes one fused operation where the processor
// has it. It sees no torch header, whose inline functions could be kept in a form made for a wide instruction set.
#include "quant/pull_kernel.h"

#include <cstring>

#include "quant/pull_bf16_kernel.h"
#include "quant/pull_tile.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GPTQ_X86_LEVELS 1
#endif

namespace gptq {
namespace {

template <int64_t kBytes, int64_t kVectors, int64_t kColumns>
struct Tile : TileShape<kBytes, kVectors, kColumns> {
  template <typename Vector, typename T>
  static GPTQ_INLINE void multiply_add(Vector& sum, const Vector& column, T m) {
    sum += column * m;
  }

  static GPTQ_INLINE float upper(Bf16Pair pair) { return as_float(pair & 0xffff0000U); }
  static GPTQ_INLINE float lower(Bf16Pair pair) { return as_float(pair << 16); }

  static GPTQ_INLINE void multiply_add(typename VectorOf<float, kBytes>::type& sum,
                                       const typename VectorOf<Bf16Pair, kBytes>::type& column, Bf16Pair m) {
    using Vector = typename VectorOf<float, kBytes>::type;
    sum += reinterpret_cast<Vector>(column & 0xffff0000U) * upper(m);
    sum += reinterpret_cast<Vector>(column << 16) * lower(m);
  }

 private:
  static GPTQ_INLINE float as_float(uint32_t bits) {
    float value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

template <typename From, typename T>
using Pull = void (*)(const From*, int64_t, const From*, int64_t, int64_t, int64_t, T*);

template <typename From, typename T>
void pull_baseline(const From* matrix, int64_t stride, const From* columns, int64_t from, int64_t to, int64_t count,
                   T* targets) {
  pull_all<Tile<16, 4, 2>>(matrix, stride, columns, from, to, count, targets);
}

#ifdef GPTQ_X86_LEVELS
template <typename From, typename T>
__attribute__((target("avx2,fma"))) void pull_avx2(const From* matrix, int64_t stride, const From* columns,
                                                   int64_t from, int64_t to, int64_t count, T* targets) {
  pull_all<Tile<32, 4, 2>>(matrix, stride, columns, from, to, count, targets);
}

template <typename From, typename T>
__attribute__((target("avx512f"))) void pull_avx512(const From* matrix, int64_t stride, const From* columns,
                                                    int64_t from, int64_t to, int64_t count, T* targets) {
  pull_all<Tile<64, 4, kTileColumns>>(matrix, stride, columns, from, to, count, targets);
}
#endif

template <typename From, typename T>
Pull<From, T> choose() {
#ifdef GPTQ_X86_LEVELS
  if (__builtin_cpu_supports("avx512f")) {
    return pull_avx512<From, T>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return pull_avx2<From, T>;
  }
#endif
  return pull_baseline<From, T>;
}

}  // namespace

void pull(const float* matrix, int64_t stride, const float* columns, int64_t from, int64_t to, int64_t count,
          float* targets) {
  static const Pull<float, float> chosen = choose<float, float>();
  chosen(matrix, stride, columns, from, to, count, targets);
}

void pull(const double* matrix, int64_t stride, const double* columns, int64_t from, int64_t to, int64_t count,
          double* targets) {
  static const Pull<double, double> chosen = choose<double, double>();
  chosen(matrix, stride, columns, from, to, count, targets);
}

void pull(const Bf16Pair* matrix, int64_t stride, const Bf16Pair* columns, int64_t from, int64_t to, int64_t count,
          float* targets) {
  static const Pull<Bf16Pair, float> chosen =
      kPullBf16 != nullptr && __builtin_cpu_supports("avx512bf16") ? kPullBf16 : choose<Bf16Pair, float>();
  chosen(matrix, stride, columns, from, to, count, targets);
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
