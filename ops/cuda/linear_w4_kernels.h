// The kernels of one product, and what they share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"
#include "cuda/linear_w4_cuda.h"
#include "cuda/linear_w4_layout.h"
#include "cuda/ptx.h"

namespace gptq {

struct LinearW4CudaWork : LinearW4CudaProblem {
  char* records;     // [token tiles, groups], see linear_w4_layout.h
  float* span_sums;  // [spans, m, n] where spans are dealt out over thread blocks
};

/// Writes the records.
cudaError_t split_linear_w4(const LinearW4CudaWork& work, cudaStream_t stream);
/// y, from the records.
cudaError_t multiply_linear_w4_gemv(const LinearW4CudaWork& work, const LinearW4CudaPlan& plan, cudaStream_t stream);
cudaError_t multiply_linear_w4_gemm(const LinearW4CudaWork& work, const LinearW4CudaPlan& plan, cudaStream_t stream);
/// Dynamic shared memory of the gemv kernel.
size_t gemv_shared_bytes(const LinearW4CudaProblem& p, const LinearW4CudaPlan& plan);

/// What a thread block of the gemm kernel multiplies.
struct GemmTile {
  int tokens, columns;
};
/// The smallest that takes all tokens, or else the largest, of those that fit in a thread block's shared memory.
GemmTile gemm_tile(const LinearW4CudaProblem& p, int shared_bytes);

/// 1.5·2^23. As an integer of the same bits, plus J, it is the bits of the float 1.5·2^23 + J for |J| < 2^22: sums that
/// start there become floats by a subtraction, at the full rate, where a conversion takes four times as long.
inline constexpr float kMagic = 12582912.0f;
inline constexpr int32_t kMagicBits = 0x4b400000;

/// One value of x in float; NaN where the order leads outside.
GPTQ_DEVICE float load_input(const LinearW4Operands& p, int64_t row, int64_t column) {
  if (p.order != nullptr) {
    column = p.order[column];
    if (column < 0 || column >= p.k) return __int_as_float(0x7fc00000);
  }
  const int64_t at = row * p.x_stride + column;
  switch (p.type) {
    case LinearW4Type::kF32:
      return static_cast<const float*>(p.x)[at];
    case LinearW4Type::kBf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p.x)[at]);
    default:
      return __half2float(static_cast<const __half*>(p.x)[at]);
  }
}

/// Rounds a value to the type and stores it as element `at`.
GPTQ_DEVICE void store_rounded(void* to, LinearW4Type type, int64_t at, float value) {
  switch (type) {
    case LinearW4Type::kF32:
      static_cast<float*>(to)[at] = value;
      break;
    case LinearW4Type::kBf16:
      static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(value);
      break;
    default:
      static_cast<__half*>(to)[at] = __float2half_rn(value);
  }
}

GPTQ_DEVICE void store_output(const LinearW4Operands& p, int64_t row, int64_t column, float y) {
  if (p.bias != nullptr) y = __fadd_rn(y, p.bias[column]);
  store_rounded(p.y, p.type, row * p.n + column, y);
}

/// Scale and zero point of a lane's two columns of one block of 16 in one weight group.
struct ColumnParameters {
  uint32_t columns[2];  // f16 bits of the scale, and the zero point above them

  GPTQ_DEVICE void load(const LinearW4Operands& p, int64_t weight_group, int64_t column) {
    for (int i = 0; i < 2; ++i) {
      const int64_t at = weight_group * p.n + column + i;
      columns[i] = 0;
      if (column + i >= p.n) continue;
      columns[i] = __ldg(p.scales + at);
      if (p.zeros != nullptr) columns[i] |= static_cast<uint32_t>(__ldg(p.zeros + at)) << 16;
    }
  }
  GPTQ_DEVICE float scale(int i) const { return __half2float(__ushort_as_half(static_cast<uint16_t>(columns[i]))); }
  /// Without a conversion, as kMagic explains.
  GPTQ_DEVICE float zero(int i) const {
    return __fsub_rn(__int_as_float(kMagicBits + static_cast<int32_t>(columns[i] >> 16)), kMagic);
  }
};

/// Steps 3 and 4 of the arithmetic for a lane's four sums of each digit, which started at kMagicBits.
/// @param record of the sums' tokens and group; its floats are Σ digit if there are zeros, else 1.5·2^23 + middle·Σ
/// digit
template <int D, bool kZeros>
GPTQ_DEVICE void add_group(float (&partial)[4], const int32_t (&sums)[D][4], const char* record,
                           const ColumnParameters& columns, int lane) {
  const float2* const header = reinterpret_cast<const float2*>(record) + lane % 4;  // of the lane's two tokens
  const float2 x_scale = header[0];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float j[D];
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const float2 both = header[(1 + d) * kTileTokens / 2];
      float offset = i % 2 == 0 ? both.x : both.y;
      if constexpr (kZeros) offset = __fmaf_rn(columns.zero(i / 2), offset, kMagic);  // an integer below 2^24
      j[d] = __fsub_rn(__int_as_float(sums[d][i]), offset);                           // exact as well
    }
    float v = j[0];
    if constexpr (D == 2) v = __fmaf_rn(j[0], 0x1p-8f, j[1]);
    if constexpr (D == 3) v = __fmaf_rn(__fmaf_rn(256.0f, j[1], j[0]), 0x1p-16f, j[2]);
    partial[i] = __fmaf_rn(__fmul_rn(v, columns.scale(i / 2)), i % 2 == 0 ? x_scale.x : x_scale.y, partial[i]);
  }
}

/// A lane's codes of 16 columns by four atoms, a byte each.
/// @param staged the block's atoms of the group in shared memory
template <int B>
GPTQ_DEVICE void load_codes(uint32_t (&a)[4], const char* staged, int step, int lane) {
  const char* const atom = staged + 4 * step * atom_bytes(B);
  const int byte = lane_atom(lane) * static_cast<int>(atom_bytes(B)) + lane_byte(lane);
  const uint2 first = *reinterpret_cast<const uint2*>(atom + staged_byte(B, byte));
  if constexpr (B == 8) {
    const uint2 second = *reinterpret_cast<const uint2*>(atom + staged_byte(B, byte + 64));
    a[0] = first.x, a[1] = first.y, a[2] = second.x, a[3] = second.y;
  } else {
    a[0] = nibbles(first.x, 0), a[1] = nibbles(first.y, 0);
    a[2] = nibbles(first.x, 1), a[3] = nibbles(first.y, 1);
  }
}

}  // namespace gptq
