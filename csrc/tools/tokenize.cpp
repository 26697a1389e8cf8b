#include <algorithm>
#include <cstdint>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "model/tokenizer.h"
#include "tools/commands.h"

namespace gptq::tools {
namespace {

nlohmann::json answer(const Tokenizer& tokenizer, const std::string& line) {
  const nlohmann::json question = nlohmann::json::parse(line, nullptr, false);
  if (question.is_string()) return tokenizer.encode(question.get_ref<const std::string&>());
  const auto is_id = [](const nlohmann::json& id) { return id.is_number_integer(); };
  if (question.is_array() && std::all_of(question.begin(), question.end(), is_id)) {
    return tokenizer.decode(question.get<std::vector<int64_t>>());
  }
  throw std::runtime_error("must hold a JSON string or a JSON list of ids");
}

// A line of `in` holds a JSON string, answered with the list of its ids, or a list of ids, answered with their text.
void tokenize(const std::string& folder, std::istream& in, std::ostream& out) {
  const Tokenizer tokenizer = Tokenizer::load(folder);
  std::string line;
  for (size_t number = 1; std::getline(in, line); ++number) {
    try {
      out << answer(tokenizer, line).dump(-1, ' ', true) << '\n';
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("standard input: line " + std::to_string(number) + ": " + error.what());
    }
  }
  if (!out.flush()) throw std::runtime_error("standard output: cannot be written");
}

}  // namespace

void add_tokenize_command(CLI::App& app) {
  const auto folder = std::make_shared<std::string>();
  CLI::App* sub = app.add_subcommand(
      "tokenize", "Encode the JSON strings and decode the JSON lists of ids on the lines of standard input");
  sub->add_option("MODEL", *folder, "Folder with tokenizer.json or vocab.json and merges.txt")->required();
  sub->callback([folder] { tokenize(*folder, std::cin, std::cout); });
}

}  // namespace gptq::tools
