// Step 2 of the arithmetic of linear_w4.h: activations to digits, a warp for each token and group.
#include "cuda/linear_w4_kernels.h"

namespace gptq {
namespace {

constexpr int kWarps = 4;

template <int D>
__global__ void __launch_bounds__(32 * kWarps) split_kernel(LinearW4CudaWork p, int64_t groups) {
  constexpr int32_t kOffset = D == 1 ? 0x80 : D == 2 ? 0x8080 : 0x808080;
  constexpr float kRange = D == 1 ? 127.0f : D == 2 ? 32512.0f : 8323072.0f;
  let_next_kernel_begin();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (task >= p.m * groups) return;
  const int64_t row = task / groups, group = task % groups;
  const GroupCursor cursor = GroupCursor::at(p.k, p.group_size, group);
  const int64_t first = cursor.first_atom() * kAtomColumns, end = cursor.end();

  float x[kGroupSteps];
  uint32_t largest = 0;
#pragma unroll
  for (int step = 0; step < kGroupSteps; ++step) {
    const int64_t column = first + 32 * step + lane;
    x[step] = column >= cursor.begin && column < end ? load_input(p, row, column) : 0.0f;
    largest = max(largest, __float_as_uint(x[step]) & 0x7fffffffu);
  }
  largest = __reduce_max_sync(0xffffffffu, largest);
  const bool usable = largest != 0 && largest < 0x7f800000u;
  const float magnitude = __uint_as_float(largest), lift = magnitude < 0x1p-64f ? 0x1p80f : 1.0f;
  const float ratio = __fdiv_rn(kRange, __fmul_rn(magnitude, lift));

  char* const record = p.records + record_byte(row / kTileTokens, groups, group, D);
  char* const digits = record + record_header_bytes(D) + row % kTileTokens * 32;
  int32_t sums[D] = {};
#pragma unroll
  for (int step = 0; step < kGroupSteps; ++step) {
    if (step >= cursor.steps()) break;
    const int32_t value = usable ? __float2int_rn(__fmul_rn(__fmul_rn(x[step], lift), ratio)) : 0;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const int32_t digit = (((value + kOffset) >> (8 * d)) & 0xff) - 128;
      digits[(step * D + d) * kRowBytes + lane] = static_cast<char>(digit);
      sums[d] += digit;
    }
  }
  float* const header = reinterpret_cast<float*>(record) + row % kTileTokens;
#pragma unroll
  for (int d = 0; d < D; ++d) {
    const int32_t sum = __reduce_add_sync(0xffffffffu, sums[d]);
    const float offset =
        p.zeros != nullptr ? __int2float_rn(sum) : __int_as_float(kMagicBits + middle_code(p.bits) * sum);
    if (lane == 0) header[(1 + d) * kTileTokens] = offset;
  }
  if (lane == 0) header[0] = usable ? __fdiv_rn(magnitude, 127.0f) : largest == 0 ? 0.0f : __int_as_float(0x7fc00000);
}

}  // namespace

cudaError_t split_linear_w4(const LinearW4CudaWork& work, cudaStream_t stream) {
  const int64_t groups = group_total(work.k, work.group_size);
  if (groups == 0) return cudaSuccess;
  const LaunchShape shape = {static_cast<unsigned>(ceil_div(work.m * groups, kWarps)), 32 * kWarps};
  if (work.digits == 1) return launch(split_kernel<1>, shape, stream, work, groups);
  if (work.digits == 2) return launch(split_kernel<2>, shape, stream, work, groups);
  return launch(split_kernel<3>, shape, stream, work, groups);
}

}  // namespace gptq
