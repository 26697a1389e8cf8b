#include "rewrite/calibration_pass.h"

#include <ATen/ATen.h>
#include <c10/util/irange.h>
#include <gptq/gptq_layer.h>
#include <gptq/pack_w4.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <utility>

#include "rewrite/graph_slice.h"
#include "rewrite/linear_finder.h"
#include "rewrite/linear_replacement.h"

namespace gptq::rewrite {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

/// What is gathered at the input of a layer.
struct Observer {
  explicit Observer(const at::Tensor& weight, bool conv1d)
      : layer(c10::make_intrusive<GPTQLayer>(weight, std::nullopt, conv1d)) {}

  /// Adds inputs of the quantized stream, beside the same inputs of the float stream where their drift matters.
  void add_batch(const at::Tensor& input, const at::Tensor& expected) {
    layer->add_batch(input);
    if (!expected.defined()) {
      return;
    }
    const int64_t k = input.size(-1);
    const at::Tensor rows = input.to(at::kFloat).reshape({-1, k});
    if (!drift_sum.defined()) {
      drift_sum = at::zeros({k, k}, at::kFloat);
    }
    drift_sum.addmm_((expected.to(at::kFloat).reshape({-1, k}) - rows).t(), rows);
  }

  at::Tensor drift() const {
    return drift_sum.defined() ? drift_sum * (2.0 / static_cast<double>(layer->nsamples())) : at::Tensor();
  }

  c10::intrusive_ptr<GPTQLayer> layer;
  at::Tensor drift_sum;  ///< f32 [K, K]: Σ (x - x̂) x̂ᵀ
};

/// One weight to quantize. Several linears may use it; its Hessian is complete at the last of them.
struct Layer {
  Layer(std::string layer_name, at::Tensor stored, bool transposed)
      : name(std::move(layer_name)), weight(std::move(stored)), conv1d(transposed) {}

  std::string name;
  at::Tensor weight;  ///< as stored
  bool conv1d;
  size_t last_stage = 0;
  size_t uses = 0;
  std::shared_ptr<Observer> observer;  ///< shared by layers that read the same tensor
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
    TORCH_CHECK(false, layer.name, ": ", error.what_without_backtrace());
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
  GraphSlice advance(Stream& stream, const Stage& stage);
  void observe(const Stage& stage, const at::Tensor& input, const at::Tensor& expected);
  void probe(const Stage& stage);
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
      live.emplace(stream.graph->inputs()[i], std::move(arguments[i]));
    }
  }
  return stream;
}

void CalibrationPass::plan() {
  std::map<std::pair<const Value*, int64_t>, size_t> stage_of_input;
  for (const size_t i : c10::irange(quantized_.uses.size())) {
    const auto& [linear, layer_index] = quantized_.uses[i];
    if (layer_index == layers_.size()) {
      layers_.emplace_back(linear.name, linear.weight, linear.conv1d);
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
    ++layers_[layer_index].uses;
  }
  for (const Stage& stage : stages_) {
    std::shared_ptr<Observer> shared;
    for (const size_t i : stage.linears) {
      Layer& layer = layers_[quantized_.uses[i].layer];
      if (!layer.observer) {
        const bool share = layer.uses == 1 && shared;
        layer.observer = share ? shared : std::make_shared<Observer>(layer.weight, layer.conv1d);
        shared = layer.uses == 1 ? layer.observer : shared;
      }
    }
  }
}

/// Carries both streams up to a stage and gathers its inputs; returns how far the quantized stream's are off.
double CalibrationPass::reach(const Stage& stage) {
  GraphSlice float_slice = advance(float_, stage);
  GraphSlice quantized_slice = advance(quantized_, stage);
  const Value* float_input = float_.uses[stage.linears.front()].linear.input();
  const Value* quantized_input = quantized_.uses[stage.linears.front()].linear.input();
  double difference = 0;
  double magnitude = 0;
  for (const size_t i : c10::irange(quantized_.live.size())) {
    float_slice.run(module_, float_.live[i]);
    quantized_slice.run(module_, quantized_.live[i]);
    if (!stage.nested) {
      const at::Tensor expected = float_.live[i].at(float_input).toTensor();
      const at::Tensor got = quantized_.live[i].at(quantized_input).toTensor();
      difference += squared_norm(got - expected);
      magnitude += squared_norm(expected);
      observe(stage, got,
              options_.quantize.mode == "default" && options_.quantize.target_alpha > 0 ? expected : at::Tensor());
    }
  }
  if (stage.nested) {
    probe(stage);
  }
  return magnitude > 0 ? std::sqrt(difference / magnitude) : 0;
}

GraphSlice CalibrationPass::advance(Stream& stream, const Stage& stage) {
  Node* anchor = top_level(stream.uses[stage.linears.front()].linear.node);
  Node* begin = std::exchange(stream.position, anchor);
  return {*stream.graph, begin, anchor, values_needed_from(*stream.graph, anchor)};
}

void CalibrationPass::observe(const Stage& stage, const at::Tensor& input, const at::Tensor& expected) {
  std::vector<const Observer*> fed;
  for (const size_t i : stage.linears) {
    const Layer& layer = layers_[quantized_.uses[i].layer];
    if (std::find(fed.begin(), fed.end(), layer.observer.get()) == fed.end()) {
      fed.push_back(layer.observer.get());
      at_layer(layer, [&] { layer.observer->add_batch(input, expected); });
    }
  }
}

/// Runs the loop or branch that a linear stands in with an observer before the linear, on copies of the live values.
void CalibrationPass::probe(const Stage& stage) {
  const Use& use = quantized_.uses[stage.linears.front()];
  Node* outer = top_level(use.linear.node);
  GraphSlice slice(*quantized_.graph, outer, outer->next(), {});
  Node* copy = slice.clone_of(use.linear.node);
  Graph& graph = slice.graph();
  const torch::jit::WithInsertPoint before(copy);
  graph.insertNode(
      graph.create(c10::Symbol::fromQualString("gptq::observe"),
                   {copy->input(use.linear.input_index), slice.add_input(layers_[use.layer].observer->layer)}, 0));
  for (const LiveValues& live : quantized_.live) {
    LiveValues copies;
    for (const auto& [value, held] : live) {
      copies.emplace(value, held.deepcopy());
    }
    slice.run(module_, copies);
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
  const at::Tensor stored = layer.weight.detach();
  const at::Tensor weight = layer.conv1d ? stored.t() : stored;
  QuantizeOptions options = options_.quantize;
  QuantizeResult result;
  const GPTQLayer& gathered = *layer.observer->layer;
  if (gathered.nsamples() == 0) {
    options.mode = "rtn";
  }
  at_layer(layer, [&] { result = quantize_weight(weight, gathered.hessian(), options, layer.observer->drift()); });
  QuantizedLinear quantized;
  static_cast<LinearInfo&>(quantized) = {layer.name, weight.size(0), weight.size(1), layer.conv1d};
  quantized.bits = options.bits;
  quantized.group_size = result.group_size;
  quantized.nsamples = gathered.nsamples();
  quantized.report = result.report;
  if (options.bits == 4) {
    quantized.packed = pack_w4(result.codes);
    quantized.scales = result.scales;
    quantized.zeros = options.symmetric ? at::Tensor() : result.zeros;
  } else {
    const at::Tensor dequantized = result.dequantize();
    quantized.dequantized = (layer.conv1d ? dequantized.t() : dequantized).to(stored.scalar_type()).contiguous();
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
      Node* replacement = replace_linear(*quantized_.graph, use.linear, quantized, as_constant);
      use.linear.node = replacement;
      if (at_position) {
        quantized_.position = replacement;
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
