#include <c10/util/Exception.h>
#include <malloc.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>

#include "tools/commands.h"

namespace {

/// Errors are one line each, whatever was thrown.
int fail(std::string message) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  message.erase(message.find_last_not_of(' ') + 1);
  std::fprintf(stderr, "gptq: %s\n", message.c_str());
  return 1;
}

// For the C library's allocator, where tcmalloc was not there to be linked: activations live across layers in an order
// that leaves gaps in its heap, and without this quantizing takes twice the memory. Blocks from here on are mapped by
// themselves and go back to the system when freed.
constexpr int kMappedBlockBytes = 2 << 20;

}  // namespace

int main(int argc, char** argv) {
  mallopt(M_MMAP_THRESHOLD, kMappedBlockBytes);
  CLI::App app{"Quantize GPT-2 and other TorchScript models to INT4 with GPTQ, and run the result."};
  app.set_version_flag("--version", GPTQ_VERSION);
  app.require_subcommand(1);
  gptq::tools::add_quantize_command(app);
  gptq::tools::add_convert_command(app);
  gptq::tools::add_eval_command(app);
  gptq::tools::add_generate_command(app);
  gptq::tools::add_inspect_command(app);
  gptq::tools::add_tokenize_command(app);
  gptq::tools::add_bench_command(app);
  gptq::tools::add_lab_command(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {
      return app.exit(error);  // --help and --version
    }
    return fail(error.what());
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(error.what());
  }
  return 0;
}
