#include "model/calibration.h"

#include <torch/script.h>

#include <algorithm>
#include <random>

#include "model/safetensors.h"

namespace gptq {

namespace {

// Uniform in 0..bound-1. The standard distributions give other numbers in other libraries.
uint64_t draw_below(std::mt19937_64& generator, uint64_t bound) {
  const uint64_t rejected = (uint64_t{0} - bound) % bound;  // 2^64 mod bound values would be drawn too often
  uint64_t value = generator();
  while (value < rejected) value = generator();
  return value % bound;
}

}  // namespace

at::Tensor draw_windows(const std::vector<int64_t>& ids, int64_t samples, int64_t sequence_length, uint64_t seed) {
  const auto tokens = static_cast<int64_t>(ids.size());
  TORCH_CHECK(samples >= 1, "draw_windows: samples must be at least 1, got ", samples);
  TORCH_CHECK(sequence_length >= 1, "draw_windows: sequence_length must be at least 1, got ", sequence_length);
  TORCH_CHECK(tokens >= sequence_length, "draw_windows: the text must have at least one window of ", sequence_length,
              " tokens, has ", tokens);
  std::mt19937_64 generator(seed);
  at::Tensor windows = at::empty({samples, sequence_length}, at::kLong);
  for (int64_t i = 0; i < samples; ++i) {
    const auto start = draw_below(generator, static_cast<uint64_t>(tokens - sequence_length + 1));
    std::copy_n(ids.begin() + static_cast<int64_t>(start), sequence_length,
                windows.data_ptr<int64_t>() + i * sequence_length);
  }
  return windows;
}

std::vector<at::Tensor> read_batches(const std::string& path) {
  const auto file = SafetensorsFile::open(path);
  TORCH_CHECK(!file.names().empty(), path, ": must hold at least one tensor, has none");
  std::vector<at::Tensor> batches;
  batches.reserve(file.names().size());
  for (const std::string& name : file.names()) batches.push_back(file.tensor(name));
  return batches;
}

}  // namespace gptq
