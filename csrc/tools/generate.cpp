#include "model/generate.h"

#include <ATen/Parallel.h>

#include <cstdio>
#include <memory>

#include "tools/commands.h"
#include "tools/device.h"
#include "tools/model_input.h"
#include "tools/report.h"

namespace gptq::tools {
namespace {

struct GenerateCommand {
  ModelInput input;
  std::string prompt;
  std::string json;
  std::string device = "cpu";
  std::string compute;
  GenerateOptions options;

  void run();
};

void GenerateCommand::run() {
  const at::Device target = open_device(device);
  LoadedModel model = input.load();
  const Tokenizer tokenizer = input.load_tokenizer();
  const std::vector<int64_t> ids = tokenizer.encode(prompt);
  TORCH_CHECK(!ids.empty(), "--prompt: must hold at least one token, got an empty text");
  options.context_length = model.context_length;
  if (const auto end = tokenizer.end_of_text()) {
    options.eos_token_ids.push_back(*end);
  }
  JsonOutput output(json);
  set_compute(model, compute);
  move_to(model, target);
  const std::vector<int64_t> tokens = generate(model.module, ids, options);
  const std::string text = tokenizer.decode(tokens);
  output.write({{"prompt", prompt}, {"text", text}, {"tokens", tokens}});
  std::printf("%s%s\n", prompt.c_str(), text.c_str());
}

}  // namespace

void add_generate_command(CLI::App& app) {
  const auto command = std::make_shared<GenerateCommand>();
  CLI::App* sub = app.add_subcommand("generate", "Continue a prompt");
  command->input.add_to(*sub);
  sub->add_option("--prompt", command->prompt, "Text to continue")->required();
  sub->add_option("--max-new-tokens", command->options.max_new_tokens, "Tokens to generate")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  sub->add_option("--temperature", command->options.temperature, "0 is greedy")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  sub->add_option("--top-k", command->options.top_k, "Draw from this many most likely tokens; 0: from all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  sub->add_option("--seed", command->options.seed, "Seed of the draws")->capture_default_str();
  add_device_option(*sub, command->device);
  add_compute_option(*sub, command->compute);
  sub->add_option("--json", command->json, "File to write the result to");
  sub->callback([command] { command->run(); });
}

}  // namespace gptq::tools
