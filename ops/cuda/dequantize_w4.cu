// The weight in 16 bits, for products of so many tokens that a dense product takes less time.
#include "cuda/linear_w4_kernels.h"

namespace gptq {
namespace {

constexpr int kThreads = 256;
constexpr int kAtomsAtOnce = kThreads / kAtomRows;  // of a block of 16 columns

GPTQ_DEVICE uint32_t rounded_bits(LinearW4Type type, float value) {
  return type == LinearW4Type::kBf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                     : __half_as_ushort(__float2half_rn(value));
}

// A thread for the eight codes of one column in one atom; eight lanes write 128 bytes that lie side by side.
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(LinearW4CudaProblem p, int64_t row_begin, int64_t row_end, uint4* weight, int64_t atom_tiles) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t atoms = (p.k + kAtomColumns - 1) / kAtomColumns;
  const int64_t row = row_begin + blockIdx.x / atom_tiles * kAtomRows + warp % 4 * 4 + lane / 8;
  const int64_t atom = blockIdx.x % atom_tiles * kAtomsAtOnce + warp / 4 * 8 + lane % 8;
  if (row >= row_end || atom >= atoms) return;

  const uint8_t* const from = p.packed + (row / kAtomRows * atoms + atom) * atom_bytes(p.bits) + row % kAtomRows * 4;
  const uint32_t first = __ldg(reinterpret_cast<const uint32_t*>(from));
  const uint32_t second = p.bits == 8 ? __ldg(reinterpret_cast<const uint32_t*>(from + 64)) : 0;
  const uint32_t codes[2] = {p.bits == 8 ? first : nibbles(first, 0), p.bits == 8 ? second : nibbles(first, 1)};
  int64_t column = atom * kAtomColumns, group = column / p.group_size - 1, group_end = column;
  float scale = 0.0f;
  int32_t zero = 0;
  uint32_t values[4] = {};
#pragma unroll
  for (int i = 0; i < kAtomColumns; ++i, ++column) {
    if (column >= p.k) break;
    if (column == group_end) {
      ++group;
      group_end = (group + 1) * p.group_size;
      scale = __half2float(__ushort_as_half(__ldg(p.scales + group * p.n + row)));
      zero = p.zeros != nullptr ? __ldg(p.zeros + group * p.n + row) : middle_code(p.bits);
    }
    const auto code = static_cast<int32_t>(codes[i / 4] >> (8 * (i % 4)) & 0xff);
    values[i / 2] |= rounded_bits(p.type, __fmul_rn(__int2float_rn(code - zero), scale)) << (16 * (i % 2));
  }
  weight[(row - row_begin) * atoms + atom] = {values[0], values[1], values[2], values[3]};
}

__global__ void __launch_bounds__(kThreads) gather_kernel(LinearW4CudaProblem p, void* gathered) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < p.m * p.k) store_rounded(gathered, p.type, at, load_input(p, at / p.k, at % p.k));
}

}  // namespace

cudaError_t dequantize_w4_cuda(const LinearW4CudaProblem& p, int64_t row_begin, int64_t row_end, void* weight,
                               cudaStream_t stream) {
  const int64_t atom_tiles = ceil_div(ceil_div(p.k, kAtomColumns), kAtomsAtOnce);
  const int64_t blocks = ceil_div(row_end - row_begin, kAtomRows) * atom_tiles;
  if (blocks == 0) return cudaSuccess;
  return launch(dequantize_kernel, {static_cast<unsigned>(blocks), kThreads}, stream, p, row_begin, row_end,
                static_cast<uint4*>(weight), atom_tiles);
}

cudaError_t gather_input_cuda(const LinearW4CudaProblem& p, void* gathered, cudaStream_t stream) {
  if (p.m * p.k == 0) return cudaSuccess;
  return launch(gather_kernel, {static_cast<unsigned>(ceil_div(p.m * p.k, kThreads)), kThreads}, stream, p, gathered);
}

}  // namespace gptq
