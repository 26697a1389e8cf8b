#pragma once

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <string>

namespace gptq::rewrite {

/// Makes every linear_w4 and linear_w8 in the methods of a module and its submodules compute in the given mode. What
/// has run before stays compiled as it was, so this comes before the first call.
/// @param compute "exact", "bf16" or "int8", see linear_w4
/// @return how many linears that are
int64_t set_linear_compute(const torch::jit::Module& module, const std::string& compute);

}  // namespace gptq::rewrite
