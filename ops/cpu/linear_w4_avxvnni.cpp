// linear_w4 for AVX-VNNI: AVX2 with the 32-bit sums of vpdpbusd.
#include "cpu/linear_w4_avx2.h"

namespace gptq {
namespace {

struct AvxVnni : Avx2 {
  static constexpr int rows(int) { return 4; }  // with three digits, 12 of the 16 registers

  // One half of the lanes at a time, or both where the registers are enough: then each digit is loaded once.
  template <int B, int R, int C, int D>
  [[gnu::always_inline]] static void dot(Int (&j)[R][C][D], const uint8_t* weights, int64_t, const int8_t* digits,
                                         int64_t digit_stride, int64_t atoms) {
    static_assert(C == 1);
    constexpr int kTogether = R * D <= 4 ? 2 : 1;
    for (int h = 0; h < 2; h += kTogether)
      dot_halves<B, R, D, kTogether>(j, h, weights + 32 * h, digits, digit_stride, atoms);
  }

 private:
  template <int B>
  [[gnu::always_inline]] static void load_codes(const uint8_t* atom, __m256i& first, __m256i& second) {
    if constexpr (B == 8) {
      first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(atom));
      second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(atom + 64));
    } else {
      load_nibbles<B>(atom, 0, first, second);
    }
  }

  template <int B, int R, int D, int H>
  [[gnu::always_inline]] static void dot_halves(Int (&j)[R][1][D], int first, const uint8_t* weights,
                                                const int8_t* digits, int64_t digit_stride, int64_t atoms) {
    __m256i sums[R][D][H];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
      for (int d = 0; d < D; ++d)
#pragma GCC unroll 2
        for (int h = 0; h < H; ++h) sums[r][d][h] = j[r][0][d].half[first + h];
    for (int64_t i = 0; i < atoms; ++i) {
      __m256i low[H], high[H];
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) load_codes<B>(weights + i * atom_bytes(B) + 32 * h, low[h], high[h]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) {
          const int8_t* digit = digits + r * digit_stride + (i * D + d) * kAtomColumns;
          const __m256i four = broadcast_digits(digit), next = broadcast_digits(digit + 4);
#pragma GCC unroll 2
          for (int h = 0; h < H; ++h) {
            sums[r][d][h] = _mm256_dpbusd_avx_epi32(sums[r][d][h], low[h], four);
            sums[r][d][h] = _mm256_dpbusd_avx_epi32(sums[r][d][h], high[h], next);
          }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
      for (int d = 0; d < D; ++d)
#pragma GCC unroll 2
        for (int h = 0; h < H; ++h) j[r][0][d].half[first + h] = sums[r][d][h];
  }
};

}  // namespace

const LinearW4Kernel kLinearW4AvxVnni = {split_entry<AvxVnni>, multiply_entry<AvxVnni>};

}  // namespace gptq
