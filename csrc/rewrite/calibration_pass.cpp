#include "rewrite/calibration_pass.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/irange.h>
#include <gptq/gptq_layer.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "rewrite/dense_linear.h"
#include "rewrite/graph_slice.h"
#include "rewrite/linear_finder.h"
#include "rewrite/linear_replacement.h"
#include "rewrite/packed_weight.h"
#include "rewrite/placement.h"

namespace gptq::rewrite {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

/// One weight to quantize. Several linears may use it; its Hessian is complete at the last of them.
struct Layer {
  explicit Layer(const LinearNode& linear)
      : name(linear.name),
        weight(linear.weight),
        bias(linear.bias),
        conv1d(linear.conv1d),
        embedding(linear.embedding) {}

  std::string name;
  at::Tensor weight;  ///< as stored
  at::Tensor bias;    ///< undefined: none
  bool conv1d;
  bool embedding;
  size_t last_stage = 0;
  size_t uses = 0;
  bool nested = false;  ///< a use stands inside a loop or a branch, where the float model's inputs are not known
  c10::intrusive_ptr<GPTQLayer> observer;  ///< gathers the inputs; shared by layers that read the same tensor
};

/// A point of the graph at which inputs are observed: those of linears that read the same tensor.
struct Stage {
  std::vector<size_t> linears;  ///< indices into the graph's linears
  bool nested = false;          ///< inside a loop or a branch: observed by a probe instead of at the cut
};

struct Use {
  LinearNode linear;
  size_t layer;
};

/// A graph cut down to what the linears need, and how far each calibration input has come in it.
struct Stream {
  std::shared_ptr<Graph> graph;
  std::vector<Use> uses;
  std::vector<LiveValues> live;
  Node* position = nullptr;
};

/// The tensor that an input is a reshaped view of.
const Value* viewed(const Value* value) {
  static const c10::Symbol views[] = {c10::aten::view, c10::aten::reshape, c10::aten::contiguous, c10::aten::flatten};
  while (std::find(std::begin(views), std::end(views), value->node()->kind()) != std::end(views)) {
    value = value->node()->input(0);
  }
  return value;
}

double squared_norm(const at::Tensor& tensor) {
  const double norm = at::linalg_vector_norm(tensor.to(at::kFloat)).item<double>();
  return norm * norm;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Runs a step; its errors name the layer.
template <typename Step>
void at_layer(const Layer& layer, const Step& step) {
  try {
    step();
  } catch (const c10::Error& error) {
    // Inside a loop or a branch the interpreter puts its traceback in front of what the operator threw.
    constexpr std::string_view kBefore = "RuntimeError: ";
    const std::string text = error.what_without_backtrace();
    const size_t start = text.rfind(kBefore);
    TORCH_CHECK(false, layer.name, ": ", start == std::string::npos ? text : text.substr(start + kBefore.size()));
  }
}

class CalibrationPass {
 public:
  CalibrationPass(const Module& module, Graph& graph, const std::vector<std::vector<c10::IValue>>& calibration,
                  const QuantizeModuleOptions& options)
      : module_(module), options_(options) {
    float_ = make_stream(graph, calibration);
    quantized_ = make_stream(graph, calibration);
    plan();
  }

  std::vector<QuantizedLinear> run() {
    for (const size_t stage : c10::irange(stages_.size())) {
      const auto start = std::chrono::steady_clock::now();
      const double input_error = reach(stages_[stage]);
      finish_layers(stage, input_error, start);
    }
    return std::move(results_);
  }

 private:
  Stream make_stream(Graph& graph, const std::vector<std::vector<c10::IValue>>& calibration);
  void plan();
  double reach(const Stage& stage);
  template <typename Step>
  void for_each_input(const Step& step) const;
  GraphSlice advance(Stream& stream, const Stage& stage, std::optional<DeviceCopies>& copies) const;
  /// Where the observers and the solver work on a layer.
  at::Device device_of(const Layer& layer) const { return options_.device.value_or(layer.weight.device()); }
  void observe(const Stage& stage, size_t batch, const at::Tensor& input, const at::Tensor& expected);
  QuantizeOptions options_of(const Layer& layer) const;
  void probe(const Stage& stage, std::optional<DeviceCopies>& copies);
  void finish_layers(size_t stage, double input_error, std::chrono::steady_clock::time_point start);
  QuantizedLinear quantize(const Layer& layer) const;
  void replace(const QuantizedLinear& quantized, size_t layer);

  const Module& module_;
  const QuantizeModuleOptions& options_;
  Stream float_;
  Stream quantized_;
  std::vector<Layer> layers_;
  std::vector<Stage> stages_;
  std::vector<QuantizedLinear> results_;
};

Stream CalibrationPass::make_stream(Graph& graph, const std::vector<std::vector<c10::IValue>>& calibration) {
  Stream stream;
  stream.graph = graph.copy();
  if (options_.device) {
    retarget_devices(*stream.graph, *options_.device);
  }
  while (!stream.graph->outputs().empty()) {
    stream.graph->eraseOutput(0);
  }
  std::map<std::string, size_t> index;
  for (LinearNode& linear : find_linears(*stream.graph, module_)) {
    if (!options_.skip || !options_.skip(linear.name)) {
      const size_t layer = index.emplace(linear.name, index.size()).first->second;
      for (Value* output : top_level(linear.node)->outputs()) {
        stream.graph->registerOutput(output);
      }
      stream.uses.push_back({std::move(linear), layer});
    }
  }
  torch::jit::EliminateDeadCode(stream.graph);
  stream.position = *stream.graph->nodes().begin();

  const c10::FunctionSchema& schema = module_.get_method("forward").function().getSchema();
  for (const std::vector<c10::IValue>& inputs : calibration) {
    std::vector<c10::IValue> arguments{module_._ivalue()};
    arguments.insert(arguments.end(), inputs.begin(), inputs.end());
    schema.checkAndNormalizeInputs(arguments);
    LiveValues& live = stream.live.emplace_back();
    for (const size_t i : c10::irange<size_t>(1, arguments.size())) {
      c10::IValue& argument = arguments[i];
      live.emplace(stream.graph->inputs()[i],
                   options_.device ? argument.deepcopy(options_.device) : std::move(argument));
    }
  }
  return stream;
}

void CalibrationPass::plan() {
  std::map<std::pair<const Value*, int64_t>, size_t> stage_of_input;
  for (const size_t i : c10::irange(quantized_.uses.size())) {
    const auto& [linear, layer_index] = quantized_.uses[i];
    if (layer_index == layers_.size()) {
      layers_.emplace_back(linear);
    }
    const bool nested = top_level(linear.node) != linear.node;
    const auto key = std::pair{viewed(linear.input()), linear.in_features()};
    const auto known = stage_of_input.find(key);
    if (nested || known == stage_of_input.end()) {
      if (!nested) {
        stage_of_input.emplace(key, stages_.size());
      }
      stages_.push_back({{}, nested});
    }
    const size_t stage = nested || known == stage_of_input.end() ? stages_.size() - 1 : known->second;
    stages_[stage].linears.push_back(i);
    layers_[layer_index].last_stage = std::max(layers_[layer_index].last_stage, stage);
    layers_[layer_index].nested |= nested;
    ++layers_[layer_index].uses;
  }
  for (const Stage& stage : stages_) {
    c10::intrusive_ptr<GPTQLayer> shared;
    bool halves = false, drift = false;
    for (const size_t i : stage.linears) {
      const QuantizeOptions options = options_of(layers_[quantized_.uses[i].layer]);
      halves |= options.search_damping;
      drift |= options.target_alpha > 0;
    }
    for (const size_t i : stage.linears) {
      Layer& layer = layers_[quantized_.uses[i].layer];
      if (!layer.observer) {
        const bool share = layer.uses == 1 && shared;
        // An observer reads no more of the weight than its shape and device.
        const at::Tensor like = at::empty({}, layer.weight.options().device(device_of(layer))).expand_as(layer.weight);
        layer.observer =
            share ? shared : c10::make_intrusive<GPTQLayer>(like, std::nullopt, layer.conv1d, halves, drift);
        shared = layer.uses == 1 ? layer.observer : shared;
      }
    }
  }
}

/// Calls step(i) for every calibration input. On the CPU each thread takes inputs of its own where that keeps all of
/// them busy: operators as short as those of one input leave threads that share them waiting.
template <typename Step>
void CalibrationPass::for_each_input(const Step& step) const {
  const auto count = static_cast<int64_t>(quantized_.live.size());
  const int64_t threads = at::get_num_threads(), rounds = at::divup(count, threads);
  const auto in_range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      step(i);
    }
  };
  const bool on_cpu = !options_.device || options_.device->is_cpu();
  if (on_cpu && 5 * count >= 4 * rounds * threads) {
    at::parallel_for(0, count, 1, in_range);
  } else {
    in_range(0, count);
  }
}

/// Carries both streams up to a stage and gathers its inputs; returns how far the quantized stream's are off.
double CalibrationPass::reach(const Stage& stage) {
  // What the device holds of the model: all that this stretch of it reads, and no longer than it runs.
  std::optional<DeviceCopies> copies;
  if (options_.device && !quantized_.live.empty()) {
    copies.emplace(*options_.device);
  }
  const GraphSlice float_slice = advance(float_, stage, copies);
  const GraphSlice quantized_slice = advance(quantized_, stage, copies);
  for_each_input([&](size_t i) {
    float_slice.run(module_, float_.live[i]);
    quantized_slice.run(module_, quantized_.live[i]);
  });
  const Value* float_input = float_.uses[stage.linears.front()].linear.input();
  const Value* quantized_input = quantized_.uses[stage.linears.front()].linear.input();
  double difference = 0;
  double magnitude = 0;
  if (stage.nested) {
    probe(stage, copies);
  } else {
    for (const size_t i : c10::irange(quantized_.live.size())) {
      const at::Tensor expected = float_.live[i].at(float_input).toTensor();
      const at::Tensor got = quantized_.live[i].at(quantized_input).toTensor();
      difference += squared_norm(got - expected);
      magnitude += squared_norm(expected);
      observe(stage, i, got, expected);
    }
  }
  return magnitude > 0 ? std::sqrt(difference / magnitude) : 0;
}

GraphSlice CalibrationPass::advance(Stream& stream, const Stage& stage, std::optional<DeviceCopies>& copies) const {
  Node* anchor = top_level(stream.uses[stage.linears.front()].linear.node);
  Node* begin = std::exchange(stream.position, anchor);
  GraphSlice slice(*stream.graph, begin, anchor, values_needed_from(*stream.graph, anchor));
  if (copies) {
    read_copies(slice.graph(), module_, *copies);
  }
  speed_up_linears(slice.graph(), module_);
  slice.compile();
  return slice;
}

QuantizeOptions CalibrationPass::options_of(const Layer& layer) const {
  return options_.quantize_layer ? options_.quantize_layer(layer.name) : options_.quantize;
}

void CalibrationPass::observe(const Stage& stage, size_t batch, const at::Tensor& input, const at::Tensor& expected) {
  const auto reads_float_inputs = [&](size_t linear) {
    const Layer& layer = layers_[quantized_.uses[linear].layer];
    const QuantizeOptions options = options_of(layer);
    return !layer.nested && options.mode == "default" && (options.target_alpha > 0 || options.correct_bias);
  };
  const bool with_float_inputs = std::any_of(stage.linears.begin(), stage.linears.end(), reads_float_inputs);
  at::Tensor weights;
  if (!options_.token_weights.empty()) {
    weights = options_.token_weights[batch];
    TORCH_CHECK(weights.numel() * input.size(-1) == input.numel(), "quantize_module: token_weights of input ", batch,
                " must have one element for each of the ", input.numel() / input.size(-1), " vectors at ",
                quantized_.uses[stage.linears.front()].linear.name, ", got ", weights.sizes());
    weights = weights.reshape(input.sizes().slice(0, input.dim() - 1));
  }
  std::vector<const GPTQLayer*> fed;
  for (const size_t i : stage.linears) {
    const Layer& layer = layers_[quantized_.uses[i].layer];
    if (std::find(fed.begin(), fed.end(), layer.observer.get()) == fed.end()) {
      fed.push_back(layer.observer.get());
      at_layer(layer, [&] {
        layer.observer->add_batch(input, with_float_inputs && !layer.nested ? expected : at::Tensor(), weights,
                                  options_.drop_nonfinite);
      });
    }
  }
}

/// Runs the loop or branch that a linear stands in with an observer before the linear, on copies of the live values.
void CalibrationPass::probe(const Stage& stage, std::optional<DeviceCopies>& copies) {
  const Use& use = quantized_.uses[stage.linears.front()];
  Node* outer = top_level(use.linear.node);
  GraphSlice slice(*quantized_.graph, outer, outer->next(), {});
  Node* copy = slice.clone_of(use.linear.node);
  Graph& graph = slice.graph();
  const torch::jit::WithInsertPoint before(copy);
  const c10::IValue observer(layers_[use.layer].observer);
  Value* layer = slice.add_input(observer.type());
  Value* weights = slice.add_input(c10::OptionalType::ofTensor());
  graph.insertNode(graph.create(
      c10::Symbol::fromQualString("gptq::observe"),
      {copy->input(use.linear.input_index), layer, weights, graph.insertConstant(options_.drop_nonfinite)}, 0));
  if (copies) {
    read_copies(graph, module_, *copies);
  }
  slice.compile();
  for (const size_t i : c10::irange(quantized_.live.size())) {
    LiveValues live;
    for (const auto& [value, held] : quantized_.live[i]) {
      live.emplace(value, held.deepcopy());
    }
    const auto counted = options_.token_weights.empty() ? c10::IValue() : c10::IValue(options_.token_weights[i]);
    at_layer(layers_[use.layer], [&] { slice.run(module_, live, {observer, counted}); });
  }
}

void CalibrationPass::finish_layers(size_t stage, double input_error, std::chrono::steady_clock::time_point start) {
  std::vector<size_t> ready;
  for (const size_t i : stages_[stage].linears) {
    const size_t layer = quantized_.uses[i].layer;
    if (layers_[layer].last_stage == stage && std::find(ready.begin(), ready.end(), layer) == ready.end()) {
      ready.push_back(layer);
    }
  }
  for (const size_t index : ready) {
    Layer& layer = layers_[index];
    QuantizedLinear quantized = quantize(layer);
    quantized.input_error = input_error;
    replace(quantized, index);
    layer.observer.reset();
    quantized.seconds = seconds_since(start);
    start = std::chrono::steady_clock::now();
    results_.push_back(std::move(quantized));
    if (options_.progress) {
      options_.progress(results_.back(), results_.size(), layers_.size());
    }
  }
}

QuantizedLinear CalibrationPass::quantize(const Layer& layer) const {
  const at::Device home = layer.weight.device();
  const at::Tensor stored = layer.weight.detach().to(device_of(layer));
  const at::Tensor weight = layer.conv1d ? stored.t() : stored;
  const QuantizeOptions options = options_of(layer);
  LayerStatistics statistics = layer.observer->statistics();
  if (layer.uses > 1 || !layer.bias.defined()) {
    statistics.mean = at::Tensor();  // no bias that is this weight's alone
  }
  QuantizeResult result;
  at_layer(layer, [&] { result = quantize_weight(weight, statistics, options); });
  QuantizedLinear quantized;
  static_cast<LinearInfo&>(quantized) = {layer.name, weight.size(0), weight.size(1), layer.conv1d, layer.embedding};
  quantized.bits = options.bits;
  quantized.group_size = result.group_size;
  quantized.nsamples = layer.observer->nsamples();
  quantized.dropped = layer.observer->dropped();
  quantized.report = result.report;
  const PackedWeight packed = pack_weight(result.codes, result.scales, result.zeros, options.bits);
  const auto brought_home = [&](const at::Tensor& tensor) { return tensor.defined() ? tensor.to(home) : tensor; };
  quantized.packed = brought_home(packed.packed);
  quantized.scales = brought_home(packed.scales);
  quantized.zeros = brought_home(packed.zeros);
  quantized.input_order = brought_home(result.input_order);
  if (result.bias_shift.defined()) {
    quantized.bias = layer.bias.detach().add(result.bias_shift.to(layer.bias.options()));
  }
  return quantized;
}

/// Puts the quantized layer into the quantized stream's graph, so that all after it sees its outputs.
void CalibrationPass::replace(const QuantizedLinear& quantized, size_t layer) {
  const TensorSupply as_constant = [](Graph& graph, const std::string&, const at::Tensor& tensor) {
    return graph.insertConstant(tensor);
  };
  for (Use& use : quantized_.uses) {
    if (use.layer == layer) {
      const bool at_position = use.linear.node == quantized_.position;
      Node* before = use.linear.node->prev();
      use.linear.node = replace_linear(*quantized_.graph, use.linear, quantized, as_constant);
      if (at_position) {
        quantized_.position = before->next();
      }
    }
  }
}

}  // namespace

std::vector<QuantizedLinear> calibrate_and_quantize(const Module& module, Graph& graph,
                                                    const std::vector<std::vector<c10::IValue>>& calibration,
                                                    const QuantizeModuleOptions& options) {
  const at::NoGradGuard no_grad;
  return CalibrationPass(module, graph, calibration, options).run();
}

}  // namespace gptq::rewrite
