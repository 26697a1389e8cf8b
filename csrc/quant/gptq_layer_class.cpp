#include <gptq/gptq_layer.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "quant/result_tuple.h"

namespace gptq {
namespace {

using LayerPtr = c10::intrusive_ptr<GPTQLayer>;
// The weight, the bias if there is one, and what was gathered; whether there is a bias; conv1d, halves and drift.
using State = std::tuple<std::vector<at::Tensor>, bool, std::tuple<bool, bool, bool>>;
using OptionalTensor = const std::optional<at::Tensor>&;

void add_batch(const LayerPtr& self, const at::Tensor& input, OptionalTensor float_input, OptionalTensor token_weights,
               bool drop_nonfinite) {
  self->add_batch(input, float_input.value_or(at::Tensor()), token_weights.value_or(at::Tensor()), drop_nonfinite);
}

ResultTuple quantize(const LayerPtr& self, int64_t bits, int64_t group_size, bool symmetric, bool per_tensor,
                     std::string act_order, std::string mode, double damping, int64_t block_size, bool write_back,
                     double target_alpha, std::string scale_search, int64_t refine_sweeps, bool row_guard,
                     bool correct_bias, bool search_damping, int64_t min_samples, bool compare) {
  const QuantizeResult result =
      self->quantize({bits, group_size, symmetric, per_tensor, std::move(act_order), std::move(mode), damping,
                      block_size, target_alpha, std::move(scale_search), refine_sweeps, row_guard, correct_bias,
                      search_damping, min_samples, compare});
  if (write_back) {
    self->write_back(result);
  }
  return result_tuple(result);
}

State get_state(const LayerPtr& self) {
  std::vector<at::Tensor> tensors{self->weight()};
  if (self->bias().has_value()) {
    tensors.push_back(*self->bias());
  }
  for (const at::Tensor& tensor : self->state()) {
    tensors.push_back(tensor);
  }
  return {std::move(tensors), self->bias().has_value(), {self->conv1d(), self->halves(), self->drift()}};
}

LayerPtr set_state(const State& state) {
  const auto& [tensors, has_bias, settings] = state;
  const auto [conv1d, halves, drift] = settings;
  const size_t first = has_bias ? 2 : 1;
  TORCH_CHECK(tensors.size() > first, "GPTQLayer: state must hold more than ", first, " tensors, got ", tensors.size());
  auto layer = c10::make_intrusive<GPTQLayer>(tensors[0], has_bias ? std::optional(tensors[1]) : std::nullopt, conv1d,
                                              halves, drift);
  layer->set_state({tensors.begin() + static_cast<std::ptrdiff_t>(first), tensors.end()});
  return layer;
}

/// Adds a batch in the middle of a graph; token_weights may have any shape with one element for each vector.
void observe(const at::Tensor& input, const LayerPtr& layer, const std::optional<at::Tensor>& token_weights,
             bool drop_nonfinite) {
  at::Tensor weights;
  if (token_weights) {
    TORCH_CHECK(input.dim() > 0 && token_weights->numel() * input.size(-1) == input.numel(),
                "observe: token_weights must have one element for each vector of the input ", input.sizes(), ", got ",
                token_weights->sizes());
    weights = token_weights->reshape(input.sizes().slice(0, input.dim() - 1));
  }
  layer->add_batch(input, {}, weights, drop_nonfinite);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptq, m) {
  using torch::arg;
  const QuantizeOptions defaults;
  m.class_<GPTQLayer>("GPTQLayer")
      .def(torch::init<at::Tensor, std::optional<at::Tensor>, bool, bool, bool>(), "",
           {arg("weight"), arg("bias") = c10::IValue(), arg("conv1d") = false, arg("halves") = true,
            arg("drift") = true})
      .def("add_batch", add_batch, "",
           {arg("input"), arg("float_input") = c10::IValue(), arg("token_weights") = c10::IValue(),
            arg("drop_nonfinite") = false})
      .def("quantize", quantize, "",
           {arg("bits") = defaults.bits, arg("group_size") = defaults.group_size, arg("symmetric") = defaults.symmetric,
            arg("per_tensor") = defaults.per_tensor, arg("act_order") = defaults.act_order, arg("mode") = defaults.mode,
            arg("damping") = defaults.damping, arg("block_size") = defaults.block_size, arg("write_back") = false,
            arg("target_alpha") = defaults.target_alpha, arg("scale_search") = defaults.scale_search,
            arg("refine_sweeps") = defaults.refine_sweeps, arg("row_guard") = defaults.row_guard,
            arg("correct_bias") = defaults.correct_bias, arg("search_damping") = defaults.search_damping,
            arg("min_samples") = defaults.min_samples, arg("compare") = defaults.compare})
      .def("hessian", &GPTQLayer::hessian)
      .def("nsamples", &GPTQLayer::nsamples)
      .def("dropped", &GPTQLayer::dropped)
      .def_pickle([](const LayerPtr& self) { return get_state(self); },
                  [](const State& state) { return set_state(state); });
  // Not beside the other schemas in library.cpp: this one names the class, which must be registered before it.
  m.def(
      "observe(Tensor input, __torch__.torch.classes.gptq.GPTQLayer layer, Tensor? token_weights=None, "
      "bool drop_nonfinite=False) -> ()",
      observe);
}

}  // namespace gptq
