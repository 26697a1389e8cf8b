// linear_w4 in portable C++.
#include "cpu/linear_w4_kernel.h"

namespace gptq {
namespace {

// Holds eight products of a code and a digit: at most 8·15·128, or 8·255·128.
template <int B>
struct EightProducts {
  using Type = int16_t;
};
template <>
struct EightProducts<8> {
  using Type = int32_t;
};

struct Scalar {
  struct Int {
    int32_t lane[16];
  };
  struct Float {
    float lane[16];
  };

  static constexpr int rows(int) { return 2; }
  static constexpr int blocks(int, int) { return 1; }

  static uint32_t max_magnitude(const float* x, int64_t vectors) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < 16 * vectors; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, x + i, sizeof(bits));
      bits &= 0x7fffffff;
      if (bits > largest) largest = bits;
    }
    return largest;
  }

  // Adding 128 to every digit makes the digits the bytes of the sum.
  template <int D>
  static void split(const float* x, int64_t atoms, float lift, float ratio, int8_t* digits, int32_t* sums) {
    constexpr int32_t kOffset = D == 1 ? 0x80 : D == 2 ? 0x8080 : 0x808080;
    for (int d = 0; d < D; ++d) sums[d] = 0;
    for (int64_t i = 0; i < kAtomColumns * atoms; ++i) {
      const int32_t value = static_cast<int32_t>(__builtin_lrintf(x[i] * lift * ratio)) + kOffset;
      for (int d = 0; d < D; ++d) {
        const int32_t digit = ((value >> (8 * d)) & 0xff) - 128;
        digits[(i / 8 * D + d) * 8 + i % 8] = static_cast<int8_t>(digit);
        sums[d] += digit;
      }
    }
  }

  template <int B, int R, int C, int D>
  static void dot(Int (&j)[R][C][D], const uint8_t* weights, int64_t, const int8_t* digits, int64_t digit_stride,
                  int64_t atoms) {
    static_assert(C == 1);
    using Sum = typename EightProducts<B>::Type;
    for (int64_t i = 0; i < atoms; ++i) {
      int16_t code[8][16];
      for (int lane = 0; lane < 16; ++lane)
        for (int k = 0; k < 4; ++k) {
          const uint8_t* byte = weights + i * atom_bytes(B) + 4 * lane + k;
          code[k][lane] = B == 8 ? byte[0] : byte[0] & 15;
          code[k + 4][lane] = B == 8 ? byte[64] : byte[0] >> 4;
        }
      for (int r = 0; r < R; ++r)
        for (int d = 0; d < D; ++d) {
          const int8_t* digit = digits + r * digit_stride + (i * D + d) * kAtomColumns;
          Sum sum[16] = {};
          for (int k = 0; k < 8; ++k)
            for (int lane = 0; lane < 16; ++lane) sum[lane] += static_cast<Sum>(code[k][lane] * digit[k]);
          for (int lane = 0; lane < 16; ++lane) j[r][0][d].lane[lane] += sum[lane];
        }
    }
  }

  static float f16_to_f32(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t magnitude = half & 0x7fff;
    uint32_t bits;
    if (magnitude >= 0x7c00) {  // Inf, NaN
      bits = 0x7f800000 | ((magnitude & 0x3ff) << 13);
    } else if (magnitude >= 0x0400) {
      bits = (magnitude << 13) + ((127 - 15) << 23);
    } else {
      const float value = static_cast<float>(magnitude) * 0x1p-24f;
      __builtin_memcpy(&bits, &value, sizeof(bits));
    }
    bits |= sign;
    float value;
    __builtin_memcpy(&value, &bits, sizeof(bits));
    return value;
  }

  static uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    return bits;
  }

  static uint16_t f32_to_f16(float value) {
    const uint32_t sign = bits_of(value) >> 31 << 15, bits = bits_of(value) & 0x7fffffff;
    if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (bits >= bits_of(65520.0f)) return static_cast<uint16_t>(sign | 0x7c00);
    if (bits < bits_of(0x1p-14f))
      return static_cast<uint16_t>(sign | static_cast<uint32_t>(__builtin_lrintf(__builtin_fabsf(value) * 0x1p24f)));
    return static_cast<uint16_t>(sign | ((bits + 0x0fff + ((bits >> 13) & 1) - ((127u - 15) << 23)) >> 13));
  }

  static uint16_t f32_to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    return static_cast<uint16_t>(value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0);
  }

  static float bf16_to_f32(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  }

  template <class Result, class Function>
  static Result each(Function function) {
    Result result;
    for (int lane = 0; lane < 16; ++lane) result.lane[lane] = function(lane);
    return result;
  }

  static Float broadcast(float value) {
    return each<Float>([=](int) { return value; });
  }
  static Int broadcast_int(int32_t value) {
    return each<Int>([=](int) { return value; });
  }
  static Int scale_zero(const Int& zero, int32_t offset) {
    return each<Int>([&](int i) { return zero.lane[i] * offset; });
  }
  static Int shift8_add(const Int& high, const Int& low) {
    return each<Int>([&](int i) { return high.lane[i] * 256 + low.lane[i]; });
  }
  static Float to_float(const Int& a) {
    return each<Float>([&](int i) { return static_cast<float>(a.lane[i]); });
  }
  static Float add(const Float& a, const Float& b) {
    return each<Float>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Float mul(const Float& a, const Float& b) {
    return each<Float>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Float fma(const Float& a, const Float& b, const Float& c) {
    return each<Float>([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static Int load_u8(const uint8_t* from, int64_t count) {
    return each<Int>([=](int i) { return i < count ? from[i] : 0; });
  }
  static Float load_f16(const uint16_t* from, int64_t count) {
    return each<Float>([=](int i) { return i < count ? f16_to_f32(from[i]) : 0.0f; });
  }
  static Float load_bf16(const uint16_t* from, int64_t count) {
    return each<Float>([=](int i) { return i < count ? bf16_to_f32(from[i]) : 0.0f; });
  }
  static void store_f16(uint16_t* to, const Float& value, int64_t count) {
    for (int i = 0; i < count; ++i) to[i] = f32_to_f16(value.lane[i]);
  }
  static void store_bf16(uint16_t* to, const Float& value, int64_t count) {
    for (int i = 0; i < count; ++i) to[i] = f32_to_bf16(value.lane[i]);
  }
  static Float load(const float* from, int64_t count) {
    return each<Float>([=](int i) { return i < count ? from[i] : 0.0f; });
  }
  static void store(float* to, const Float& value, int64_t count) {
    for (int i = 0; i < count; ++i) to[i] = value.lane[i];
  }
};

}  // namespace

const LinearW4Kernel kLinearW4Scalar = {split_entry<Scalar>, multiply_entry<Scalar>};

}  // namespace gptq
