#include "model/gpt2_tensors.h"

#include <ATen/ATen.h>

#include <cmath>

#include "model/json_file.h"

namespace gptq {

std::string canonical_gpt2_name(const std::string& name) {
  const bool has_place = name.starts_with("transformer.") || name.starts_with("lm_head.");
  return has_place ? name : "transformer." + name;
}

bool is_ignored_gpt2_tensor(const std::string& canonical) {
  return canonical.ends_with(".attn.bias") || canonical.ends_with(".attn.masked_bias");
}

GPT2Tensors::GPT2Tensors(const TensorStore& store) : store_(store) {
  for (const auto& name : store.names()) {
    const auto [found, is_new] = names_.emplace(canonical_gpt2_name(name), name);
    TORCH_CHECK(is_new, store.path(), ": tensor ", show(name), " is there twice, also as ", show(found->second));
  }
}

at::Tensor GPT2Tensors::floats(const std::string& name, at::IntArrayRef shape) {
  const at::Tensor tensor = raw(name, shape);
  TORCH_CHECK(tensor.is_floating_point(), where(name), "must be floating point, got ", tensor.dtype().name());
  const at::Tensor result = tensor.to(at::kFloat);
  check_finite(name, result);
  return result;
}

at::Tensor GPT2Tensors::typed(const std::string& name, at::ScalarType dtype, at::IntArrayRef shape) {
  const at::Tensor tensor = raw(name, shape);
  TORCH_CHECK(tensor.scalar_type() == dtype, where(name), "must be ", dtype, ", got ", tensor.scalar_type());
  if (tensor.is_floating_point()) check_finite(name, tensor);
  return tensor;
}

at::Tensor GPT2Tensors::raw(const std::string& name, at::IntArrayRef shape) {
  TORCH_CHECK(contains(name), store_.path(), ": tensor ", show(name), " of shape ", shape, " is missing");
  used_.insert(name);
  const at::Tensor tensor = store_.tensor(names_.at(name));
  TORCH_CHECK(tensor.sizes() == shape, where(name), "must have shape ", shape, ", which config.json asks for, got ",
              tensor.sizes());
  return tensor;
}

void GPT2Tensors::check_all_used() const {
  for (const auto& [name, stored] : names_) {
    TORCH_CHECK(used_.count(name) > 0 || is_ignored_gpt2_tensor(name), where(name),
                "is not part of the model that config.json describes");
  }
}

std::string GPT2Tensors::where(const std::string& name) const {
  const std::string& stored = names_.at(name);
  return store_.path(stored) + ": tensor " + show(stored) + " ";
}

void GPT2Tensors::check_finite(const std::string& name, const at::Tensor& tensor) const {
  const auto [low, high] = at::aminmax(tensor.to(at::kFloat));
  if (std::isfinite(low.item<float>()) && std::isfinite(high.item<float>())) return;
  const int64_t index = at::isfinite(tensor).flatten().logical_not().to(at::kByte).argmax().item<int64_t>();
  TORCH_CHECK(false, where(name), "must be finite, element ", index, " is ", tensor.flatten()[index].item<double>());
}

}  // namespace gptq
