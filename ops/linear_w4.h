// The arithmetic of gptq::linear_w4 and linear_w8, and the interface between the operators and their kernels. No torch
// here: kernels are compiled without it.
//
// Every kernel, on every instruction set and device, for every split over threads, rows and columns, computes these
// bits (the payload of a NaN aside). Float operations are IEEE binary32, rounded to nearest even, denormals kept.
//
// 1. Activation groups. Each weight group's columns are cut, from its first, into activation groups of 128 columns;
//    the last one of a weight group may be shorter.
// 2. Splitting. For one token and one activation group let a = max|x| and D the number of digits.
//      s_x = a / 127
//      t = 2^80 if a < 2^-64, else 1            (keeps the next line finite; x·t is exact)
//      r = (127·256^(D-1)) / (a·t)
//      X = round_to_nearest_even((x·t)·r)        (an integer, |X| <= 127·256^(D-1) + 1)
//      X = Σ_d 256^d · digit_d(x), digit_d in -128..127, the only such digits
//    so that x ≈ s_x · X / 256^(D-1). A group of zeros has s_x = 0 and X = 0; one that holds a NaN or an infinity has
//    s_x = NaN and X = 0.
// 3. Products, exact in i32: J_d = Σ_k q·digit_d - z·Σ_k digit_d, |J_d| <= 128·255·128 < 2^22.
//      D = 1: v = float(J_0)
//      D = 2: v = fma(float(J_0), 2^-8, float(J_1))
//      D = 3: v = fma(float(256·J_1 + J_0), 2^-16, float(J_2))
// 4. Sums. A span is the activation groups that begin in one range of 1,024 columns [1024·i, 1024·(i+1)).
//      p = +0; for the activation groups of the span in order: p = fma(v·s_w, s_x, p)
//      y = +0; for the spans in order: y = y + p; then y = y + bias where there is one
//    (v·s_w)·s_x and not (v·s_x)·s_w: the first product lies within 2^-40 .. 2^38, so that neither the largest nor the
//    smallest inputs overflow or underflow where the result does not.
#pragma once

#include <stdint.h>

namespace gptq {

inline constexpr int64_t kAtomColumns = 8;  // k
inline constexpr int64_t kAtomRows = 16;    // n
/// a / b, rounded up.
template <typename Size>
constexpr Size ceil_div(Size a, int64_t b) {
  return (a + (b - 1)) / b;
}

/// Bytes of an atom of codes of 4 or 8 bits.
constexpr int64_t atom_bytes(int bits) {
  return kAtomRows * kAtomColumns * bits / 8;
}
/// The zero point where none are stored.
constexpr int32_t middle_code(int bits) {
  return 1 << (bits - 1);
}

inline constexpr int64_t kActivationGroup = 128;
inline constexpr int64_t kSpan = 1024;

/// One activation group. Its digits are stored for whole atoms, zero outside [begin, end): where a group boundary
/// cuts through an atom, both groups read that atom, each with its own digits.
struct LinearW4Group {
  int64_t begin;         // first column
  int64_t end;           // one past the last column
  int64_t weight_group;  // row of scales and zeros
  int64_t first_atom;    // of the packed weight
  int64_t atoms;
  int64_t digit_atom;  // first atom of the token's digits
  bool ends_span;
};

/// Digits are stored, and may be read, for a multiple of kDigitRows tokens if there are more than kUntiledRows.
inline constexpr int64_t kDigitRows = 16;
inline constexpr int64_t kUntiledRows = 4;

/// What x and y hold. 16-bit values are widened before and rounded, to nearest even, after the arithmetic above.
enum class LinearW4Type : uint8_t { kF32, kBf16, kF16 };

/// One product, as plain pointers to the host or the device. Nothing needs to be aligned beyond its element type.
struct LinearW4Operands {
  int64_t m, n, k;
  int bits;                // of a code: 4, or 8
  int digits;              // 1, 2 or 3
  LinearW4Type type;       // of x and y
  const void* x;           // [m][x_stride], of which k are read
  int64_t x_stride;        // elements
  const int32_t* order;    // [k], or null: column i of the product is column order[i] of x
  const uint8_t* packed;   // [ceil(n/16), ceil(k/8), atom_bytes(bits)], see pack_w4 and pack_w8
  const uint16_t* scales;  // f16 bits [weight groups, n]
  const uint8_t* zeros;    // [weight groups, n], or null: middle_code(bits) everywhere
  const float* bias;       // [n] or null
  void* y;                 // [m, n]
};

/// What the CPU kernels work on.
struct LinearW4Problem : LinearW4Operands {
  const LinearW4Group* groups;
  int64_t n_groups;

  // Written by split, read by multiply.
  int8_t* x_digits;      // [m][digit_stride]; a token is [digit atoms][digits][8], unless a kernel has another layout
  int64_t digit_stride;  // bytes, at least 64 more than a token holds, which split may overwrite
  float* x_scales;       // [m, n_groups]: s_x
  int32_t* x_offsets;    // [m, n_groups, digits]: sum of each digit over the group, times -middle_code, or -1 if zeros;
                         // where a kernel makes two digits one number, that number's sum and then the next one's
};

/// The two steps of one instruction set. Rows are tokens; a block is 16 columns of y.
struct LinearW4Kernel {
  void (*split)(const LinearW4Problem& p, int64_t row_begin, int64_t row_end);
  void (*multiply)(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block_begin,
                   int64_t block_end);
  int64_t row_chunk = 32;  // rows to multiply at once: their digits stay in cache while the weights pass
};

extern const LinearW4Kernel kLinearW4Scalar;
extern const LinearW4Kernel kLinearW4Avx2;
extern const LinearW4Kernel kLinearW4AvxVnni;
extern const LinearW4Kernel kLinearW4Avx512vnni;
extern const LinearW4Kernel kLinearW4Amx;

}  // namespace gptq
