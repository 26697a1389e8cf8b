#pragma once

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

namespace gptq {

struct GenerateOptions {
  int64_t max_new_tokens = 64;
  std::vector<int64_t> eos_token_ids = {};               ///< the first of these that comes up is the last token
  std::optional<int64_t> context_length = std::nullopt;  ///< prompt and new tokens together stay within it
  double temperature = 0;                                ///< 0: greedy, the first of the most likely tokens
  int64_t top_k = 0;                                     ///< with a temperature, draw from this many; 0: from all
  uint64_t seed = 0;                                     ///< of the draws
};

/// Continues a prompt.
///
/// A module whose forward takes (input_ids, past) and returns (logits, present), as build_gpt2 makes it, is run with
/// its cache: every token is computed once. Any other is run on all tokens each time.
///
/// @param prompt at least one token, fewer than the context length
/// @param on_token called with each new token as it is known
/// @return the new tokens, with the end-of-text token if one came up
/// @throws c10::Error naming the argument, the requirement and the value received
std::vector<int64_t> generate(torch::jit::Module& module, const std::vector<int64_t>& prompt,
                              const GenerateOptions& options, const std::function<void(int64_t)>& on_token = {});

/// Whether generate can use a cache of keys and values with the module.
bool takes_past(const torch::jit::Module& module);

}  // namespace gptq
