#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "model/coded_weight.h"
#include "model/gguf.h"

namespace gptq {

/// That weights of these bits, groups and columns fit the blocks of GGUF.
/// @param group_size -1: one group per row
/// @param name of the linear, for the error
/// @throws c10::Error "<name>: <what> must be <requirement> in a GGUF file, got <value>"
void check_gguf_fits(const std::string& name, int64_t bits, int64_t group_size, int64_t k);

/// The type of GGUF that holds exactly the weight: Q4_0 for 4 bits with every zero point 8, Q4_1 for 4 bits with other
/// zero points whose minimum -scale * zero is an f16, Q8_0 for 8 bits whose code less zero point is in -128..127.
/// @param name of the linear, for errors
/// @throws c10::Error naming the linear where none does, and the first group (of the first row with such a group) or
///         block of columns at fault: also where 32 columns that lie side by side are not all of one group
GgufType gguf_type_of(const CodedWeight& weight, const std::string& name);

/// The weight in blocks of that type.
/// @param type what gguf_type_of says
/// @return u8 [N, K / 32, bytes of a block]
at::Tensor gguf_blocks(const CodedWeight& weight, GgufType type, const std::string& name);

}  // namespace gptq
