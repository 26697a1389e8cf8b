#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace gptq {

/// Windows of a text for calibration: starts drawn uniformly and independently from the whole token stream.
/// The same arguments give the same windows on every machine.
///
/// @param ids at least sequence_length tokens
/// @param samples at least 1
/// @param sequence_length tokens per window, at least 1
/// @return i64 [samples, sequence_length]
/// @throws c10::Error naming the argument, the requirement and the value received
at::Tensor draw_windows(const std::vector<int64_t>& ids, int64_t samples, int64_t sequence_length, uint64_t seed);

/// The tensors of a safetensors file, by name in the order of their bytes: each is a batch that a model is called with.
/// @throws c10::Error naming the file, if it cannot be read or holds no tensor
std::vector<at::Tensor> read_batches(const std::string& path);

}  // namespace gptq
