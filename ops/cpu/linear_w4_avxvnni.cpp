// linear_w4 for AVX-VNNI: AVX2 with the 32-bit sums of vpdpbusd.
#include "cpu/linear_w4_avx2.h"

namespace gptq {
namespace {

struct AvxVnni : Avx2 {
  template <int B>
  [[gnu::always_inline]] static __m256i load_codes(const uint8_t* atom, int nibble, int half) {
    if constexpr (B == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(atom + 64 * half));
    return Avx2::load_codes<B>(atom, nibble, half);
  }

  // The intrinsic, but for the register of sum: g++ 12 copies sums between registers and spills them.
  [[gnu::always_inline]] static void add_products(__m256i& sum, __m256i codes, __m256i digits) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(digits));
  }

  template <int B, int R, int C, int D>
  [[gnu::always_inline]] static void dot(Int (&j)[R][C][D], const uint8_t* weights, int64_t, const int8_t* digits,
                                         int64_t digit_stride, int64_t atoms) {
    static_assert(C == 1);
    for (int64_t i = 0; i < atoms; ++i) {
      const uint8_t* atom = weights + i * atom_bytes(B);
      prefetch_codes<B>(atom);
      add_atom<AvxVnni, B, false>(j, atom, 0, digits + i * D * kAtomColumns, digit_stride);
    }
  }
};

}  // namespace

const LinearW4Kernel kLinearW4AvxVnni = {split_entry<AvxVnni>, multiply_entry<AvxVnni>};

}  // namespace gptq
