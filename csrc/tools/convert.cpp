#include <cstdio>
#include <memory>

#include "model/atomic_output.h"
#include "model/checkpoint.h"
#include "model/gguf_gpt2.h"
#include "model/json_file.h"
#include "tools/commands.h"

namespace gptq::tools {
namespace {

struct ConvertCommand {
  std::string input;
  std::string output;
  std::string format;

  void run() const;
};

void ConvertCommand::run() const {
  if (format == "gguf") {
    check_output_file(output);
    convert_to_gguf(input, output);
  } else {
    check_output_folder(output);
    convert_checkpoint(input, output, format_named(format).value(), {{"quantizer", {"libgptq:" GPTQ_VERSION}}});
  }
  std::printf("%s: written in the format %s\n", output.c_str(), format.c_str());
}

}  // namespace

void add_convert_command(CLI::App& app) {
  const auto command = std::make_shared<ConvertCommand>();
  CLI::App* sub = app.add_subcommand("convert", "Write a quantized model folder in another format");
  sub->add_option("IN", command->input, "Quantized Hugging Face folder")->required();
  sub->add_option("OUT", command->output, "Folder, or file with --format gguf, to write the result to")->required();
  sub->add_option("--format", command->format,
                  "gptq (of GPTQModel, AutoGPTQ and transformers), compressed-tensors (its pack-quantized, of vLLM), "
                  "libgptq, or "
                  "gguf (a file for llama.cpp; refused where it cannot hold exactly the same weights)")
      ->required()
      ->check(CLI::IsMember({"libgptq", "gptq", "compressed-tensors", "gguf"}));
  sub->callback([command] { command->run(); });
}

}  // namespace gptq::tools
