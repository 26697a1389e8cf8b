// linear_w4 for AVX2 with FMA and F16C.
#include "cpu/linear_w4_avx2_wide.h"

namespace gptq {

const LinearW4Kernel kLinearW4Avx2 = {split_avx2, multiply_avx2, kWideChunk};

}  // namespace gptq
