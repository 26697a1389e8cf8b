#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/script.h>

#include <algorithm>
#include <functional>
#include <memory>

#include "model/generate.h"
#include "tools/bench_common.h"
#include "tools/commands.h"
#include "tools/device.h"
#include "tools/model_input.h"

namespace gptq::tools {
namespace {

constexpr int64_t kVocabulary = 256;  // token ids are drawn from the first of them, which every model has

struct BenchModel {
  ModelInput input;
  std::string reference;
  int64_t prefill_tokens = 512;
  int64_t prompt_tokens = 128;
  int64_t decode_tokens = 32;
  int64_t rounds = 5;
  std::string json;
  std::string device = "cpu";
  std::string compute;

  void run();

 private:
  Times prefill(LoadedModel& float_model, LoadedModel& model) const;
  Times decode(LoadedModel& float_model, LoadedModel& model) const;
};

std::vector<int64_t> random_tokens(int64_t count) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(42);
  const at::Tensor ids = at::randint(0, kVocabulary, {count}, generator, at::kLong);
  return {ids.const_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>() + count};
}

void check_context(const LoadedModel& model, int64_t tokens, const char* flag) {
  TORCH_CHECK(!model.context_length || tokens <= *model.context_length, flag, ": must fit the context length of ",
              model.source, ", ", model.context_length.value_or(0), " tokens, got ", tokens);
}

Times BenchModel::prefill(LoadedModel& float_model, LoadedModel& model) const {
  const at::Tensor ids = at::tensor(random_tokens(prefill_tokens), at::kLong).unsqueeze(0);
  const auto run = [&](LoadedModel& used) { synchronize(forward_logits(used.module, ids).device()); };
  return interleave({{"float", [&] { run(float_model); }}, {"model", [&] { run(model); }}}, rounds);
}

// What generate needs for the new tokens, without what it needs for the prompt.
Times BenchModel::decode(LoadedModel& float_model, LoadedModel& model) const {
  const std::vector<int64_t> prompt = random_tokens(prompt_tokens);
  const auto continue_by = [&](LoadedModel& used, int64_t tokens) {
    GenerateOptions options;
    options.max_new_tokens = tokens;
    generate(used.module, prompt, options);
  };
  Times times = interleave({{"float", [&] { continue_by(float_model, decode_tokens + 1); }},
                            {"float prompt", [&] { continue_by(float_model, 1); }},
                            {"model", [&] { continue_by(model, decode_tokens + 1); }},
                            {"model prompt", [&] { continue_by(model, 1); }}},
                           rounds);
  for (const char* name : {"float", "model"}) {
    const std::vector<double>& prompts = times.at(std::string(name) + " prompt");
    std::transform(times[name].begin(), times[name].end(), prompts.begin(), times[name].begin(), std::minus<double>());
    times.erase(std::string(name) + " prompt");
  }
  return times;
}

Json tokens_json(const Times& times, int64_t tokens, const char* what) {
  const auto per_second = [&](const char* name) { return static_cast<double>(tokens) / median(times.at(name)); };
  const std::vector<double> ratios = speedups(times, "model", "float");
  std::printf("%-8s float %9.1f tokens/s   model %9.1f tokens/s   %.2fx\n", what, per_second("float"),
              per_second("model"), median(ratios));
  std::fflush(stdout);
  return {{"tokens", tokens},
          {"float_tokens_per_second", per_second("float")},
          {"model_tokens_per_second", per_second("model")},
          {"speedup", spread(ratios)},
          {"seconds", seconds_json(times)}};
}

void BenchModel::run() {
  const c10::InferenceMode inference;
  const at::Device target = open_device(device);
  LoadedModel model = input.load(), float_model = load_model(reference);
  for (const LoadedModel* each : {&model, &float_model}) {
    check_context(*each, prefill_tokens, "--prefill-tokens");
    check_context(*each, prompt_tokens + decode_tokens + 1, "--decode-tokens with --prompt-tokens");
  }
  JsonOutput output(json);
  set_compute(model, compute);
  move_to(model, target);
  move_to(float_model, target);
  const Json prefilled = tokens_json(prefill(float_model, model), prefill_tokens, "prefill");
  const Json decoded = tokens_json(decode(float_model, model), decode_tokens, "decode");
  output.write(Json{{"device", target.str()},
                    {"threads", at::get_num_threads()},
                    {"rounds", rounds},
                    {"prompt_tokens", prompt_tokens},
                    {"prefill", prefilled},
                    {"decode", decoded}});
}

}  // namespace

void add_bench_model_command(CLI::App& app) {
  const auto bench = std::make_shared<BenchModel>();
  CLI::App* sub = app.add_subcommand("model", "Tokens per second of a quantized model beside the float one");
  bench->input.add_to(*sub);
  sub->add_option("--reference", bench->reference, "Float model")->required();
  const auto count = [&](const char* flag, int64_t& value, const char* help) {
    sub->add_option(flag, value, help)->capture_default_str()->check(CLI::PositiveNumber);
  };
  count("--prefill-tokens", bench->prefill_tokens, "Tokens of the call that is timed for prefill");
  count("--prompt-tokens", bench->prompt_tokens, "Tokens in the cache before decoding");
  count("--decode-tokens", bench->decode_tokens, "Tokens decoded one by one");
  count("--rounds", bench->rounds, "Rounds");
  add_device_option(*sub, bench->device);
  add_compute_option(*sub, bench->compute);
  sub->add_option("--json", bench->json, "File to write the result to");
  sub->callback([bench] { bench->run(); });
}

}  // namespace gptq::tools
