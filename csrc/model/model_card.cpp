#include "model/model_card.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <sstream>
#include <string_view>

#include "model/mapped_file.h"

namespace gptq {

namespace fs = std::filesystem;

namespace {

constexpr std::array<std::string_view, 5> kInherited = {"language", "license", "license_link", "license_name",
                                                        "pipeline_tag"};
constexpr std::string_view kSectionStart = "<!-- loading -->\n";
constexpr std::string_view kSectionEnd = "<!-- /loading -->\n";
/// Cards are text for people; what is larger is none.
constexpr uint64_t kMaxCardBytes = 4 << 20;

bool is_alphanumeric(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

// Neither references to other lines nor anything else that means something to YAML or a terminal.
bool is_plain(const std::string& line) {
  constexpr std::string_view kPlain = " ._:/+-()[],'\"@";
  return std::all_of(line.begin(), line.end(),
                     [&](char c) { return is_alphanumeric(c) || kPlain.find(c) != std::string_view::npos; });
}

const char* loading_text(CheckpointFormat format) {
  switch (format) {
    case CheckpointFormat::kLibgptq:
      return "The weights are in the format of libgptq:\n\n"
             "```sh\n"
             "gptq generate FOLDER --prompt 'Once upon a time'\n"
             "gptq eval FOLDER --text heldout.txt\n"
             "gptq convert FOLDER OUT --format gptq   # for gptqmodel and transformers\n"
             "```\n\n"
             "```python\n"
             "import gptq.huggingface\n"
             "from transformers import AutoModelForCausalLM\n\n"
             "model = AutoModelForCausalLM.from_pretrained('FOLDER')\n"
             "```\n";
    case CheckpointFormat::kGptq:
      return "The weights are in the GPTQ format:\n\n"
             "```python\n"
             "from gptqmodel import GPTQModel\n\n"
             "model = GPTQModel.load('FOLDER')\n"
             "```\n\n"
             "libgptq takes the folder too: `gptq generate FOLDER --prompt 'Once upon a time'`.\n";
    case CheckpointFormat::kCompressedTensors:
      return "The weights are in the format `pack-quantized` of compressed-tensors. libgptq takes the folder as it "
             "is:\n\n"
             "```sh\n"
             "gptq generate FOLDER --prompt 'Once upon a time'\n"
             "```\n";
  }
  return "";
}

}  // namespace

std::string read_card(const std::string& folder) {
  const fs::path path = fs::path(folder) / "README.md";
  std::error_code error;
  if (!fs::is_regular_file(path, error) || fs::file_size(path, error) > kMaxCardBytes || error) return {};
  return read_file(path.string(), kMaxCardBytes);
}

std::string inherited_metadata(const std::string& card) {
  std::istringstream lines(card);
  std::string line, entry, result;
  bool inherited = false, plain = true, closed = false;
  const auto finish = [&] {
    if (inherited && plain) result += entry;
    entry.clear();
    plain = true;
  };
  const auto next = [&] {
    if (!std::getline(lines, line)) return false;
    if (line.ends_with('\r')) line.pop_back();
    return true;
  };
  if (!next() || line != "---") return {};
  while (!closed && next()) {
    closed = line == "---";
    const bool continues = line.empty() || line[0] == ' ' || line[0] == '-';
    if (closed || !continues) {
      finish();
      inherited = std::find(kInherited.begin(), kInherited.end(), line.substr(0, line.find(':'))) != kInherited.end();
    }
    if (line.empty()) continue;
    plain = plain && is_plain(line);
    entry += line + "\n";
  }
  return closed ? result : "";
}

bool is_hub_name(const std::string& name) {
  const auto is_part = [](std::string_view part) {
    return !part.empty() && std::all_of(part.begin(), part.end(),
                                        [](char c) { return is_alphanumeric(c) || c == '-' || c == '_' || c == '.'; });
  };
  const std::string_view all = name;
  const size_t slash = all.find('/');
  if (slash == std::string_view::npos) return is_part(all);
  return is_part(all.substr(0, slash)) && is_part(all.substr(slash + 1));
}

std::optional<std::string> hub_name(const std::string& folder) {
  constexpr std::string_view kPrefix = "models--", kSeparator = "--";
  std::error_code ignored;
  std::string previous;
  for (const fs::path& part : fs::absolute(folder, ignored).lexically_normal()) {
    if (part == "snapshots" && previous.starts_with(kPrefix)) {
      std::string name = previous.substr(kPrefix.size());
      const size_t separator = name.find(kSeparator);
      if (separator != std::string::npos) {
        name = name.substr(0, separator) + "/" + name.substr(separator + kSeparator.size());
      }
      return is_hub_name(name) ? std::optional(name) : std::nullopt;
    }
    previous = part.string();
  }
  return std::nullopt;
}

std::string loading_section(CheckpointFormat format) {
  return std::string(kSectionStart) + "## How to load\n\n" + loading_text(format) + std::string(kSectionEnd);
}

std::string converted_card(const std::string& folder, CheckpointFormat format) {
  const std::string card = read_card(folder);
  const size_t start = card.find(kSectionStart);
  const size_t end = start == std::string::npos ? start : card.find(kSectionEnd, start);
  if (end == std::string::npos) return card;
  std::ostringstream result;
  result << card.substr(0, start) << loading_section(format) << card.substr(end + kSectionEnd.size());
  return result.str();
}

}  // namespace gptq
