#include <torch/script.h>

#include <memory>

#include "quant/factor.h"
#include "quant/grid.h"
#include "quant/plan.h"
#include "quant/sweep.h"
#include "tools/lab_common.h"
#include "tools/progress.h"

namespace gptq::tools {
namespace {

constexpr float kSmallestHalf = 5.9604644775390625e-8f;  // 2^-24

using Layers = std::vector<std::pair<std::string, at::Tensor>>;

// One linear layer on the grid of the study, everything in float64.
struct Toy {
  at::Tensor weight;  // [N, K]
  Plan plan;
  Grid grid;

  at::Tensor values(const at::Tensor& codes) const {
    return dequantize_codes(codes, grid.scales, grid.zeros, grid.group_size, at::kDouble);
  }
};

// Scale max|w| / (2^(bits-1) - 1), rounded to float16; a group of zeros has scale 1. Codes are -2^(bits-1) and up. The
// library's own symmetric grid has 2 max|w| / (2^bits - 1) instead, so quantize_weight cannot be called here.
Toy toy_layer(const at::Tensor& weight, const QuantizeOptions& options) {
  const int64_t n = weight.size(0), k = weight.size(1);
  const Plan plan = make_plan(options, k);
  Toy toy{weight, plan, minmax_grid(weight, plan)};
  const int64_t n_groups = toy.grid.scales.size(0), padding = n_groups * plan.group_size - k;
  const at::Tensor groups = at::constant_pad_nd(weight.abs(), {0, padding}).view({n, n_groups, plan.group_size});
  const auto largest_code = static_cast<double>((int64_t{1} << (options.bits - 1)) - 1);
  at::Tensor scales = groups.amax(2).div_(largest_code).to(at::kHalf);
  TORCH_CHECK(scales.isfinite().all().item<bool>(), "--std: must leave scales within float16, at most 65504");
  scales = scales.clamp_min(kSmallestHalf).masked_fill_(groups.amax(2).eq(0), 1.0);
  toy.grid.scales.copy_(scales.t());
  return toy;
}

at::Tensor damped(const at::Tensor& hessian, double damping) {
  at::Tensor result = hessian.clone();
  result.diagonal().add_(damping * hessian.diagonal().mean().item<double>());
  return result;
}

at::Tensor gptq_codes(const Toy& toy, const at::Tensor& damped_hessian, bool act_order) {
  const at::Tensor order = act_order ? at::argsort(damped_hessian.diagonal(), /*stable=*/true, 0, /*descending=*/true)
                                     : at::arange(toy.weight.size(1));
  Grid grid = toy.grid;  // shares its tensors, which the sweep leaves as they are
  return sweep(toy.weight, factorise(damped_hessian, order, 0), toy.plan, grid).codes;
}

at::Tensor row_losses(const at::Tensor& error, const at::Tensor& hessian) {
  return error.mm(hessian).mul_(error).sum(1);
}

double total(const at::Tensor& values) {
  return values.sum().item<double>();
}

// The Hessians of one set of inputs.
struct Calibration {
  at::Tensor plain;   // X Xᵀ / n
  at::Tensor damped;  // what the study measures its losses with
  at::Tensor fresh;   // X Xᵀ / n of other inputs from the same distribution
};

struct Losses {
  at::Tensor rows;  // with the damped Hessian
  double loss = 0;
  double undamped = 0;
  double fresh = 0;
  double mse = 0;
};

Losses losses_of(const at::Tensor& error, const Calibration& calibration) {
  Losses losses;
  losses.rows = row_losses(error, calibration.damped);
  losses.loss = total(losses.rows);
  losses.undamped = total(row_losses(error, calibration.plain));
  losses.fresh = total(row_losses(error, calibration.fresh));
  losses.mse = error.square().mean().item<double>();
  return losses;
}

Json losses_json(const Losses& losses, const Losses& rtn) {
  const auto* rows = losses.rows.const_data_ptr<double>();
  return {{"loss", losses.loss},
          {"ratio", losses.loss / rtn.loss},
          {"loss_undamped", losses.undamped},
          {"ratio_undamped", losses.undamped / rtn.undamped},
          {"loss_fresh", losses.fresh},
          {"ratio_fresh", losses.fresh / rtn.fresh},
          {"mse", losses.mse},
          {"ratio_mse", losses.mse / rtn.mse},
          {"worse_rows", losses.rows.gt(rtn.rows).sum().item<int64_t>()},
          {"row_loss", std::vector<double>(rows, rows + losses.rows.numel())}};
}

// Pearson's correlation, over rows, of the loss of rounding and of what is gained over it.
double gain_correlation(const Losses& losses, const Losses& rtn) {
  return at::corrcoef(at::stack({rtn.rows, rtn.rows.sub(losses.rows)}))[0][1].item<double>();
}

// (Σ λ)² / Σ λ² of the Hessian's eigenvalues: how many directions the inputs take up.
double effective_rank(const at::Tensor& hessian) {
  const double trace = total(hessian.diagonal());
  return trace * trace / hessian.square().sum().item<double>();
}

struct ToyStudy {
  Study study{"toy"};
  WeightFlags shape{768, 768};
  int64_t samples = 128;
  int64_t fresh_samples = 4096;
  int64_t group_size = 64;
  int64_t bits = 4;
  double damping = 0.01;
  std::string mode = "default";
  std::vector<double> dampings{0.0001, 0.001, 0.01, 0.1, 1};
  std::vector<int64_t> sample_counts{32, 128, 512, 2048, 8192, 32768};

  void run();

 private:
  QuantizeOptions options() const;
  at::Tensor inputs(bool heavy_tailed, int64_t count, at::Generator generator) const;
  Calibration calibration(bool heavy_tailed, int64_t count, at::Generator generator, uint64_t purpose) const;
  Json compare(const Toy& toy, const std::string& name, const Calibration& hessians, Layers& layers) const;
  Json sweep_damping(const Toy& toy, const Calibration& hessians) const;
  Json sweep_samples(const Toy& toy, Progress& progress) const;
};

QuantizeOptions ToyStudy::options() const {
  QuantizeOptions options;
  options.bits = bits;
  options.group_size = group_size;
  options.mode = mode;
  options.damping = damping;
  return options;
}

// [K, n]
at::Tensor ToyStudy::inputs(bool heavy_tailed, int64_t count, at::Generator generator) const {
  const at::Tensor x = heavy_tailed ? at::empty({shape.columns, count}).cauchy_(0, 1, std::move(generator))
                                    : at::randn({shape.columns, count}, std::move(generator), at::kFloat);
  return x.to(at::kDouble);
}

Calibration ToyStudy::calibration(bool heavy_tailed, int64_t count, at::Generator generator, uint64_t purpose) const {
  const auto hessian = [](const at::Tensor& x) { return x.mm(x.t()).div_(static_cast<double>(x.size(1))); };
  Calibration result;
  result.plain = hessian(inputs(heavy_tailed, count, std::move(generator)));
  result.damped = damped(result.plain, damping);
  result.fresh = hessian(inputs(heavy_tailed, fresh_samples, study.generator(purpose)));
  return result;
}

Json ToyStudy::compare(const Toy& toy, const std::string& name, const Calibration& hessians, Layers& layers) const {
  const at::Tensor rtn_codes = round_to_grid(toy.weight, toy.grid);
  const at::Tensor rtn_values = toy.values(rtn_codes);
  const Losses rtn = losses_of(toy.weight.sub(rtn_values), hessians);
  Json methods;
  methods["rtn"] = losses_json(rtn, rtn);
  const auto add = [&](const std::string& method, const at::Tensor& values) {
    const Losses losses = losses_of(toy.weight.sub(values), hessians);
    methods[method] = losses_json(losses, rtn);
    methods[method]["gain_correlation"] = gain_correlation(losses, rtn);
    layers.emplace_back(name + "." + method, values.to(at::kFloat));
  };
  layers.emplace_back(name + ".rtn", rtn_values.to(at::kFloat));
  for (const bool act_order : {false, true}) {
    const at::Tensor codes = gptq_codes(toy, hessians.damped, act_order);
    const std::string method = act_order ? "gptq_act_order" : "gptq";
    add(method, toy.values(codes));
    methods[method]["changed"] = codes.ne(rtn_codes).sum().item<int64_t>();
    methods[method]["changed_share"] = codes.ne(rtn_codes).to(at::kDouble).mean().item<double>();
  }
  add("library", quantize_weight(toy.weight, hessians.plain, options()).dequantize().to(at::kDouble));
  return {{"inputs", name},
          {"effective_rank", effective_rank(hessians.plain)},
          {"fresh_effective_rank", effective_rank(hessians.fresh)},
          {"diagonal_mean", hessians.plain.diagonal().mean().item<double>()},
          {"diagonal_median", hessians.plain.diagonal().median().item<double>()},
          {"methods", methods},
          {"dampings", sweep_damping(toy, hessians)}};
}

// What becomes of the ratios as the damping that GPTQ is given changes.
Json ToyStudy::sweep_damping(const Toy& toy, const Calibration& hessians) const {
  const Losses rtn = losses_of(toy.weight.sub(toy.values(round_to_grid(toy.weight, toy.grid))), hessians);
  Json points = Json::array();
  for (const double share : dampings) {
    Json point{{"damping", share}};
    for (const bool act_order : {false, true}) {
      const at::Tensor codes = gptq_codes(toy, damped(hessians.plain, share), act_order);
      const Losses gptq = losses_of(toy.weight.sub(toy.values(codes)), hessians);
      point[act_order ? "gptq_act_order" : "gptq"] = {{"ratio_undamped", gptq.undamped / rtn.undamped},
                                                      {"ratio_fresh", gptq.fresh / rtn.fresh},
                                                      {"ratio_mse", gptq.mse / rtn.mse}};
    }
    points.push_back(point);
  }
  return points;
}

// What becomes of the ratio as more normal inputs are seen.
Json ToyStudy::sweep_samples(const Toy& toy, Progress& progress) const {
  const at::Tensor rtn_error = toy.weight.sub(toy.values(round_to_grid(toy.weight, toy.grid)));
  Json points = Json::array();
  for (size_t i = 0; i < sample_counts.size(); ++i) {
    const Calibration hessians = calibration(false, sample_counts[i], study.generator(4 + i), 2);
    const at::Tensor error = toy.weight.sub(toy.values(gptq_codes(toy, hessians.damped, false)));
    const Losses rtn = losses_of(rtn_error, hessians), gptq = losses_of(error, hessians);
    points.push_back({{"samples", sample_counts[i]},
                      {"effective_rank", effective_rank(hessians.plain)},
                      {"ratio", gptq.loss / rtn.loss},
                      {"ratio_undamped", gptq.undamped / rtn.undamped},
                      {"ratio_fresh", gptq.fresh / rtn.fresh},
                      {"ratio_mse", gptq.mse / rtn.mse}});
    progress.update(i + 3, sample_counts.size() + 2, std::to_string(sample_counts[i]) + " samples");
  }
  return points;
}

void print_method(const Json& run, const char* method, const char* label) {
  const Json& values = run["methods"][method];
  std::printf("%-8s %-18s %12.5g %8.4f %12.4f %12.4f", run["inputs"].get<std::string>().c_str(), label,
              values["loss"].get<double>(), values["ratio"].get<double>(), values["ratio_fresh"].get<double>(),
              values["ratio_mse"].get<double>());
  if (values.contains("changed_share")) {
    std::printf(" %9.2f%%", 100 * values["changed_share"].get<double>());
  }
  std::printf("\n");
}

void ToyStudy::run() {
  study.begin();
  Json results;
  Layers layers;
  {
    Progress progress("toy");
    const size_t steps = sample_counts.size() + 2;
    // The weight and the inputs come one after the other, as they do after torch.manual_seed.
    const at::Generator generator = study.generator();
    const Toy toy = toy_layer(shape.draw(generator).to(at::kDouble), options());
    layers.emplace_back("weight", toy.weight.to(at::kFloat));
    results["runs"] = Json::array();
    results["runs"].push_back(compare(toy, "normal", calibration(false, samples, generator, 2), layers));
    progress.update(1, steps, "normal inputs");
    results["runs"].push_back(compare(toy, "cauchy", calibration(true, samples, study.generator(1), 3), layers));
    progress.update(2, steps, "heavy-tailed inputs");
    results["samples"] = sweep_samples(toy, progress);
  }
  study.finish(results, layers);
  std::printf("%-8s %-18s %12s %8s %12s %12s %10s\n", "inputs", "method", "loss", "ratio", "fresh ratio", "MSE ratio",
              "changed");
  for (const Json& run : results["runs"]) {
    print_method(run, "rtn", "round to nearest");
    print_method(run, "gptq", "GPTQ");
    print_method(run, "gptq_act_order", "GPTQ, act-order");
    print_method(run, "library", "library");
  }
}

}  // namespace

void add_toy_study(CLI::App& lab) {
  const auto command = std::make_shared<ToyStudy>();
  ToyStudy& toy = *command;
  CLI::App* sub = lab.add_subcommand("toy", "One layer: what GPTQ gains over rounding to nearest, and where it fails");
  toy.study.add_to(*sub);
  toy.shape.add_to(*sub, toy.study);
  toy.study.setting(*sub, "samples", toy.samples, "Inputs to calibrate on")->check(CLI::PositiveNumber);
  toy.study.setting(*sub, "fresh-samples", toy.fresh_samples, "Other inputs to measure on")->check(CLI::PositiveNumber);
  toy.study.setting(*sub, "group-size", toy.group_size, "Inputs that share a scale; -1: one group per row")
      ->check(group_size_check());
  toy.study.setting(*sub, "bits", toy.bits, "Bits per weight")->check(CLI::Range(2, 8));
  toy.study.setting(*sub, "damping", toy.damping, "Share of the Hessian diagonal's mean that is added to it")
      ->check(CLI::PositiveNumber);
  toy.study.setting(*sub, "mode", toy.mode, "Mode of the library that is run beside: default or classic")
      ->check(CLI::IsMember({"default", "classic"}));
  toy.study.setting(*sub, "dampings", toy.dampings, "Values of the damping to repeat GPTQ with")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  toy.study.setting(*sub, "sample-counts", toy.sample_counts, "Numbers of inputs to repeat the comparison with")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  sub->callback([command] { command->run(); });
}

}  // namespace gptq::tools
