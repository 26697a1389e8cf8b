// linear_w4 by int8 tensor cores: the digits of linear_w4.h times the codes, so that the bits are those of every CPU
// kernel. A split kernel writes the digits; a multiply kernel gives each warp 16 or 32 columns of y and 8 to 32 tokens,
// and runs through the weight once, a group of 128 columns ahead. Where columns and tokens do not fill the device, the
// spans of k are dealt out too, and a last kernel adds them up in order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"
#include "cuda/linear_w4_cuda.h"
#include "cuda/linear_w4_layout.h"
#include "cuda/ptx.h"

namespace gptq {
namespace {

constexpr int kWarps = 4;
constexpr int kTileTokens = 8;
constexpr int kSteps = (kGroupAtoms + 3) / 4;  // of four atoms

__device__ float load_input(const LinearW4CudaProblem& p, int64_t row, int64_t column) {
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

__device__ void store_output(const LinearW4CudaProblem& p, int64_t row, int64_t column, float y) {
  if (p.bias != nullptr) y = __fadd_rn(y, p.bias[column]);
  const int64_t at = row * p.n + column;
  switch (p.type) {
    case LinearW4Type::kF32:
      static_cast<float*>(p.y)[at] = y;
      break;
    case LinearW4Type::kBf16:
      static_cast<__nv_bfloat16*>(p.y)[at] = __float2bfloat16_rn(y);
      break;
    default:
      static_cast<__half*>(p.y)[at] = __float2half_rn(y);
  }
}

// Step 2 of the arithmetic: a warp for each token and group.
template <int D>
__global__ void split_kernel(LinearW4CudaProblem p, int64_t row_begin, int64_t groups) {
  constexpr int kSlots = kGroupDigitBytes, kRounds = (kSlots + 31) / 32;
  constexpr int32_t kOffset = D == 1 ? 0x80 : D == 2 ? 0x8080 : 0x808080;
  constexpr float kRange = D == 1 ? 127.0f : D == 2 ? 32512.0f : 8323072.0f;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = row_begin + blockIdx.y;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (group >= groups) return;
  const int64_t per_weight_group = (p.group_size + kActivationGroup - 1) / kActivationGroup;
  const GroupCursor cursor(p.k, p.group_size,
                           group / per_weight_group * p.group_size + group % per_weight_group * kActivationGroup);
  const int64_t first = cursor.first_atom() * kAtomColumns, end = cursor.end();

  float x[kRounds];
  uint32_t largest = 0;
  for (int i = 0; i < kRounds; ++i) {
    const int64_t column = first + 32 * i + lane;
    x[i] = column >= cursor.begin && column < end ? load_input(p, row, column) : 0.0f;
    largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
  }
  largest = __reduce_max_sync(0xffffffffu, largest);
  const bool usable = largest != 0 && largest < 0x7f800000u;
  const float magnitude = __uint_as_float(largest), lift = magnitude < 0x1p-64f ? 0x1p80f : 1.0f;
  const float ratio = __fdiv_rn(kRange, __fmul_rn(magnitude, lift));
  int8_t* digits = p.x_digits + (row * groups + group) * D * kGroupDigitBytes;
  int32_t sums[D] = {};
  for (int i = 0; i < kRounds; ++i) {
    const int slot = 32 * i + lane;
    const int32_t value = usable ? __float2int_rn(__fmul_rn(__fmul_rn(x[i], lift), ratio)) : 0;
    for (int d = 0; d < D; ++d) {
      const int32_t digit = (((value + kOffset) >> (8 * d)) & 0xff) - 128;
      if (slot < kSlots) digits[d * kGroupDigitBytes + slot] = static_cast<int8_t>(digit);
      sums[d] += digit;
    }
  }
  for (int d = 0; d < D; ++d) {
    const int32_t sum = __reduce_add_sync(0xffffffffu, sums[d]);
    if (lane == 0) p.x_sums[(row * groups + group) * D + d] = sum;
  }
  if (lane == 0) {
    const float scale = usable ? __fdiv_rn(magnitude, 127.0f) : largest == 0 ? 0.0f : __int_as_float(0x7fc00000);
    p.x_scales[row * groups + group] = scale;
  }
}

// A lane's codes of one group, of C blocks of 16 columns: as stored, one or two pairs of dwords for each step.
template <int B, int C>
struct Codes {
  uint2 words[C][kSteps][B / 4];

  __device__ void load(const uint8_t* const (&block)[C], const GroupCursor& group, int lane) {
    const int atoms = group.atoms();
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int atom = 4 * step + lane_atom(lane);
        const uint8_t* from = block[c] + (group.first_atom() + atom) * atom_bytes(B) + lane_byte(lane);
        const bool there = block[c] != nullptr && atom < atoms;
#pragma unroll
        for (int half = 0; half < B / 4; ++half)
          words[c][step][half] = there ? __ldg(reinterpret_cast<const uint2*>(from + 64 * half)) : uint2{0, 0};
      }
  }

  __device__ void fragment(int c, int step, uint32_t (&a)[4]) const {
    const uint2 first = words[c][step][0], second = words[c][step][B / 4 - 1];
    if constexpr (B == 8) {
      a[0] = first.x, a[1] = first.y, a[2] = second.x, a[3] = second.y;
    } else {
      a[0] = nibbles(first.x, 0), a[1] = nibbles(first.y, 0);
      a[2] = nibbles(first.x, 1), a[3] = nibbles(first.y, 1);
    }
  }
};

// Step 3: from the sums of the digits to a float.
template <int D>
__device__ float combine(const int32_t (&j)[D]) {
  if constexpr (D == 1) {
    return __int2float_rn(j[0]);
  } else if constexpr (D == 2) {
    return __fmaf_rn(__int2float_rn(j[0]), 0x1p-8f, __int2float_rn(j[1]));
  } else {
    return __fmaf_rn(__int2float_rn(256 * j[1] + j[0]), 0x1p-16f, __int2float_rn(j[2]));
  }
}

template <int B, int D, int C, int T>
class Warp {
 public:
  __device__ Warp(const LinearW4CudaProblem& p, int64_t row_end, int64_t first_row, int64_t first_block)
      : p_(p), row_end_(row_end), first_row_(first_row), first_column_(first_block * kAtomRows) {
    lane_ = static_cast<int>(threadIdx.x) % 32;
    groups_ = group_total(p.k, p.group_size);
    const int64_t block_stride = (p.k + kAtomColumns - 1) / kAtomColumns * atom_bytes(B);
    for (int c = 0; c < C; ++c) {
      const int64_t block = first_block + c;
      blocks_[c] = block * kAtomRows < p.n ? p.packed + block * block_stride : nullptr;
    }
  }

  // Spans [begin, end); their sums go to y, or, if the device shares out the spans, to span_sums.
  __device__ void run(int64_t span_begin, int64_t span_end, bool shared) {
    GroupCursor group(p_.k, p_.group_size, span_begin * kSpan);
    const auto inside = [&](const GroupCursor& g) { return !g.done() && g.span() < span_end; };
    Codes<B, C> codes;
    if (inside(group)) codes.load(blocks_, group, lane_);
    while (inside(group)) {
      GroupCursor next = group;
      next.advance();
      const Codes<B, C> current = codes;
      if (inside(next)) codes.load(blocks_, next, lane_);
      multiply(current, group);
      if (next.done() || next.span() != group.span()) end_span(group.span(), shared);
      group = next;
    }
    if (!shared)
      for_each_sum(
          [&](int c, int t, int i, int64_t row, int64_t column) { store_output(p_, row, column, y_[c][t][i]); });
  }

 private:
  template <class Function>
  __device__ void for_each_sum(const Function& function) {
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int t = 0; t < T; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = first_row_ + kTileTokens * t + sum_token(lane_, i);
          const int64_t column = first_column_ + kAtomRows * c + sum_column(lane_, i);
          if (row < row_end_ && column < p_.n) function(c, t, i, row, column);
        }
  }

  __device__ void multiply(const Codes<B, C>& codes, const GroupCursor& group) {
    int32_t j[C][T][D][4] = {};
    const int atoms = group.atoms();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (4 * step >= atoms) break;
      uint32_t a[C][4];
#pragma unroll
      for (int c = 0; c < C; ++c) codes.fragment(c, step, a[c]);
      const int atom = 4 * step + lane_atom(lane_);
#pragma unroll
      for (int t = 0; t < T; ++t) {
        const int64_t row = first_row_ + kTileTokens * t + lane_digit_token(lane_);
        const int8_t* digits = p_.x_digits + row * groups_ * D * kGroupDigitBytes;
        const bool there = row < row_end_ && atom < atoms;
#pragma unroll
        for (int d = 0; d < D; ++d) {
          const int8_t* from = digits + digit_byte(group.group, D, d, atom);
          const uint2 b = there ? *reinterpret_cast<const uint2*>(from) : uint2{0, 0};
#pragma unroll
          for (int c = 0; c < C; ++c) multiply_add_u8_s8(j[c][t][d], a[c], b);
        }
      }
    }
    add_up(j, group);
  }

  // Steps 3 and 4.
  __device__ void add_up(const int32_t (&sums)[C][T][D][4], const GroupCursor& group) {
    for_each_sum([&](int c, int t, int i, int64_t row, int64_t column) {
      const int64_t at = row * groups_ + group.group, parameter = group.weight_group * p_.n + column;
      const int32_t zero = p_.zeros != nullptr ? p_.zeros[parameter] : middle_code(B);
      int32_t j[D];
#pragma unroll
      for (int d = 0; d < D; ++d) j[d] = sums[c][t][d][i] - zero * p_.x_sums[at * D + d];
      const float scale = __half2float(__ushort_as_half(p_.scales[parameter]));
      partial_[c][t][i] = __fmaf_rn(__fmul_rn(combine<D>(j), scale), p_.x_scales[at], partial_[c][t][i]);
    });
  }

  __device__ void end_span(int64_t span, bool shared) {
    for_each_sum([&](int c, int t, int i, int64_t row, int64_t column) {
      if (shared) {
        p_.span_sums[(span * p_.m + row) * p_.n + column] = partial_[c][t][i];
      } else {
        y_[c][t][i] = __fadd_rn(y_[c][t][i], partial_[c][t][i]);
      }
      partial_[c][t][i] = 0.0f;
    });
  }

  const LinearW4CudaProblem& p_;
  int lane_;
  int64_t row_end_, first_row_, first_column_, groups_;
  const uint8_t* blocks_[C];
  float y_[C][T][4] = {}, partial_[C][T][4] = {};
};

template <int B, int D, int C, int T>
__global__ void __launch_bounds__(32 * kWarps)
    multiply_kernel(LinearW4CudaProblem p, int64_t row_begin, int64_t row_end, int64_t spans_per_slice, bool shared) {
  const int64_t first_block = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * C;
  const int64_t first_row = row_begin + static_cast<int64_t>(blockIdx.y) * T * kTileTokens;
  const int64_t span_begin = blockIdx.z * spans_per_slice;
  if (first_block * kAtomRows >= p.n) return;
  Warp<B, D, C, T>(p, row_end, first_row, first_block).run(span_begin, span_begin + spans_per_slice, shared);
}

__global__ void add_spans_kernel(LinearW4CudaProblem p, int64_t spans) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= p.n) return;
  for (int64_t row = blockIdx.y; row < p.m; row += gridDim.y) {
    float y = 0.0f;
    for (int64_t span = 0; span < spans; ++span) y = __fadd_rn(y, p.span_sums[(span * p.m + row) * p.n + column]);
    store_output(p, row, column, y);
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t kRowsAtOnce = 32768;  // below the 65,535 blocks that a launch may have in y

// How the product is dealt out.
struct Plan {
  int columns, tokens;  // blocks of 16 columns, and tiles of 8 tokens, of a warp
  int64_t slices, spans_per_slice;
};

cudaError_t make_plan(const LinearW4CudaProblem& p, Plan& plan) {
  const int64_t tiles = ceil_div(p.m, kTileTokens);
  plan.tokens = tiles == 1 ? 1 : tiles == 2 || p.digits == 3 ? 2 : 4;
  plan.columns = tiles <= 2 ? 1 : 2;
  DeviceLimits device;
  if (const cudaError_t error = device_limits(device)) return error;
  const int64_t blocks = ceil_div(ceil_div(p.n, kAtomRows), plan.columns * kWarps) * ceil_div(tiles, plan.tokens);
  const int64_t spans = p.k == 0 ? 1 : span_total(p.k, p.group_size);
  // Four blocks of four warps keep enough loads in flight on a multiprocessor.
  const int64_t wanted = ceil_div(int64_t{4} * device.multiprocessors, blocks);
  plan.spans_per_slice = ceil_div(spans, wanted < spans ? wanted : spans);
  plan.slices = ceil_div(spans, plan.spans_per_slice);
  return cudaSuccess;
}

template <int B, int D, int C, int T>
cudaError_t launch_multiply(const LinearW4CudaProblem& p, const Plan& plan, int64_t row_begin, int64_t row_end,
                            cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(ceil_div(p.n, kAtomRows), C * kWarps)),
                  static_cast<unsigned>(ceil_div(row_end - row_begin, T * kTileTokens)),
                  static_cast<unsigned>(plan.slices));
  return launch(multiply_kernel<B, D, C, T>, {grid, 32 * kWarps}, stream, p, row_begin, row_end, plan.spans_per_slice,
                plan.slices > 1);
}

template <int B, int D>
cudaError_t multiply(const LinearW4CudaProblem& p, const Plan& plan, int64_t row, int64_t end, cudaStream_t stream) {
  if (plan.columns == 1 && plan.tokens == 1) return launch_multiply<B, D, 1, 1>(p, plan, row, end, stream);
  if (plan.columns == 1) return launch_multiply<B, D, 1, 2>(p, plan, row, end, stream);
  if constexpr (D < 3)
    if (plan.tokens == 4) return launch_multiply<B, D, 2, 4>(p, plan, row, end, stream);
  return launch_multiply<B, D, 2, 2>(p, plan, row, end, stream);
}

template <int B, int D>
cudaError_t run(const LinearW4CudaProblem& p, const Plan& plan, cudaStream_t stream) {
  const int64_t groups = group_total(p.k, p.group_size);
  for (int64_t row = 0; row < p.m; row += kRowsAtOnce) {
    const int64_t end = row + kRowsAtOnce < p.m ? row + kRowsAtOnce : p.m;
    if (groups > 0) {
      const dim3 grid(static_cast<unsigned>(ceil_div(groups, kWarps)), static_cast<unsigned>(end - row));
      if (const cudaError_t error = launch(split_kernel<D>, {grid, 32 * kWarps}, stream, p, row, groups)) return error;
    }
    if (const cudaError_t error = multiply<B, D>(p, plan, row, end, stream)) return error;
  }
  if (plan.slices == 1) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.n, 256)),
                  static_cast<unsigned>(p.m < kRowsAtOnce ? p.m : kRowsAtOnce));
  return launch(add_spans_kernel, {grid, 256}, stream, p, span_total(p.k, p.group_size));
}

template <int B>
cudaError_t run(const LinearW4CudaProblem& p, const Plan& plan, cudaStream_t stream) {
  if (p.digits == 1) return run<B, 1>(p, plan, stream);
  if (p.digits == 2) return run<B, 2>(p, plan, stream);
  return run<B, 3>(p, plan, stream);
}

}  // namespace

cudaError_t linear_w4_cuda_scratch(const LinearW4CudaProblem& p, LinearW4CudaScratch& scratch) {
  Plan plan;
  if (const cudaError_t error = make_plan(p, plan)) return error;
  const int64_t groups = group_total(p.k, p.group_size);
  scratch.x_digits = p.m * groups * p.digits * kGroupDigitBytes;
  scratch.x_scales = p.m * groups;
  scratch.x_sums = p.m * groups * p.digits;
  scratch.span_sums = plan.slices > 1 ? span_total(p.k, p.group_size) * p.m * p.n : 0;
  return cudaSuccess;
}

cudaError_t linear_w4_cuda(const LinearW4CudaProblem& p, cudaStream_t stream) {
  Plan plan;
  if (const cudaError_t error = make_plan(p, plan)) return error;
  return p.bits == 8 ? run<8>(p, plan, stream) : run<4>(p, plan, stream);
}

}  // namespace gptq
