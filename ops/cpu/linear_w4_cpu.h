// The CPU implementation of gptq::linear_w4 and linear_w8, with the level open to tests and benchmarks.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "linear_w4.h"

namespace gptq {

struct LinearW4Level {
  std::string name;
  const LinearW4Kernel* kernel;
};

/// The levels this machine can run, best first; the last is scalar.
std::vector<LinearW4Level> linear_w4_cpu_levels();

/// gptq::linear_w4 (bits 4) or linear_w8 (bits 8) on the CPU with one level's kernel, whatever GPTQ_CPU_ISA says.
at::Tensor linear_w4_cpu_at_level(const LinearW4Level& level, int bits, const at::Tensor& input,
                                  const at::Tensor& packed, const at::Tensor& scales,
                                  const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                                  const std::optional<at::Tensor>& input_order, int64_t group_size,
                                  std::string_view compute);

}  // namespace gptq
