#include "tools/commands.h"

namespace gptq::tools {

void add_bench_command(CLI::App& app) {
  CLI::App* sub = app.add_subcommand("bench", "Measure speed beside the peers, in one process");
  sub->require_subcommand(1);
  add_bench_linear_command(*sub);
  add_bench_model_command(*sub);
  add_bench_quantize_command(*sub);
}

}  // namespace gptq::tools
