#pragma once

#include "quant/pull_kernel.h"

namespace gptq {

/// pull of pairs by AVX512-BF16, whose product of pairs is two fused operations, the upper halves first: the bits of
/// the other kernels, as long as no value is denormal. Null where the compiler lacks it.
using PullBf16 = void (*)(const Bf16Pair*, int64_t, const Bf16Pair*, int64_t, int64_t, int64_t, float*);
extern const PullBf16 kPullBf16;

}  // namespace gptq
