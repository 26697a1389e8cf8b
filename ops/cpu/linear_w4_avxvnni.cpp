// linear_w4 for AVX-VNNI: AVX2 with the 32-bit sums of vpdpbusd.
#include "cpu/linear_w4_avx2.h"

namespace gptq {
namespace {

struct AvxVnni : Avx2 {
  static constexpr int rows(int digits) { return 6 / digits; }  // 12 of the 16 registers

  // One half of the atoms after the other, so that half as many registers hold codes.
  template <int B, int R, int C, int D>
  [[gnu::always_inline]] static void dot(Int (&j)[R][C][D], const uint8_t* weights, int64_t, const int8_t* digits,
                                         int64_t digit_stride, int64_t atoms) {
    static_assert(C == 1);
    for (int64_t i = 0; i < atoms; ++i) {
      prefetch_codes<B>(weights + i * atom_bytes(B));
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const uint8_t* atom = weights + i * atom_bytes(B);
        const __m256i first = load_codes<B>(atom, half), second = load_codes<B>(atom + 32, half);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
          for (int d = 0; d < D; ++d) {
            const int8_t* digit = digits + r * digit_stride + (i * D + d) * kAtomColumns;
            const __m256i four = broadcast_digits(digit + 4 * half);
            add_products(j[r][0][d].half[0], first, four);
            add_products(j[r][0][d].half[1], second, four);
          }
      }
    }
  }

 private:
  template <int B>
  [[gnu::always_inline]] static __m256i load_codes(const uint8_t* atom, int half) {
    if constexpr (B == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(atom + 64 * half));
    return load_nibble<B>(atom, 0, half);
  }

  // The intrinsic, but for the register of sum: g++ 12 copies sums between registers and spills them.
  [[gnu::always_inline]] static void add_products(__m256i& sum, __m256i codes, __m256i digits) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(digits));
  }
};

}  // namespace

const LinearW4Kernel kLinearW4AvxVnni = {split_entry<AvxVnni>, multiply_entry<AvxVnni>};

}  // namespace gptq
