// linear_w4 for AVX-512 with VNNI: vpdpbusd multiplies four columns' codes with four digits in each lane.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12's own AVX-512 header sets off these warnings (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "cpu/linear_w4_kernel.h"

namespace gptq {
namespace {

// Digits of an atom beside each other, as linear_w4.h has it. Digits says how a token's digits of one activation group
// lie: at(), and store(), which takes those of two atoms, digit d of columns 4l .. 4l + 3 in dword 4l + d.
struct InterleavedDigits {
  template <int D>
  static int64_t at(int64_t atom, int digit, int64_t) {
    return (atom * D + digit) * kAtomColumns;
  }

  // Writes more than two atoms, or than the last one; the next ones or the next group overwrite what is behind.
  template <int D>
  static void store(int8_t* digits, int64_t atom, int64_t, __m512i bytes) {
    int8_t* to = digits + atom * D * kAtomColumns;
    if constexpr (D == 1) {
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(_mm512_permutexvar_epi32(order, bytes)));
    } else if constexpr (D == 2) {
      const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 8, 12, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, bytes)));
    } else {
      const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 8, 12, 9, 13, 10, 14, 0, 0, 0, 0);
      _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, bytes));
    }
  }
};

template <class Digits>
struct Avx512vnni {
  using Int = __m512i;
  using Float = __m512;

  static constexpr int rows(int) { return 4; }
  // R·C·D accumulators, at most 24 of the 32 registers; at R = 1 several columns hide the latency.
  static constexpr int blocks(int rows, int digits) { return rows <= 2 || digits == 1 ? 4 : 2; }

  static __mmask16 mask(int64_t count) { return static_cast<__mmask16>(0xffff >> (16 - count)); }

  static uint32_t max_magnitude(const float* x, int64_t vectors) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < vectors; ++i) {
      const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + 16 * i), _mm512_set1_epi32(0x7fffffff));
      largest = _mm512_max_epu32(largest, bits);
    }
    return _mm512_reduce_max_epu32(largest);
  }

  // Adding 128 to every digit makes the digits the bytes of the sum; flipping the top bits takes the 128 off again.
  template <int D>
  static void split(const float* x, int64_t atoms, float lift, float ratio, int8_t* digits, int32_t* sums) {
    const __m512i offset = _mm512_set1_epi32(D == 1 ? 0x80 : D == 2 ? 0x8080 : 0x808080);
    const __m512i by_digit =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < atoms; i += 2) {
      const __m512 lifted = _mm512_mul_ps(_mm512_loadu_ps(x + i * kAtomColumns), _mm512_set1_ps(lift));
      const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(lifted, _mm512_set1_ps(ratio)));
      const __m512i digits_of_value = _mm512_xor_si512(_mm512_add_epi32(value, offset), offset);
      const __m512i bytes = _mm512_shuffle_epi8(digits_of_value, by_digit);
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), bytes);
      Digits::template store<D>(digits, i, atoms, bytes);
    }
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(total), _mm512_extracti64x4_epi64(total, 1));
    const __m128i by_sum = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    __builtin_memcpy(sums, &by_sum, sizeof(int32_t) * D);
  }

  static __m512i broadcast_digits(const int8_t* four) {
    int32_t value;
    __builtin_memcpy(&value, four, sizeof(value));
    return _mm512_set1_epi32(value);
  }

  // Half of an atom's codes as bytes: columns 0..3 of each row, or 4..7.
  template <int B>
  [[gnu::always_inline]] static __m512i load_codes(const uint8_t* atom, int half) {
    if constexpr (B == 8) {
      return _mm512_loadu_si512(atom + 64 * half);
    } else {
      const __m512i codes = _mm512_loadu_si512(atom);
      return _mm512_and_si512(half == 0 ? codes : _mm512_srli_epi32(codes, 4), _mm512_set1_epi32(0x0f0f0f0f));
    }
  }

  // The intrinsic, but for the register of sum: g++ 12 copies sums between registers and spills them.
  [[gnu::always_inline]] static void add_products(__m512i& sum, __m512i codes, __m512i digits) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
  }

  // One half of the atoms after the other, so that half as many registers hold codes.
  template <int B, int R, int C, int D>
  [[gnu::always_inline]] static void dot(Int (&j)[R][C][D], const uint8_t* weights, int64_t block_stride,
                                         const int8_t* digits, int64_t digit_stride, int64_t atoms) {
    for (int64_t i = 0; i < atoms; ++i) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) prefetch_codes<B>(weights + c * block_stride + i * atom_bytes(B));
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512i codes[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) codes[c] = load_codes<B>(weights + c * block_stride + i * atom_bytes(B), half);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
          for (int d = 0; d < D; ++d) {
            const int8_t* digit = digits + r * digit_stride + Digits::template at<D>(i, d, atoms);
            const __m512i four = broadcast_digits(digit + 4 * half);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) add_products(j[r][c][d], codes[c], four);
          }
      }
    }
  }

  static Float broadcast(float value) { return _mm512_set1_ps(value); }
  static Int broadcast_int(int32_t value) { return _mm512_set1_epi32(value); }
  static Int scale_zero(Int zero, int32_t offset) { return _mm512_madd_epi16(zero, _mm512_set1_epi32(offset)); }
  static Int shift8_add(Int high, Int low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
  static Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Int load_u8(const uint8_t* from, int64_t count) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask(count), from));
  }
  static Float load_f16(const uint16_t* from, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(count), from));
  }
  static Float load_bf16(const uint16_t* from, int64_t count) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(count), from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static void store_f16(uint16_t* to, Float value, int64_t count) {
    _mm256_mask_storeu_epi16(to, mask(count), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_bf16(uint16_t* to, Float value, int64_t count) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(to, mask(count), _mm512_cvtepi32_epi16(result));
  }
  static Float load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(mask(count), from); }
  static void store(float* to, Float value, int64_t count) { _mm512_mask_storeu_ps(to, mask(count), value); }
};

}  // namespace

}  // namespace gptq
