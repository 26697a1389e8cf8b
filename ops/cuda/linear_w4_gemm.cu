// The product for many tokens: a thread block multiplies a tile of columns by a tile of tokens. The codes and the
// digits of a group go through shared memory, several groups ahead, and each warp of the block takes its part of both.
// Where tiles do not fill the device, the spans of k are dealt out too, and a last kernel adds them up in order.
#include "cuda/linear_w4_kernels.h"

namespace gptq {
namespace {

// How a tile is dealt out: C blocks of 16 columns by T tiles of 8 tokens for each of kColumnWarps · kTokenWarps warps.
template <int C, int T, int kColumnWarps_, int kTokenWarps_>
struct TileShape {
  static constexpr int kBlocks = C, kTiles = T, kColumnWarps = kColumnWarps_, kTokenWarps = kTokenWarps_;
  static constexpr int kThreads = 32 * kColumnWarps * kTokenWarps;
  static constexpr int kColumnBlocks = C * kColumnWarps, kTokenTiles = T * kTokenWarps;
  static constexpr int kTokens = kTokenTiles * kTileTokens;
  // Tiles of tokens whose sums a warp holds at once: as many as registers allow for three digits.
  static constexpr int kTilesAtOnce = 4 / C < T ? 4 / C : T;

  static constexpr int stage_bytes(int bits, int digits) {
    return kColumnBlocks * staged_bytes(bits) + kTokenTiles * record_bytes(digits);
  }
  // Groups in shared memory: two at least, four at most, in what compute capability 8.0 has.
  static constexpr int stages(int bits, int digits) {
    const int fit = 160 * 1024 / stage_bytes(bits, digits);
    return fit > 4 ? 4 : fit;
  }
};

using Tile16 = TileShape<1, 2, 4, 1>;
using Tile32 = TileShape<1, 4, 4, 1>;
using Tile64 = TileShape<2, 4, 4, 2>;
using Tile128 = TileShape<4, 4, 2, 4>;

template <int B, int D, class Shape>
class GemmBlock {
 public:
  static constexpr int C = Shape::kBlocks, T = Shape::kTiles, kStages = Shape::stages(B, D);
  static constexpr int kStageBytes = Shape::stage_bytes(B, D);
  static_assert(kStages >= 2);
  // The widest tile has no registers for a group ahead, and products enough to wait behind.
  static constexpr bool kParametersAhead = C < 4;

  GPTQ_DEVICE GemmBlock(const LinearW4CudaWork& p, int64_t column_tile, int64_t token_tile)
      : p_(p), lane_(static_cast<int>(threadIdx.x) % 32) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    column_warp_ = warp % Shape::kColumnWarps;
    token_warp_ = warp / Shape::kColumnWarps;
    first_block_ = column_tile * Shape::kColumnBlocks;
    first_tile_ = token_tile * Shape::kTokenTiles;
    groups_ = group_total(p.k, p.group_size);
  }

  // Spans [begin, end); their sums go to y, or, if the device shares out the spans, to span_sums.
  GPTQ_DEVICE void run(int64_t span_begin, int64_t span_end, bool shared) {
    GroupCursor now(p_.k, p_.group_size, span_begin * kSpan), ahead = now;
    const auto inside = [&](const GroupCursor& group) { return !group.done() && group.span() < span_end; };
    ColumnParameters parameters[C], next_parameters[C];
    if (kParametersAhead && inside(now)) load_parameters(parameters, now);
    wait_for_kernel_ahead();
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (inside(ahead)) {
        copy(ahead, stage);
        ahead.advance();
      }
      end_copy_batch();
    }
    int stage = 0;
    while (inside(now)) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // the group is there, and all have left the stage of the group before
      if (inside(ahead)) {
        copy(ahead, stage == 0 ? kStages - 1 : stage - 1);
        ahead.advance();
      }
      end_copy_batch();
      GroupCursor next = now;
      next.advance();
      if (!kParametersAhead) {
        load_parameters(parameters, now);
      } else if (inside(next)) {
        load_parameters(next_parameters, next);
      }
      multiply(now, shared_memory() + stage * kStageBytes, parameters);
      if (next.done() || next.span() != now.span()) end_span(now.span(), shared);
      if (kParametersAhead) {
#pragma unroll
        for (int c = 0; c < C; ++c) parameters[c] = next_parameters[c];
      }
      now = next;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    if (!shared)
      for_each_sum(
          [&](int c, int t, int i, int64_t row, int64_t column) { store_output(p_, row, column, y_[c][t][i]); });
  }

 private:
  GPTQ_DEVICE int64_t first_column(int c) const {
    return (first_block_ + column_warp_ * C + c) * kAtomRows + lane_column(lane_);
  }
  GPTQ_DEVICE int64_t token_tile(int t) const { return first_tile_ + token_warp_ * T + t; }

  GPTQ_DEVICE void load_parameters(ColumnParameters (&parameters)[C], const GroupCursor& group) const {
#pragma unroll
    for (int c = 0; c < C; ++c) parameters[c].load(p_, group.weight_group, first_column(c));
  }

  // All threads of the block copy a group's codes and digits.
  GPTQ_DEVICE void copy(const GroupCursor& group, int stage) const {
    char* const to = shared_memory() + stage * kStageBytes;
    constexpr int kBlock = staged_bytes(B), kRecord = record_bytes(D);
    const int64_t block_stride = (p_.k + kAtomColumns - 1) / kAtomColumns * atom_bytes(B);
    const int64_t blocks = (p_.n + kAtomRows - 1) / kAtomRows, tiles = (p_.m + kTileTokens - 1) / kTileTokens;
    const uint8_t* const weights = p_.packed + first_block_ * block_stride + group.first_atom() * atom_bytes(B);
    const int block_bytes = group.atoms() * static_cast<int>(atom_bytes(B));
#pragma unroll 1
    for (int at = 16 * static_cast<int>(threadIdx.x); at < Shape::kColumnBlocks * kBlock; at += 16 * Shape::kThreads) {
      const int block = at / kBlock, byte = at % kBlock;
      if (byte < block_bytes && first_block_ + block < blocks)
        copy_async(to + block * kBlock + staged_byte(B, byte), weights + block * block_stride + byte);
    }
    char* const records = to + Shape::kColumnBlocks * kBlock;
    const char* const from = p_.records + record_byte(first_tile_, groups_, group.group, D);
    const int used = record_header_bytes(D) + group.steps() * D * kRowBytes;
#pragma unroll 1
    for (int at = 16 * static_cast<int>(threadIdx.x); at < Shape::kTokenTiles * kRecord; at += 16 * Shape::kThreads) {
      const int tile = at / kRecord, byte = at % kRecord;
      if (byte < used && first_tile_ + tile < tiles) copy_async(records + at, from + tile * groups_ * kRecord + byte);
    }
  }

  GPTQ_DEVICE void multiply(const GroupCursor& group, const char* stage, const ColumnParameters (&parameters)[C]) {
    constexpr int kAtOnce = Shape::kTilesAtOnce;
    const char* const codes = stage + column_warp_ * C * staged_bytes(B);
    const char* const records = stage + Shape::kColumnBlocks * staged_bytes(B) + token_warp_ * T * record_bytes(D);
    const int steps = group.steps();
#pragma unroll
    for (int first = 0; first < T; first += kAtOnce) {
      if (token_tile(first) * kTileTokens >= p_.m) break;
      int32_t j[C][kAtOnce][D][4];
#pragma unroll
      for (int i = 0; i < C * kAtOnce * D * 4; ++i)
        j[i / (kAtOnce * D * 4)][i / (D * 4) % kAtOnce][i / 4 % D][i % 4] = kMagicBits;
#pragma unroll
      for (int step = 0; step < kGroupSteps; ++step) {
        if (step >= steps) break;
        uint32_t a[C][4];
#pragma unroll
        for (int c = 0; c < C; ++c) load_codes<B>(a[c], codes + c * staged_bytes(B), step, lane_);
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) {
          const char* const rows = records + (first + t) * record_bytes(D) + record_header_bytes(D) + 8 * lane_;
#pragma unroll
          for (int d = 0; d < D; ++d) {
            const uint2 b = *reinterpret_cast<const uint2*>(rows + (step * D + d) * kRowBytes);
#pragma unroll
            for (int c = 0; c < C; ++c) multiply_add_u8_s8(j[c][t][d], a[c], b);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) add_tile(first + t, j, t, records + (first + t) * record_bytes(D), parameters);
    }
  }

  template <int kAtOnce>
  GPTQ_DEVICE void add_tile(int tile, const int32_t (&j)[C][kAtOnce][D][4], int t, const char* record,
                            const ColumnParameters (&parameters)[C]) {
    if (p_.zeros != nullptr) {
#pragma unroll
      for (int c = 0; c < C; ++c) add_group<D, true>(partial_[c][tile], j[c][t], record, parameters[c], lane_);
    } else {
#pragma unroll
      for (int c = 0; c < C; ++c) add_group<D, false>(partial_[c][tile], j[c][t], record, parameters[c], lane_);
    }
  }

  template <class Function>
  GPTQ_DEVICE void for_each_sum(const Function& function) {
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int t = 0; t < T; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = token_tile(t) * kTileTokens + sum_token(lane_, i);
          const int64_t column = first_column(c) + i / 2;
          if (row < p_.m && column < p_.n) function(c, t, i, row, column);
        }
  }

  GPTQ_DEVICE void end_span(int64_t span, bool shared) {
    if (shared) {
      for_each_sum([&](int c, int t, int i, int64_t row, int64_t column) {
        p_.span_sums[(span * p_.m + row) * p_.n + column] = partial_[c][t][i];
      });
    }
#pragma unroll
    for (int i = 0; i < C * T * 4; ++i) {
      float& partial = partial_[i / (T * 4)][i / 4 % T][i % 4];
      float& y = y_[i / (T * 4)][i / 4 % T][i % 4];
      y = __fadd_rn(y, partial);
      partial = 0.0f;
    }
  }

  const LinearW4CudaWork& p_;
  int lane_, column_warp_, token_warp_;
  int64_t first_block_, first_tile_, groups_;
  float y_[C][T][4] = {}, partial_[C][T][4] = {};
};

template <int B, int D, class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    gemm_kernel(LinearW4CudaWork p, int64_t column_tiles, int64_t token_tiles, int64_t spans_per_slice, bool shared) {
  // Tokens first, so that blocks that run at the same time read the same weights.
  const int64_t token_tile = blockIdx.x % token_tiles, rest = blockIdx.x / token_tiles;
  const int64_t span_begin = rest / column_tiles * spans_per_slice;
  GemmBlock<B, D, Shape>(p, rest % column_tiles, token_tile).run(span_begin, span_begin + spans_per_slice, shared);
}

__global__ void add_spans_kernel(LinearW4CudaWork p, int64_t spans) {
  wait_for_kernel_ahead();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, size = p.m * p.n;
  if (at >= size) return;
  float y = 0.0f;
#pragma unroll 4
  for (int64_t span = 0; span < spans; ++span) y = __fadd_rn(y, p.span_sums[span * size + at]);
  store_output(p, at / p.n, at % p.n, y);
}

template <int B, int D, class Shape>
cudaError_t launch_gemm(const LinearW4CudaWork& work, const LinearW4CudaPlan& plan, cudaStream_t stream) {
  const int64_t column_tiles = ceil_div(work.n, kAtomRows * Shape::kColumnBlocks);
  const int64_t token_tiles = ceil_div(work.m, Shape::kTokens);
  constexpr size_t kShared = size_t{Shape::stages(B, D)} * Shape::stage_bytes(B, D);
  const LaunchShape shape = {static_cast<unsigned>(column_tiles * token_tiles * plan.slices), Shape::kThreads, kShared,
                             plan.overlaps};
  return launch(gemm_kernel<B, D, Shape>, shape, stream, work, column_tiles, token_tiles, plan.spans_per_slice,
                plan.slices > 1);
}

template <int B, int D>
cudaError_t launch_gemm(const LinearW4CudaWork& work, const LinearW4CudaPlan& plan, cudaStream_t stream) {
  switch (plan.tile_tokens) {
    case Tile16::kTokens:
      return launch_gemm<B, D, Tile16>(work, plan, stream);
    case Tile32::kTokens:
      return launch_gemm<B, D, Tile32>(work, plan, stream);
    case Tile64::kTokens:
      return launch_gemm<B, D, Tile64>(work, plan, stream);
    default:
      return launch_gemm<B, D, Tile128>(work, plan, stream);
  }
}

template <int B>
cudaError_t launch_gemm(const LinearW4CudaWork& work, const LinearW4CudaPlan& plan, cudaStream_t stream) {
  if (work.digits == 1) return launch_gemm<B, 1>(work, plan, stream);
  if (work.digits == 2) return launch_gemm<B, 2>(work, plan, stream);
  return launch_gemm<B, 3>(work, plan, stream);
}

}  // namespace

GemmTile gemm_tile(const LinearW4CudaProblem& p, int shared_bytes) {
  GemmTile best = {};
  const auto consider = [&](auto shape) {
    const bool fits = shape.stages(p.bits, p.digits) * shape.stage_bytes(p.bits, p.digits) <= shared_bytes;
    const bool has_tokens_left_over = best.tokens < p.m;
    if (best.tokens == 0 || (fits && has_tokens_left_over))
      best = {shape.kTokens, shape.kColumnBlocks * static_cast<int>(kAtomRows)};
  };
  consider(Tile16());
  consider(Tile32());
  consider(Tile64());
  consider(Tile128());
  return best;
}

cudaError_t multiply_linear_w4_gemm(const LinearW4CudaWork& work, const LinearW4CudaPlan& plan, cudaStream_t stream) {
  const cudaError_t error = work.bits == 8 ? launch_gemm<8>(work, plan, stream) : launch_gemm<4>(work, plan, stream);
  if (error != cudaSuccess || plan.slices == 1) return error;
  constexpr int kThreads = 256;
  const LaunchShape shape = {static_cast<unsigned>(ceil_div(work.m * work.n, kThreads)), kThreads, 0, plan.overlaps};
  return launch(add_spans_kernel, shape, stream, work, span_total(work.k, work.group_size));
}

}  // namespace gptq
