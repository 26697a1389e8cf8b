#include "rewrite/placement.h"

#include <gptq/quantize_module.h>
#include <gtest/gtest.h>
#include <torch/script.h>

#include "rewrite/graph_slice.h"
#include "rewrite/linear_finder.h"
#include "tests/rewrite/modules.h"

namespace gptq::rewrite {
namespace {

using test::calibration_inputs;
using test::compose;
using test::linear;
using test::random_tensor;

constexpr const char* kChain = R"(
def forward(self, x: Tensor) -> Tensor:
    return self.second.forward(2 * self.first.forward(x))
)";

torch::jit::Module chain() {
  return compose({{"first", linear(24, 16, 1)}, {"second", linear(8, 24, 3)}}, kChain);
}

/// The constants of a graph that are on the meta device, where nothing can be computed but shapes.
std::vector<at::Tensor> copies_in(torch::jit::Graph& graph) {
  std::vector<at::Tensor> found;
  for_each_node(graph.block(), [&](torch::jit::Node* node) {
    const auto held = node->kind() == c10::prim::Constant ? torch::jit::toIValue(node->output()) : std::nullopt;
    if (held && held->isTensor()) {
      EXPECT_TRUE(held->toTensor().is_meta());
      found.push_back(held->toTensor());
    }
  });
  return found;
}

TEST(Placement, AStretchOfAGraphReadsCopiesOfItsOwnTensorsAlone) {
  const torch::jit::Module module = chain();
  const auto graph = flatten_forward(module);
  const auto linears = find_linears(*graph, module);
  torch::jit::Node* second = linears[1].node;
  const auto needed = values_needed_from(*graph, second);
  DeviceCopies copies(at::kMeta);
  GraphSlice slice(*graph, *graph->nodes().begin(), second, needed);
  read_copies(slice.graph(), module, copies);
  const auto found = copies_in(slice.graph());
  ASSERT_EQ(found.size(), 2);  // weight and bias of the first
  EXPECT_EQ(found[0].numel() + found[1].numel(), 24 * 16 + 24);
  LiveValues live{{graph->inputs()[1], random_tensor({5, 16}, 7).to(at::kMeta)}};
  slice.compile();
  slice.run(module, live);
  ASSERT_EQ(live.size(), 1);
  const at::Tensor output = live.begin()->second.toTensor();
  EXPECT_TRUE(output.is_meta());
  EXPECT_EQ(output.sizes(), at::IntArrayRef({5, 24}));
  EXPECT_TRUE(module.attr("first").toModule().attr("weight").toTensor().is_cpu());
}

TEST(Placement, ATensorIsCopiedOnce) {
  const torch::jit::Module module = chain();
  DeviceCopies copies(at::kMeta);
  std::vector<at::Tensor> found;
  for (int stream = 0; stream < 2; ++stream) {
    const auto graph = flatten_forward(module);
    read_copies(*graph, module, copies);
    const auto read = copies_in(*graph);
    found.insert(found.end(), read.begin(), read.end());
  }
  ASSERT_EQ(found.size(), 8);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_TRUE(found[i].is_alias_of(found[i + 4]));
  }
}

TEST(Placement, TensorsInsideBranchesAreCopiedToo) {
  const torch::jit::Module module = compose({{"first", linear(16, 16, 1)}, {"second", linear(8, 16, 3)}}, R"(
def forward(self, x: Tensor) -> Tensor:
    if x.size(0) > 2:
        x = self.first.forward(x)
    return self.second.forward(x)
)");
  const auto graph = flatten_forward(module);
  DeviceCopies copies(at::kMeta);
  read_copies(*graph, module, copies);
  EXPECT_EQ(copies_in(*graph).size(), 4);
}

TEST(Placement, GraphsMakeTheirTensorsOnTheDevice) {
  torch::jit::Module module("Maker");
  module.define(R"(
def forward(self, x: Tensor) -> Tensor:
    return torch.arange(0, x.size(0), dtype=4, device='cpu')
)");
  const auto graph = flatten_forward(module);
  retarget_devices(*graph, at::kMeta);
  torch::jit::GraphFunction function("made", graph, nullptr);
  EXPECT_TRUE(function({module._ivalue(), at::ones({3})}).toTensor().is_meta());
}

TEST(Placement, ACopyOfAModuleIsOnTheDeviceAndTheModuleStays) {
  const torch::jit::Module module = chain();
  torch::jit::Module copy = copy_to(module, at::kMeta);
  EXPECT_TRUE(device_of(copy).is_meta());
  EXPECT_TRUE(device_of(module).is_cpu());
  EXPECT_TRUE(copy.forward({at::empty({5, 16}, at::kMeta)}).toTensor().is_meta());
}

TEST(Placement, ACopyComputesTheSame) {
  torch::jit::Module module = chain();
  torch::jit::Module copy = copy_to(module, at::kCPU);
  const at::Tensor x = random_tensor({5, 16}, 7);
  EXPECT_TRUE(at::equal(copy.forward({x}).toTensor(), module.forward({x}).toTensor()));
}

TEST(Placement, AModuleWithoutTensorsIsOnTheCpu) {
  EXPECT_TRUE(device_of(torch::jit::Module("Empty")).is_cpu());
}

void expect_streaming_changes_nothing(const torch::jit::Module& module) {
  const auto calibration = calibration_inputs(3, {40, 16}, 11);
  QuantizeModuleOptions options;
  options.quantize.group_size = 8;
  const QuantizedModule expected = quantize_module(module, calibration, options);
  options.device = at::kCPU;
  QuantizedModule streamed = quantize_module(module, calibration, options);
  ASSERT_EQ(streamed.layers.size(), expected.layers.size());
  for (size_t i = 0; i < expected.layers.size(); ++i) {
    EXPECT_EQ(streamed.layers[i].name, expected.layers[i].name);
    EXPECT_TRUE(at::equal(streamed.layers[i].packed, expected.layers[i].packed));
    EXPECT_TRUE(at::equal(streamed.layers[i].scales, expected.layers[i].scales));
    EXPECT_EQ(streamed.layers[i].bias.defined(), expected.layers[i].bias.defined());
    EXPECT_EQ(streamed.layers[i].input_error, expected.layers[i].input_error);
  }
  QuantizedModule quantized = expected;
  const at::Tensor x = calibration[0][0].toTensor();
  EXPECT_TRUE(at::equal(streamed.module.forward({x}).toTensor(), quantized.module.forward({x}).toTensor()));
}

// Streaming takes the same way for every device; the CPU can compute on it.
TEST(Placement, StreamingGivesTheCodesOfWorkingInPlace) {
  expect_streaming_changes_nothing(chain());
  expect_streaming_changes_nothing(torch::jit::freeze(chain()));  // weights that are constants
}

TEST(Placement, StreamingObservesInsideLoops) {
  expect_streaming_changes_nothing(compose({{"first", linear(16, 16, 1)}, {"second", linear(8, 16, 3)}}, R"(
def forward(self, x: Tensor) -> Tensor:
    for i in range(2):
        x = torch.tanh(self.first.forward(x))
    return self.second.forward(x)
)"));
}

TEST(Placement, StreamingReadsASharedWeightAtAllItsUses) {
  expect_streaming_changes_nothing(compose({{"first", linear(16, 16, 1)}, {"second", linear(16, 16, 3)}}, R"(
def forward(self, x: Tensor) -> Tensor:
    return self.first.forward(torch.tanh(self.second.forward(torch.tanh(self.first.forward(x)))))
)"));
}

}  // namespace
}  // namespace gptq::rewrite
