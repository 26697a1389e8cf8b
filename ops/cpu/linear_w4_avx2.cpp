// linear_w4 for AVX2 with FMA and F16C.
#include "cpu/linear_w4_avx2.h"

namespace gptq {

const LinearW4Kernel kLinearW4Avx2 = {split_entry<Avx2>, multiply_entry<Avx2>};

}  // namespace gptq
