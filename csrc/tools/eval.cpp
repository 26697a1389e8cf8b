#include <memory>

#include "tools/commands.h"
#include "tools/device.h"
#include "tools/model_input.h"
#include "tools/progress.h"
#include "tools/report.h"

namespace gptq::tools {
namespace {

struct EvalCommand {
  ModelInput input;
  WindowInput windows;
  std::string text;
  std::string reference;
  std::string json;
  std::string device = "cpu";
  std::string compute;

  void run() const;
};

void EvalCommand::run() const {
  const at::Device target = open_device(device);
  LoadedModel model = input.load();
  const std::vector<int64_t> ids = windows.read(text, model, input.load_tokenizer());
  const EvaluationOptions options = windows.resolve(model);
  set_compute(model, compute);
  move_to(model, target);
  std::vector<torch::jit::Module> models{model.module};
  if (!reference.empty()) {
    LoadedModel float_model = load_model(reference);
    move_to(float_model, target);
    models.insert(models.begin(), float_model.module);
  }
  JsonOutput output(json);
  std::vector<Evaluation> evaluations;
  {
    Progress progress("scoring");
    evaluations =
        evaluate(models, ids, options, [&](int64_t done, int64_t total) { progress.update(done, total, "windows"); });
  }
  Json report;
  if (reference.empty()) {
    report["perplexity"]["baseline"] = evaluations[0].perplexity;
  } else {
    report["perplexity"] = {{"baseline", evaluations[0].perplexity}, {"quantized", evaluations[1].perplexity}};
    report["kl_divergence"]["quantized"] = *evaluations[1].mean_kl;
    report["top1_agreement"]["quantized"] = *evaluations[1].top1_agreement;
  }
  report["tokens_scored"] = evaluations[0].tokens_scored;
  report["window"] = options.window;
  report["stride"] = options.effective_stride();
  output.write(report);
  print_evaluations(reference.empty() ? std::vector<std::string>{"model"} : std::vector<std::string>{"float", "model"},
                    evaluations, options);
}

}  // namespace

void add_eval_command(CLI::App& app) {
  const auto command = std::make_shared<EvalCommand>();
  CLI::App* sub = app.add_subcommand("eval", "Perplexity of a text under a model");
  command->input.add_to(*sub);
  sub->add_option("--text", command->text, "Text to score")->required();
  command->windows.add_to(*sub);
  sub->add_option("--reference", command->reference, "Float model to report the KL divergence from");
  add_device_option(*sub, command->device);
  add_compute_option(*sub, command->compute);
  sub->add_option("--json", command->json, "File to write the result to");
  sub->callback([command] { command->run(); });
}

}  // namespace gptq::tools
