#include "tools/commands.h"
#include "tools/lab_common.h"

namespace gptq::tools {

void add_lab_command(CLI::App& app) {
  CLI::App* lab =
      app.add_subcommand("lab", "Studies of GPTQ on random layers; scripts/plot_lab.py plots their results");
  lab->require_subcommand(1);
  add_toy_study(*lab);
  add_group_size_study(*lab);
  add_calibration_study(*lab);
  add_bits_study(*lab);
}

}  // namespace gptq::tools
