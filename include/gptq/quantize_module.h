#pragma once

#include <gptq/quantize_weight.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace gptq {

/// A linear computation found in a module.
struct LinearInfo {
  /// Attribute path of the weight without its last part, ".weight" or ".packed"; the first, where several modules share
  /// it. "constant_0" and so on where weights are constants, as in a frozen module; with "_transposed" behind it for a
  /// weight that is used the other way round before.
  std::string name;
  int64_t out_features = 0;
  int64_t in_features = 0;
  bool conv1d = false;     ///< weight stored as [K, N], as GPT-2's Conv1D does
  bool embedding = false;  ///< the weight is also that of an aten::embedding, as a tied lm_head's is
};

/// A linear after quantization, as linear_w4 takes it, or linear_w8 with more than 4 bits.
struct QuantizedLinear : LinearInfo {
  int64_t bits = 4;
  int64_t group_size = 128;
  at::Tensor packed;       ///< see pack_w4, and pack_w8 with more than 4 bits
  at::Tensor scales;       ///< f16 [n_groups, N]
  at::Tensor zeros;        ///< u8 [n_groups, N]; undefined if every one is 8, or 128 with more than 4 bits
  at::Tensor input_order;  ///< i32 [K], see linear_w4; undefined: none
  at::Tensor bias;         ///< [N] in the dtype of the stored bias, if it was corrected; undefined: as it was
  QuantizeReport report;
  int64_t nsamples = 0;    ///< calibration vectors seen; 0: rounded to nearest
  int64_t dropped = 0;     ///< calibration vectors left out for being NaN or Inf
  double input_error = 0;  ///< ‖x̂ - x‖ / ‖x‖, inputs behind the quantized prefix against those of the float model
  double seconds = 0;      ///< for this layer's share of the calibration pass and its quantization

  /// Bytes of the weight as it will be stored.
  int64_t bytes() const;
};

struct QuantizeModuleOptions {
  QuantizeModuleOptions() { quantize.correct_bias = true; }

  QuantizeOptions quantize;
  /// Layers for which it returns true keep their weights.
  std::function<bool(const std::string& name)> skip;
  /// The options of one layer, in place of quantize.
  std::function<QuantizeOptions(const std::string& name)> quantize_layer;
  /// For each calibration input, how much each of its vectors counts: floating point, integer or bool, as many elements
  /// as there are vectors at every linear, such as an attention mask that leaves out padding. Empty: all count 1.
  std::vector<at::Tensor> token_weights;
  /// Whether vectors with NaN or Inf are dropped and counted instead of being an error.
  bool drop_nonfinite = false;
  /// Where the work is done, the CPU or a CUDA device. The module stays where it is: what a stretch of it reads, from
  /// one linear's input to the next one's, is copied there for as long as that stretch runs, and then one weight for as
  /// long as it is quantized; the results are copied back. The activations of all calibration inputs are there, in
  /// float32 4 bytes for every element of what is alive at a linear's input, in each of the two streams. None: the work
  /// is done where the tensors are.
  std::optional<at::Device> device;
  /// Called after each layer with how many of how many are done.
  std::function<void(const QuantizedLinear& layer, size_t done, size_t total)> progress;
};

struct QuantizedModule {
  torch::jit::Module module;
  std::vector<QuantizedLinear> layers;  ///< in the order of execution
};

/// The linears of module.forward in the order of execution, found by what they compute: aten::linear, or aten::addmm,
/// mm and matmul with a two-dimensional weight of the module; also those inside the fused operators that
/// torch.nn.TransformerEncoderLayer and MultiheadAttention run in eval mode.
std::vector<LinearInfo> find_linears(const torch::jit::Module& module);

/// A gptq::linear_w4 or linear_w8 computation found in a module.
struct PackedLinearInfo : LinearInfo {
  int64_t stored_bits = 4;  ///< per code: 4 or 8
};

/// Those of module.forward in the order of execution. in_features is rounded up to a multiple of 8, since the packed
/// weight does not tell more.
std::vector<PackedLinearInfo> find_packed_linears(const torch::jit::Module& module);

/// Makes every gptq::linear_w4 and linear_w8 in the methods of a module and its submodules compute in another mode.
/// Comes before the first call of the module: what has run stays as it was compiled then.
/// @param compute "exact", "bf16" or "int8", see linear_w4; what quantize_module inserts is "exact"
/// @return how many linears that are
/// @throws c10::Error on another mode
int64_t set_linear_compute(const torch::jit::Module& module, const std::string& compute);

/// Quantizes the linears of a TorchScript module and puts gptq::linear_w4 in their place, or linear_w8 for
/// more than 4 bits.
///
/// Layer by layer in the order of execution, each calibrated on what the already quantized layers before it give
/// (true-sequential). Two streams of activations are carried along, the float model's and the quantized model's, one
/// set of live values for each calibration input.
///
/// @param module in eval mode; not changed. Its forward is inlined; a weight may be used by several linears.
/// @param calibration argument lists for forward; may be empty only in mode "rtn"
/// @return a new module with the same attribute names and only forward; float weights that nothing reads are left out
/// @throws c10::Error naming the layer where one is at fault
QuantizedModule quantize_module(const torch::jit::Module& module,
                                const std::vector<std::vector<c10::IValue>>& calibration,
                                const QuantizeModuleOptions& options = {});

}  // namespace gptq
