#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <gptq/gptq_layer.h>

#include <limits>
#include <utility>

#include "quant/gram.h"
#include "quant/product.h"
#include "quant/read_scalars.h"

namespace gptq {

/// Checked inputs as rows, f32 [n, K].
struct GPTQLayer::Batch {
  at::Tensor rows;
  at::Tensor float_rows;  ///< undefined without float inputs
  at::Tensor weights;     ///< f32 [n]; undefined if all are 1
  ColumnSums sums = {};
  ColumnSums float_sums = {};  ///< undefined without float inputs
  int64_t dropped = 0;

  int64_t size() const { return rows.size(0); }

  Batch part(int64_t first, int64_t count) const {
    const auto narrowed = [&](const at::Tensor& tensor) {
      return tensor.defined() ? tensor.narrow(0, first, count) : tensor;
    };
    return {narrowed(rows), narrowed(float_rows), narrowed(weights)};
  }

  void add_up() {
    sums = column_sums(rows, weights);
    float_sums = float_rows.defined() ? column_sums(float_rows, weights) : ColumnSums{};
  }

  void keep(const at::Tensor& rows_to_keep) {
    const at::Tensor index = rows_to_keep.nonzero().squeeze(1);
    for (at::Tensor* tensor : {&rows, &float_rows, &weights}) {
      *tensor = tensor->defined() ? tensor->index_select(0, index) : *tensor;
    }
  }
};

namespace {

at::Tensor checked_rows(const at::Tensor& input, int64_t k, at::Device device, const char* name) {
  TORCH_CHECK(input.dim() >= 1 && input.size(-1) == k, "add_batch: ", name, " must be [..., K] = [..., ", k, "], got ",
              input.sizes());
  TORCH_CHECK(input.is_floating_point(), "add_batch: ", name, " must be floating point, got ", input.scalar_type());
  TORCH_CHECK(input.device() == device, "add_batch: ", name, " must be on the device of the weight, ", device, ", got ",
              input.device());
  return input.detach().to(at::kFloat).reshape({-1, k}).contiguous();
}

at::Tensor checked_weights(const at::Tensor& token_weights, const at::Tensor& input) {
  TORCH_CHECK(token_weights.sizes() == input.sizes().slice(0, input.dim() - 1),
              "add_batch: token_weights must have the shape of input without its last dimension, ",
              input.sizes().slice(0, input.dim() - 1), ", got ", token_weights.sizes());
  const at::Tensor weights = token_weights.detach().to(input.device(), at::kFloat).reshape({-1});
  TORCH_CHECK(weights.isfinite().logical_and(weights.ge(0)).all().item<bool>(),
              "add_batch: token_weights must be finite and at least 0, got values from ",
              weights.numel() > 0 ? weights.min().item<float>() : 0, " to ",
              weights.numel() > 0 ? weights.max().item<float>() : 0);
  return weights;
}

int64_t count_nonfinite(const at::Tensor& values) {
  return values.numel() - values.isfinite().sum().item<int64_t>();
}

void add_to(at::Tensor& sum, const at::Tensor& values) {
  sum = sum.defined() ? sum.add_(values) : values;
}

}  // namespace

GPTQLayer::GPTQLayer(at::Tensor weight, std::optional<at::Tensor> bias, bool conv1d, bool halves, bool drift)
    : weight_(std::move(weight)), bias_(std::move(bias)), conv1d_(conv1d), halves_(halves), drift_(drift) {
  TORCH_CHECK(weight_.defined() && weight_.dim() == 2 && weight_.numel() > 0, "GPTQLayer: weight must be ",
              conv1d ? "[K, N]" : "[N, K]", " with N and K at least 1, got ",
              weight_.defined() ? weight_.sizes() : at::IntArrayRef{});
  TORCH_CHECK(weight_.is_floating_point(), "GPTQLayer: weight must be floating point, got ", weight_.scalar_type());
  TORCH_CHECK(weight_.is_cpu() || weight_.is_cuda(), "GPTQLayer: weight must be on the CPU or a CUDA device, got ",
              weight_.device());
  if (bias_.has_value()) {
    const int64_t n = weight_nk().size(0);
    TORCH_CHECK(bias_->dim() == 1 && bias_->size(0) == n, "GPTQLayer: bias must be [N] = [", n, "], got ",
                bias_->sizes());
    TORCH_CHECK(bias_->is_floating_point(), "GPTQLayer: bias must be floating point, got ", bias_->scalar_type());
  }
}

at::Tensor GPTQLayer::weight_nk() const {
  const at::Tensor weight = weight_.detach();
  return conv1d_ ? weight.t() : weight;
}

GPTQLayer::Batch GPTQLayer::checked_batch(const at::Tensor& input, const at::Tensor& float_input,
                                          const at::Tensor& token_weights, bool drop_nonfinite) const {
  const int64_t k = weight_nk().size(1);
  Batch batch;
  batch.rows = checked_rows(input, k, weight_.device(), "input");
  if (float_input.defined()) {
    TORCH_CHECK(float_input.sizes() == input.sizes(), "add_batch: float_input must have the shape of input, ",
                input.sizes(), ", got ", float_input.sizes());
    batch.float_rows = checked_rows(float_input, k, weight_.device(), "float_input");
  }
  if (nsamples() > 0) {
    const bool had = sums_[0].float_input.defined() || sums_[1].float_input.defined();
    TORCH_CHECK(had == float_input.defined(), "add_batch: float_input must be given with every batch or none, got ",
                had ? "none" : "one", " after ", nsamples(), had ? " with" : " without");
  }
  if (token_weights.defined()) {
    batch.weights = checked_weights(token_weights, input);
    batch.keep(batch.weights.gt(0));
  }
  if (drop_nonfinite) {
    at::Tensor finite = batch.rows.isfinite().all(1);
    if (batch.float_rows.defined()) {
      finite = finite.logical_and(batch.float_rows.isfinite().all(1));
    }
    batch.dropped = batch.size() - finite.sum().item<int64_t>();
    if (batch.dropped > 0) {
      batch.keep(finite);
    }
  }
  return batch;
}

void GPTQLayer::add_batch(const at::Tensor& input, const at::Tensor& float_input, const at::Tensor& token_weights,
                          bool drop_nonfinite) {
  const at::NoGradGuard no_grad;
  const Batch batch = checked_batch(input, float_input, token_weights, drop_nonfinite);
  if (batch.size() > 0) {
    // Halves of each batch, so that both see all kinds of input.
    const int64_t first = halves_ ? (batch.size() + nsamples() % 2) / 2 : batch.size();
    std::array<Batch, 2> halves{batch.part(0, first), batch.part(first, batch.size() - first)};
    for (Batch& half : halves) {
      half.add_up();
    }
    check_squares(halves[0].sums.squares.add(halves[1].sums.squares), batch.rows, "input");
    if (batch.float_rows.defined()) {
      check_squares(halves[0].float_sums.squares.add(halves[1].float_sums.squares), batch.float_rows, "float_input");
    }
    for (size_t half = 0; half < halves.size(); ++half) {
      add(halves[half], sums_[half]);
    }
  }
  dropped_ += batch.dropped;
}

// Off the diagonal a Gram matrix is nowhere larger than the largest entry on it.
void GPTQLayer::check_squares(const at::Tensor& squares, const at::Tensor& rows, const char* name) const {
  const at::Tensor none = at::zeros({}, squares.options());
  const auto so_far = [&](const Sums& sums) { return sums.gram.defined() ? sums.gram.diagonal().max() : none; };
  const auto [new_squares, first, second] = read_scalars(squares.max(), so_far(sums_[0]), so_far(sums_[1]));
  const double largest = new_squares + first + second;
  if (!(largest < std::numeric_limits<float>::max() / 2)) {  // a NaN is not less either
    const int64_t bad = count_nonfinite(rows);
    TORCH_CHECK(bad == 0, "add_batch: ", name, " must be finite in float32, got ", bad, " NaN or Inf values of ",
                rows.numel());
    TORCH_CHECK(false, "add_batch: ", name, " is too large: a sum of its squares is beyond float32");
  }
}

void GPTQLayer::add(const Batch& batch, Sums& sums) const {
  if (batch.size() == 0) {
    return;
  }
  const int64_t k = batch.rows.size(1);
  const at::Tensor root = batch.weights.defined() ? batch.weights.sqrt() : batch.weights;
  const auto as_columns = [&](const at::Tensor& rows) {
    return transposed(root.defined() ? rows.mul(root.unsqueeze(1)) : rows);
  };
  const at::Tensor columns = as_columns(batch.rows);
  if (!sums.gram.defined()) {
    sums.gram = at::zeros({k, k}, columns.options());
  }
  add_gram(sums.gram, columns);
  add_to(sums.input, batch.sums.values);
  if (batch.float_rows.defined()) {
    if (drift_) {
      add_to(sums.drift, coarse_product(as_columns(batch.float_rows).sub_(columns), columns));
    }
    add_to(sums.float_input, batch.float_sums.values);
  }
  sums.weight += batch.weights.defined() ? batch.weights.sum(at::kDouble).item<double>() : batch.size();
  sums.nsamples += batch.size();
}

at::Tensor GPTQLayer::hessian() const {
  const at::NoGradGuard no_grad;
  const int64_t k = weight_nk().size(1);
  at::Tensor gram;
  for (const Sums& sums : sums_) {
    if (sums.gram.defined()) {
      gram = gram.defined() ? gram.add(sums.gram) : sums.gram;
    }
  }
  return gram.defined() ? mirrored(gram, 2.0 / (sums_[0].weight + sums_[1].weight))
                        : at::zeros({k, k}, weight_.options().dtype(at::kFloat));
}

LayerStatistics GPTQLayer::statistics() const {
  const at::NoGradGuard no_grad;
  LayerStatistics statistics;
  statistics.nsamples = nsamples();
  if (nsamples() == 0) {
    return statistics;
  }
  const double weight = sums_[0].weight + sums_[1].weight;
  const auto over_both = [&](at::Tensor Sums::* member, double share) {
    at::Tensor total;
    for (const Sums& sums : sums_) {
      if ((sums.*member).defined()) {
        total = total.defined() ? total.add(sums.*member) : sums.*member;
      }
    }
    return total.defined() ? total.mul(share / weight) : total;
  };
  statistics.hessian = hessian();
  statistics.drift = over_both(&Sums::drift, 2);
  statistics.mean = over_both(&Sums::input, 1);
  statistics.float_mean = over_both(&Sums::float_input, 1);
  const Sums& half = sums_[1];
  if (sums_[0].nsamples > 0 && half.nsamples > 0) {
    statistics.half_hessian = mirrored(half.gram, 2.0 / half.weight);
    statistics.half_drift = half.drift.defined() ? half.drift.mul(2.0 / half.weight) : half.drift;
  }
  return statistics;
}

std::vector<at::Tensor> GPTQLayer::state() const {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> state;
  for (const Sums& sums : sums_) {
    for (const at::Tensor& tensor : {sums.gram, sums.drift, sums.input, sums.float_input}) {
      state.push_back(tensor.defined() ? tensor.clone() : at::empty({0}));
    }
    state.push_back(at::tensor({sums.weight, static_cast<double>(sums.nsamples)}, at::kDouble));
  }
  state.push_back(at::tensor({dropped_}, at::kLong));
  return state;
}

void GPTQLayer::set_state(const std::vector<at::Tensor>& state) {
  const at::NoGradGuard no_grad;
  const int64_t k = weight_nk().size(1);
  constexpr size_t per_half = 5;
  TORCH_CHECK(state.size() == 2 * per_half + 1, "set_state: state must hold ", 2 * per_half + 1, " tensors, got ",
              state.size());
  const auto read = [&](size_t index, at::IntArrayRef sizes, at::ScalarType dtype) {
    const at::Tensor& tensor = state[index];
    TORCH_CHECK(tensor.numel() == 0 || tensor.sizes() == sizes, "set_state: tensor ", index, " must be empty or ",
                sizes, ", got ", tensor.sizes());
    return tensor.numel() == 0 ? at::Tensor()
                               : tensor.detach().to(weight_.device(), dtype, /*non_blocking=*/false, /*copy=*/true);
  };
  std::array<Sums, 2> sums;
  for (size_t half = 0; half < sums.size(); ++half) {
    const size_t first = half * per_half;
    sums[half].gram = read(first, {k, k}, at::kFloat);
    sums[half].drift = read(first + 1, {k, k}, at::kFloat);
    sums[half].input = read(first + 2, {k}, at::kDouble);
    sums[half].float_input = read(first + 3, {k}, at::kDouble);
    const at::Tensor counts = read(first + 4, {2}, at::kDouble);
    TORCH_CHECK(counts.defined() && counts.ge(0).all().item<bool>(), "set_state: counts must be at least 0");
    sums[half].weight = counts[0].item<double>();
    sums[half].nsamples = static_cast<int64_t>(counts[1].item<double>());
    const bool has_inputs = sums[half].nsamples > 0;
    TORCH_CHECK(has_inputs == sums[half].gram.defined() && has_inputs == sums[half].input.defined() &&
                    (sums[half].float_input.defined() || !sums[half].drift.defined()) &&
                    (!has_inputs || sums[half].weight > 0),
                "set_state: sums and counts must be there together");
    TORCH_CHECK(!sums[half].float_input.defined() || sums[half].drift.defined() == drift_,
                "set_state: state must be that of a layer with drift ", drift_ ? "true" : "false", ", is not");
  }
  const at::Tensor dropped = read(2 * per_half, {1}, at::kLong);
  sums_ = std::move(sums);
  dropped_ = dropped.defined() ? dropped.item<int64_t>() : 0;
}

QuantizeResult GPTQLayer::quantize(const QuantizeOptions& options) const {
  TORCH_CHECK(nsamples() > 0 || options.mode == "rtn", "GPTQLayer: quantize in mode \"", options.mode,
              "\" needs at least one input from add_batch, got none");
  LayerStatistics gathered = statistics();
  if (!bias_.has_value()) {
    gathered.mean = at::Tensor();
  }
  return quantize_weight(weight_nk(), gathered, options);
}

void GPTQLayer::write_back(const QuantizeResult& result) {
  const at::NoGradGuard no_grad;
  at::Tensor target = conv1d_ ? weight_.t() : weight_;
  TORCH_CHECK(result.codes.defined() && result.codes.sizes() == target.sizes(),
              "write_back: codes must be [N, K] = ", target.sizes(), ", got ",
              result.codes.defined() ? result.codes.sizes() : at::IntArrayRef{});
  const at::Tensor values = result.dequantize().to(target.scalar_type());
  TORCH_CHECK(values.isfinite().all().item<bool>(), "write_back: the dequantized weight must be finite in the ",
              target.scalar_type(), " of the layer's weight, got values beyond it");
  TORCH_CHECK(!result.bias_shift.defined() || bias_.has_value(),
              "write_back: result must have no bias_shift where the layer has no bias, got one");
  target.copy_(values);
  if (result.bias_shift.defined()) {
    bias_->add_(result.bias_shift.to(bias_->scalar_type()));
  }
}

}  // namespace gptq
