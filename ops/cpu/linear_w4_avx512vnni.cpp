#include "cpu/linear_w4_avx512vnni.h"

namespace gptq {

const LinearW4Kernel kLinearW4Avx512vnni = {split_entry<Avx512vnni<InterleavedDigits>>,
                                            multiply_entry<Avx512vnni<InterleavedDigits>>};

}  // namespace gptq
