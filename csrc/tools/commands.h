#pragma once

#include <CLI/CLI.hpp>

namespace gptq::tools {

// Each adds one subcommand to the driver. Its work is done when the arguments have been parsed; errors are thrown.
void add_quantize_command(CLI::App& app);
void add_bench_command(CLI::App& app);
void add_bench_linear_command(CLI::App& bench);
void add_bench_model_command(CLI::App& bench);
void add_bench_quantize_command(CLI::App& bench);
void add_convert_command(CLI::App& app);
void add_eval_command(CLI::App& app);
void add_generate_command(CLI::App& app);
void add_inspect_command(CLI::App& app);
void add_tokenize_command(CLI::App& app);
void add_lab_command(CLI::App& app);

}  // namespace gptq::tools
