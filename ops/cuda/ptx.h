// The instructions that CUDA C++ has no function for, each in a function of its own. Where nvcc does not compile,
// tests/cuda_on_host.h defines them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#ifdef __CUDACC__
#define GPTQ_DEVICE __device__ __forceinline__
#define GPTQ_INSTRUCTION GPTQ_DEVICE
#else
#define GPTQ_DEVICE inline
#define GPTQ_INSTRUCTION
#endif

namespace gptq {

/// c += a·b by mma.m16n8k32: a u8 [16, 32], b s8 [32, 8], c i32 [16, 8], spread over the warp as PTX says.
GPTQ_INSTRUCTION void multiply_add_u8_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint2 b);

/// Begins to copy 16 bytes, both addresses aligned to 16; they are there once this thread has waited for them, and for
/// other threads after a barrier.
GPTQ_INSTRUCTION void copy_async(void* shared, const void* global);
/// Puts this thread's copies since the last call into one batch.
GPTQ_INSTRUCTION void end_copy_batch();
/// Waits for this thread's batches, all but the last kPending.
template <int kPending>
GPTQ_INSTRUCTION void wait_for_copies();

/// Waits until the kernel ahead on the stream has ended and its memory can be read; see LaunchShape::overlaps.
GPTQ_INSTRUCTION void wait_for_kernel_ahead();
/// This thread block does not mind if the next kernel begins.
GPTQ_INSTRUCTION void let_next_kernel_begin();

#ifdef __CUDACC__

GPTQ_INSTRUCTION void multiply_add_u8_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint2 b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

GPTQ_INSTRUCTION void copy_async(void* shared, const void* global) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global))
      : "memory");
}

GPTQ_INSTRUCTION void end_copy_batch() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
GPTQ_INSTRUCTION void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

GPTQ_INSTRUCTION void wait_for_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

GPTQ_INSTRUCTION void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif

}  // namespace gptq
