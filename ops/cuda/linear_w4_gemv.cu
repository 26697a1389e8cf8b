// The product for a few tokens, bound by the memory that holds the weight. A warp takes one or two blocks of 16 columns
// and whole spans of k, and keeps a ring of groups in flight of its own, so that no warp waits for another until the
// spans are added up, in order, at the end.
#include "cuda/linear_w4_kernels.h"

namespace gptq {
namespace {

constexpr int kMaxWarps = 8;

// Groups in flight of a warp.
template <int B, int C>
inline constexpr int kStages = (B == 8 ? 3 : 4) - (C - 1);

GPTQ_HOST_DEVICE int stage_bytes(int bits, int digits, int column_blocks, int log_tokens) {
  return column_blocks * staged_bytes(bits) + record_header_bytes(digits) + kGroupSteps * digits * (32 << log_tokens);
}

// The groups of a warp: those of every so many-th span.
struct SpanWalk {
  GroupCursor group;
  int spans;  // from one to the next

  GPTQ_DEVICE SpanWalk(int64_t k, int64_t width, int first, int spans) : group(k, width, first * kSpan), spans(spans) {}

  GPTQ_DEVICE bool done() const { return group.done(); }
  // Returns whether the group was the last of its span.
  GPTQ_DEVICE bool advance() {
    const uint32_t span = group.span();
    group.advance();
    if (!group.done() && group.span() == span) return false;
    group = GroupCursor(group.k, group.width, int64_t{span + spans} * kSpan);
    return true;
  }
};

template <int B, int D, int C>
class GemvWarp {
 public:
  GPTQ_DEVICE GemvWarp(const LinearW4CudaWork& p, int64_t first_block, int log_tokens, char* ring)
      : p_(p), lane_(static_cast<int>(threadIdx.x) % 32), log_tokens_(log_tokens), ring_(ring) {
    first_block_ = first_block;
    groups_ = group_total(p.k, p.group_size);
    stage_bytes_ = stage_bytes(B, D, C, log_tokens);
  }

  // Writes the sum of each of the warp's spans to sums[span][token][16·C].
  GPTQ_DEVICE void run(int first_span, int span_step, float* sums) {
    SpanWalk now(p_.k, p_.group_size, first_span, span_step), ahead = now, weights = now;
    // Weights first: they need not wait for the digits.
    for (int stage = 0; stage < kStages<B, C> && !weights.done(); ++stage, weights.advance())
      copy_weights(weights.group, stage);
    ColumnParameters parameters[C], next_parameters[C];
    load_parameters(parameters, now);
    wait_for_kernel_ahead();
    for (int stage = 0; stage < kStages<B, C>; ++stage) {
      if (!ahead.done()) {
        copy_digits(ahead.group, stage);
        ahead.advance();
      }
      end_copy_batch();
    }
    int stage = 0;
    while (!now.done()) {
      const GroupCursor group = now.group;
      const bool ends_span = now.advance();
      load_parameters(next_parameters, now);
      wait_for_copies<kStages<B, C> - 1>();
      __syncwarp();
      multiply(group, stage, parameters);
      __syncwarp();  // before the stage is written again
      if (!ahead.done()) {
        copy_weights(ahead.group, stage);
        copy_digits(ahead.group, stage);
        ahead.advance();
      }
      end_copy_batch();
      if (ends_span) store_span(sums + group.span() * (p_.m * kAtomRows * C));
      for (int c = 0; c < C; ++c) parameters[c] = next_parameters[c];
      stage = stage + 1 == kStages<B, C> ? 0 : stage + 1;
    }
  }

 private:
  GPTQ_DEVICE bool has_block(int c) const { return (first_block_ + c) * kAtomRows < p_.n; }

  GPTQ_DEVICE void load_parameters(ColumnParameters (&parameters)[C], const SpanWalk& at) const {
    if (at.done()) return;
#pragma unroll
    for (int c = 0; c < C; ++c)
      parameters[c].load(p_, at.group.weight_group, (first_block_ + c) * kAtomRows + lane_column(lane_));
  }

  GPTQ_DEVICE void copy_weights(const GroupCursor& group, int stage) const {
    const int64_t block_stride = (p_.k + kAtomColumns - 1) / kAtomColumns * atom_bytes(B);
    const int bytes = group.atoms() * static_cast<int>(atom_bytes(B));
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (!has_block(c)) break;
      const uint8_t* const from = p_.packed + (first_block_ + c) * block_stride + group.first_atom() * atom_bytes(B);
      char* const to = ring_ + stage * stage_bytes_ + c * staged_bytes(B);
#pragma unroll 1
      for (int byte = 16 * lane_; byte < bytes; byte += 16 * 32) copy_async(to + staged_byte(B, byte), from + byte);
    }
  }

  // The header as it is, and of the rows of eight tokens those that are needed, to a power of two.
  GPTQ_DEVICE void copy_digits(const GroupCursor& group, int stage) const {
    constexpr int kHeader = record_header_bytes(D);
    const char* const record = p_.records + record_byte(0, groups_, group.group, D);
    char* const to = ring_ + stage * stage_bytes_ + C * staged_bytes(B);
    if (16 * lane_ < kHeader) copy_async(to + 16 * lane_, record + 16 * lane_);
    const int bytes = group.steps() * D * (32 << log_tokens_);
#pragma unroll 1
    for (int byte = 16 * lane_; byte < bytes; byte += 16 * 32) {
      const int row = byte >> (5 + log_tokens_);
      const int within = byte & ((32 << log_tokens_) - 1);
      copy_async(to + kHeader + byte, record + kHeader + row * kRowBytes + within);
    }
  }

  GPTQ_DEVICE void multiply(const GroupCursor& group, int stage, const ColumnParameters (&parameters)[C]) {
    const char* const weights = ring_ + stage * stage_bytes_;
    const char* const record = weights + C * staged_bytes(B);
    const char* const rows = record + record_header_bytes(D) + 8 * lane_;
    const bool has_token = lane_digit_token(lane_) < 1 << log_tokens_;
    const int steps = group.steps();
    int32_t j[C][D][4];
#pragma unroll
    for (int i = 0; i < C * D * 4; ++i) j[i / (D * 4)][i / 4 % D][i % 4] = kMagicBits;
#pragma unroll
    for (int step = 0; step < kGroupSteps; ++step) {
      if (step >= steps) break;
      uint32_t a[C][4];
#pragma unroll
      for (int c = 0; c < C; ++c) load_codes<B>(a[c], weights + c * staged_bytes(B), step, lane_);
#pragma unroll
      for (int d = 0; d < D; ++d) {
        uint2 b = {0, 0};
        if (has_token) b = *reinterpret_cast<const uint2*>(rows + ((step * D + d) << (5 + log_tokens_)));
#pragma unroll
        for (int c = 0; c < C; ++c) multiply_add_u8_s8(j[c][d], a[c], b);
      }
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (p_.zeros != nullptr) {
        add_group<D, true>(partial_[c], j[c], record, parameters[c], lane_);
      } else {
        add_group<D, false>(partial_[c], j[c], record, parameters[c], lane_);
      }
    }
  }

  GPTQ_DEVICE void store_span(float* sums) {
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = sum_token(lane_, i);
        if (token < p_.m) sums[(token * C + c) * kAtomRows + sum_column(lane_, i)] = partial_[c][i];
        partial_[c][i] = 0.0f;
      }
  }

  const LinearW4CudaWork& p_;
  int lane_, log_tokens_, stage_bytes_;
  char* ring_;
  int64_t first_block_, groups_;
  float partial_[C][4] = {};
};

template <int B, int D, int C>
__global__ void __launch_bounds__(32 * kMaxWarps, 2)
    gemv_kernel(LinearW4CudaWork p, int span_warps, int log_tokens, int64_t spans) {
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  const int column_warps = warps / span_warps, ring_bytes = kStages<B, C> * stage_bytes(B, D, C, log_tokens);
  const int64_t first_block = static_cast<int64_t>(blockIdx.x) * column_warps * C;
  const int64_t sums_size = p.m * kAtomRows * C;  // of one warp's columns and one span
  float* const sums = reinterpret_cast<float*>(shared_memory() + warps * ring_bytes);

  const int column_warp = warp / span_warps;
  GemvWarp<B, D, C>(p, first_block + column_warp * C, log_tokens, shared_memory() + warp * ring_bytes)
      .run(warp % span_warps, span_warps, sums + column_warp * spans * sums_size);
  __syncthreads();

  const int outputs = column_warps * static_cast<int>(sums_size);
  for (int output = static_cast<int>(threadIdx.x); output < outputs; output += static_cast<int>(blockDim.x)) {
    const int of_warp = output / static_cast<int>(sums_size), at = output % static_cast<int>(sums_size);
    const int64_t column = (first_block + of_warp * C) * kAtomRows + at % (kAtomRows * C);
    if (column >= p.n) continue;
    const float* const partial = sums + of_warp * spans * sums_size + at;
    float y = 0.0f;
    for (int64_t span = 0; span < spans; ++span) y = __fadd_rn(y, partial[span * sums_size]);
    store_output(p, at / (kAtomRows * C), column, y);
  }
}

// Two blocks of columns share the digits of more than two tokens.
int column_blocks(int64_t m) {
  return m <= 2 ? 1 : 2;
}

int log_tokens(int64_t m) {
  int log = 0;
  while (1 << log < m) ++log;
  return log;
}

template <int B, int D>
cudaError_t launch_gemv(const LinearW4CudaWork& work, const LaunchShape& shape, const LinearW4CudaPlan& plan,
                        cudaStream_t stream) {
  const int64_t spans = span_total(work.k, work.group_size);
  const auto kernel = column_blocks(work.m) == 1 ? gemv_kernel<B, D, 1> : gemv_kernel<B, D, 2>;
  return launch(kernel, shape, stream, work, plan.span_warps, log_tokens(work.m), spans);
}

}  // namespace

size_t gemv_shared_bytes(const LinearW4CudaProblem& p, const LinearW4CudaPlan& plan) {
  const int blocks = column_blocks(p.m);
  const int stages =
      p.bits == 8 ? (blocks == 1 ? kStages<8, 1> : kStages<8, 2>) : (blocks == 1 ? kStages<4, 1> : kStages<4, 2>);
  const size_t rings =
      size_t{1} * plan.column_warps * plan.span_warps * stages * stage_bytes(p.bits, p.digits, blocks, log_tokens(p.m));
  const int64_t spans = span_total(p.k, p.group_size);
  return rings + sizeof(float) * plan.column_warps * spans * p.m * kAtomRows * blocks;
}

cudaError_t multiply_linear_w4_gemv(const LinearW4CudaWork& work, const LinearW4CudaPlan& plan, cudaStream_t stream) {
  const int64_t blocks = ceil_div(work.n, kAtomRows * column_blocks(work.m) * plan.column_warps);
  const LaunchShape shape = {static_cast<unsigned>(blocks),
                             static_cast<unsigned>(32 * plan.column_warps * plan.span_warps),
                             gemv_shared_bytes(work, plan), plan.overlaps};
  if (work.bits == 8) {
    if (work.digits == 1) return launch_gemv<8, 1>(work, shape, plan, stream);
    if (work.digits == 2) return launch_gemv<8, 2>(work, shape, plan, stream);
    return launch_gemv<8, 3>(work, shape, plan, stream);
  }
  if (work.digits == 1) return launch_gemv<4, 1>(work, shape, plan, stream);
  if (work.digits == 2) return launch_gemv<4, 2>(work, shape, plan, stream);
  return launch_gemv<4, 3>(work, shape, plan, stream);
}

}  // namespace gptq
