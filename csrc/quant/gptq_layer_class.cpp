#include <gptq/gptq_layer.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "quant/report_dict.h"

namespace gptq {
namespace {

using LayerPtr = c10::intrusive_ptr<GPTQLayer>;
// Weight, sum of x xᵀ and bias if there is one; conv1d; nsamples.
using State = std::tuple<std::vector<at::Tensor>, bool, int64_t>;

std::tuple<at::Tensor, at::Tensor, at::Tensor, c10::Dict<std::string, double>> quantize(
    const LayerPtr& self, int64_t bits, int64_t group_size, bool symmetric, bool per_tensor, std::string act_order,
    std::string mode, double damping, int64_t block_size, bool write_back) {
  const QuantizeResult result = self->quantize(
      {bits, group_size, symmetric, per_tensor, std::move(act_order), std::move(mode), damping, block_size});
  if (write_back) {
    self->write_back(result);
  }
  return {result.codes, result.scales, result.zeros, report_dict(result.report)};
}

State get_state(const LayerPtr& self) {
  std::vector<at::Tensor> tensors{self->weight(), self->gram()};
  if (self->bias().has_value()) {
    tensors.push_back(*self->bias());
  }
  return {std::move(tensors), self->conv1d(), self->nsamples()};
}

LayerPtr set_state(const State& state) {
  const auto& [tensors, conv1d, nsamples] = state;
  TORCH_CHECK(tensors.size() == 2 || tensors.size() == 3,
              "GPTQLayer: state must hold weight, gram and at most a bias, got ", tensors.size(), " tensors");
  std::optional<at::Tensor> bias;
  if (tensors.size() == 3) {
    bias = tensors[2];
  }
  auto layer = c10::make_intrusive<GPTQLayer>(tensors[0], bias, conv1d);
  layer->set_gram(tensors[1], nsamples);
  return layer;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptq, m) {
  using torch::arg;
  m.class_<GPTQLayer>("GPTQLayer")
      .def(torch::init<at::Tensor, std::optional<at::Tensor>, bool>(), "",
           {arg("weight"), arg("bias") = c10::IValue(), arg("conv1d") = false})
      .def("add_batch", &GPTQLayer::add_batch, "", {arg("input")})
      .def("quantize", quantize, "",
           {arg("bits") = 4, arg("group_size") = 128, arg("symmetric") = true, arg("per_tensor") = false,
            arg("act_order") = "auto", arg("mode") = "default", arg("damping") = 0.01, arg("block_size") = 128,
            arg("write_back") = false})
      .def("hessian", &GPTQLayer::hessian)
      .def("nsamples", &GPTQLayer::nsamples)
      .def_pickle([](const LayerPtr& self) { return get_state(self); },
                  [](const State& state) { return set_state(state); });
  // Not beside the other schemas in library.cpp: this one names the class, which must be registered before it.
  m.def("observe(Tensor input, __torch__.torch.classes.gptq.GPTQLayer layer) -> ()",
        [](const at::Tensor& input, const LayerPtr& layer) { layer->add_batch(input); });
}

}  // namespace gptq
