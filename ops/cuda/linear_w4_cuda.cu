// linear_w4 by int8 tensor cores: the digits of linear_w4.h times the codes, so that the bits are those of every CPU
// kernel. One kernel writes the digits; another, after the number of tokens, multiplies.
#include "cuda/linear_w4_cuda.h"
#include "cuda/linear_w4_kernels.h"

namespace gptq {
namespace {

// Warps of a gemv block: the spans of k over up to eight of them, as evenly as they go. Where columns are many enough
// to fill the device, four warps at least.
void plan_gemv(const LinearW4CudaProblem& p, int64_t spans, const DeviceLimits& device, LinearW4CudaPlan& plan) {
  constexpr int64_t kMostWarps = 8, kWarps = 4;
  const int64_t span_warps = ceil_div(spans, ceil_div(spans, kMostWarps));
  const int64_t blocks_each = ceil_div(p.n, kAtomRows) / device.multiprocessors;
  const int64_t column_warps = kWarps / span_warps < blocks_each ? kWarps / span_warps : blocks_each;
  plan.span_warps = static_cast<int>(span_warps);
  plan.column_warps = column_warps < 1 ? 1 : static_cast<int>(column_warps);
}

// Spans are dealt out where tiles leave multiprocessors idle. A large tile takes a multiprocessor for itself; of small
// ones, four keep enough loads in flight.
void plan_gemm(const LinearW4CudaProblem& p, int64_t spans, const DeviceLimits& device, LinearW4CudaPlan& plan) {
  const GemmTile tile = gemm_tile(p, device.shared_bytes);
  plan.tile_tokens = tile.tokens;
  const int64_t blocks = ceil_div(p.n, tile.columns) * ceil_div(p.m, tile.tokens);
  const int64_t room = int64_t{device.multiprocessors} * (tile.tokens <= 32 ? 4 : 1) / blocks;
  const int64_t slices = room < 1 ? 1 : room < spans ? room : spans;
  plan.spans_per_slice = ceil_div(spans, slices);
  plan.slices = ceil_div(spans, plan.spans_per_slice);
}

}  // namespace

cudaError_t plan_linear_w4_cuda(const LinearW4CudaProblem& p, LinearW4CudaPlan& plan) {
  DeviceLimits device;
  if (const cudaError_t error = device_limits(device)) return error;
  plan = {};
  plan.slices = plan.spans_per_slice = 1;
  plan.overlaps = device.overlaps_kernels;
  if (p.k > kMostColumns) return cudaErrorInvalidValue;
  const int64_t spans = p.k == 0 ? 1 : span_total(p.k, p.group_size);
  if (p.m <= kGemvTokens) {
    plan_gemv(p, spans, device, plan);
    plan.gemv = gemv_shared_bytes(p, plan) <= static_cast<size_t>(device.shared_bytes);
  }
  if (!plan.gemv) plan_gemm(p, spans, device, plan);
  plan.record_bytes = record_byte(ceil_div(p.m, kTileTokens), group_total(p.k, p.group_size), 0, p.digits);
  const int64_t span_sums = plan.slices > 1 ? spans * p.m * p.n : 0;
  plan.scratch_bytes = plan.record_bytes + span_sums * static_cast<int64_t>(sizeof(float));
  return cudaSuccess;
}

cudaError_t linear_w4_cuda(const LinearW4CudaProblem& p, const LinearW4CudaPlan& plan, void* scratch,
                           cudaStream_t stream) {
  LinearW4CudaWork work = {};
  static_cast<LinearW4CudaProblem&>(work) = p;
  work.records = static_cast<char*>(scratch);
  work.span_sums = reinterpret_cast<float*>(work.records + plan.record_bytes);
  if (const cudaError_t error = split_linear_w4(work, stream)) return error;
  return plan.gemv ? multiply_linear_w4_gemv(work, plan, stream) : multiply_linear_w4_gemm(work, plan, stream);
}

}  // namespace gptq
