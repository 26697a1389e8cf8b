#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <set>
#include <string>

#include "model/safetensors.h"

namespace gptq {

/// Canonical name of a checkpoint tensor: with the prefix "transformer.", lm_head without.
std::string canonical_gpt2_name(const std::string& name);

/// Whether a canonical name is a buffer that older checkpoints carry and no model needs.
bool is_ignored_gpt2_tensor(const std::string& canonical);

/// The tensors of a GPT-2 folder under their canonical names; keeps account of those that were asked for. Errors name
/// the file and the tensor.
class GPT2Tensors {
 public:
  /// @param store must outlive the object
  /// @throws c10::Error where two names are one
  explicit GPT2Tensors(const TensorStore& store);

  bool contains(const std::string& name) const { return names_.count(name) > 0; }
  /// A floating tensor of this shape as f32, checked to be finite.
  at::Tensor floats(const std::string& name, at::IntArrayRef shape);
  /// A tensor of this dtype and shape; finite, where it is floating point.
  at::Tensor typed(const std::string& name, at::ScalarType dtype, at::IntArrayRef shape);
  /// A tensor of this shape and any dtype.
  at::Tensor raw(const std::string& name, at::IntArrayRef shape);
  /// That the file holds nothing the model has no place for: it would be another model.
  void check_all_used() const;
  /// model.safetensors or the index.
  const std::string& path() const { return store_.path(); }

 private:
  std::string where(const std::string& name) const;
  void check_finite(const std::string& name, const at::Tensor& tensor) const;

  const TensorStore& store_;
  std::map<std::string, std::string> names_;
  std::set<std::string> used_;
};

}  // namespace gptq
