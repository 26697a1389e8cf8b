#pragma once

#include <torch/csrc/jit/api/module.h>

#include "model/gpt2_config.h"
#include "model/safetensors.h"

namespace gptq {

/// Builds GPT-2 as a TorchScript module from source compiled into the library. Everything computes in f32.
///
/// forward(input_ids: Tensor, past: Optional[List[Tensor]] = None) -> Tuple[Tensor, List[Tensor]]
///   input_ids i64 [B, T]; past: the second result of the call on the tokens before, absent at the start
///   -> logits f32 [B, T, vocab_size]; keys and values of every layer, [k0, v0, k1, v1, ...], f32 [B, n_head, past + T,
///   head_size]. past + T must be at most n_positions.
///
/// Attributes have the names of the Hugging Face state, transformer.h.0.attn.c_attn.weight for one, and Conv1D weights
/// keep their layout [K, N]. Where the store has <path>.packed, or <path>.qweight as GPTQModel stores it, the linear at
/// <path> is gptq.linear_w4 (or linear_w8) with the attributes packed, scales, zeros (if any), input_order (if any) and
/// bias.
///
/// @param store tensors with or without the prefix "transformer.", of any floating dtype; every one the config asks for
///        and no other
/// @throws c10::Error naming the file and tensor, what is expected and what is there
torch::jit::Module build_gpt2(const GPT2Config& config, const TensorStore& store);

}  // namespace gptq
