#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <map>
#include <memory>
#include <string>

namespace gptq::rewrite {

/// Builds a module around a flat graph: the attributes that the graph reads under their old paths, each submodule with
/// a type of its own (two layers that shared a type may now hold different tensors), and forward.
class FlatModule {
 public:
  /// @param graph taken over; reads its attributes from `source`
  FlatModule(const torch::jit::Module& source, std::shared_ptr<torch::jit::Graph> graph);

  torch::jit::Graph& graph() { return *graph_; }

  /// Registers a new tensor as a buffer and inserts the nodes that read it at the graph's insert point.
  torch::jit::Value* insert_buffer(const std::string& path, const at::Tensor& tensor);

  /// Moves every attribute still read over from the source, defines forward and returns the module.
  torch::jit::Module finish();

 private:
  torch::jit::Module& submodule(const std::string& path);
  torch::jit::Value* insert_read(const std::string& path);
  void carry_over(const std::string& path);

  torch::jit::Module source_;
  std::shared_ptr<torch::jit::Graph> graph_;
  std::shared_ptr<torch::jit::CompilationUnit> unit_;
  std::map<std::string, torch::jit::Module> submodules_;
};

}  // namespace gptq::rewrite
