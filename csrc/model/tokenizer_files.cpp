#include "model/tokenizer_files.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>

#include "model/split_pattern.h"

namespace gptq {
namespace {

using Json = nlohmann::json;

constexpr uintmax_t kLargestFile = uintmax_t(512) << 20;
constexpr size_t kMostStages = 16;
constexpr char kDefaultEndOfText[] = "<|endoftext|>";

[[noreturn]] void fail(const std::string& file, const std::string& reason) {
  throw std::runtime_error(file + ": " + reason);
}

// The start of a string or value as it may stand in a one-line message.
std::string quote(const Json& value) {
  constexpr size_t kLongest = 60;
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return text;
}

std::string read_file(const std::string& file) {
  std::error_code error;
  if (!std::filesystem::exists(file, error)) fail(file, "no such file");
  if (!std::filesystem::is_regular_file(file, error)) fail(file, "not a regular file");
  const uintmax_t size = std::filesystem::file_size(file, error);
  if (error) fail(file, error.message());
  if (size > kLargestFile) {
    fail(file, "larger than " + std::to_string(kLargestFile) + " bytes, got " + std::to_string(size));
  }
  std::string content(size, '\0');
  std::ifstream stream(file, std::ios::binary);
  stream.read(content.data(), static_cast<std::streamsize>(size));
  if (!stream) fail(file, "cannot be read");
  return content;
}

Json read_json_object(const std::string& file) {
  const std::string content = read_file(file);
  Json json;
  try {
    json = Json::parse(content);
  } catch (const Json::parse_error& error) {
    fail(file, "not valid JSON at byte " + std::to_string(error.byte));
  } catch (const Json::exception& error) {
    fail(file, error.what());
  }
  if (!json.is_object()) fail(file, "must hold a JSON object, got " + quote(json));
  return json;
}

// A JSON object with the names that errors need.
class Fields {
 public:
  Fields(const Json& object, std::string file, std::string path)
      : object_(object), file_(std::move(file)), path_(std::move(path)) {
    if (!object.is_object()) fail(file_, path_ + " must be an object, got " + quote(object));
  }

  [[noreturn]] void fail_field(const std::string& name, const std::string& requirement) const {
    const Json* value = find(name);
    fail(file_, path_of(name) + " " + requirement + ", got " + (value == nullptr ? "none" : quote(*value)));
  }

  std::string path_of(const std::string& name) const { return path_.empty() ? name : path_ + "." + name; }
  const std::string& file() const { return file_; }

  // Null counts as absent.
  const Json* find(const std::string& name) const {
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  const Json& require(const std::string& name, Json::value_t type) const {
    const Json* value = find(name);
    if (value == nullptr || value->type() != type) fail_field(name, std::string("must be ") + name_of(type));
    return *value;
  }

  std::string string(const std::string& name) const { return require(name, Json::value_t::string); }

  bool boolean(const std::string& name, bool otherwise) const {
    return find(name) == nullptr ? otherwise : require(name, Json::value_t::boolean).get<bool>();
  }

  Fields object(const std::string& name) const {
    return Fields(require(name, Json::value_t::object), file_, path_of(name));
  }

 private:
  static const char* name_of(Json::value_t type) {
    switch (type) {
      case Json::value_t::object:
        return "an object";
      case Json::value_t::array:
        return "an array";
      case Json::value_t::boolean:
        return "true or false";
      default:
        return "a string";
    }
  }

  const Json& object_;
  std::string file_;
  std::string path_;
};

// Token to id, as an array by id.
std::vector<std::string> read_vocabulary(const Json& vocabulary, const std::string& file, const std::string& path) {
  if (vocabulary.empty()) fail(file, path + " is empty");
  std::vector<std::string> tokens(vocabulary.size());
  std::vector<bool> taken(vocabulary.size());
  for (const auto& [token, id] : vocabulary.items()) {
    // n distinct ids below n leave no gap.
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= tokens.size()) {
      fail(file, path + ": the id of token " + quote(token) + " must be a whole number from 0 to " +
                     std::to_string(tokens.size() - 1) + " (ids have no gaps), got " + quote(id));
    }
    const auto index = id.get<size_t>();
    if (taken[index]) {
      fail(file, path + ": tokens " + quote(tokens[index]) + " and " + quote(token) + " both have id " + quote(id));
    }
    taken[index] = true;
    tokens[index] = token;
  }
  return tokens;
}

std::pair<std::string, std::string> split_merge(const std::string& merge, const std::string& file,
                                                const std::string& place) {
  const size_t space = merge.find(' ');
  if (space == std::string::npos || merge.find(' ', space + 1) != std::string::npos) {
    fail(file, place + " must be two tokens with one space between them, got " + quote(merge));
  }
  return {merge.substr(0, space), merge.substr(space + 1)};
}

void read_merges_text(const std::string& file, BpeModel& model) {
  const std::string content = read_file(file);
  size_t line_number = 0;
  for (size_t at = 0; at < content.size();) {
    size_t end = std::min(content.find('\n', at), content.size());
    std::string line = content.substr(at, end - at);
    at = end + 1;
    ++line_number;
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty() || line.rfind("#version", 0) == 0) continue;
    model.merges.push_back(split_merge(line, file, "line " + std::to_string(line_number)));
  }
}

void read_merges_json(const Json& merges, const std::string& file, BpeModel& model) {
  model.merges.reserve(merges.size());
  for (size_t i = 0; i < merges.size(); ++i) {
    const Json& merge = merges[i];
    const std::string place = "model.merges[" + std::to_string(i) + "]";
    if (merge.is_string()) {
      const auto& line = merge.get_ref<const std::string&>();
      if (line.rfind("#version", 0) != 0) model.merges.push_back(split_merge(line, file, place));
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      model.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
    } else {
      fail(file, place + " must be \"a b\" or [\"a\", \"b\"], got " + quote(merge));
    }
  }
}

BpeModel read_model(const Fields& fields) {
  if (fields.find("type") != nullptr && fields.string("type") != "BPE") fields.fail_field("type", "must be \"BPE\"");
  if (const Json* dropout = fields.find("dropout"); dropout != nullptr && *dropout != Json(0.0)) {
    fields.fail_field("dropout", "must be null or 0 (merges left out at random are not supported)");
  }
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (fields.find(affix) != nullptr && !fields.string(affix).empty()) {
      fields.fail_field(affix, "must be null or empty");
    }
  }
  BpeModel model;
  model.tokens =
      read_vocabulary(fields.require("vocab", Json::value_t::object), fields.file(), fields.path_of("vocab"));
  read_merges_json(fields.require("merges", Json::value_t::array), fields.file(), model);
  if (fields.find("unk_token") != nullptr) model.unk_token = fields.string("unk_token");
  model.fuse_unk = fields.boolean("fuse_unk", false);
  model.ignore_merges = fields.boolean("ignore_merges", false);
  if (fields.boolean("byte_fallback", false)) fields.fail_field("byte_fallback", "must be false");
  return model;
}

AddedToken read_added_token(const Fields& fields) {
  AddedToken token;
  token.content = fields.string("content");
  if (token.content.empty()) fields.fail_field("content", "must not be empty");
  token.single_word = fields.boolean("single_word", false);
  token.lstrip = fields.boolean("lstrip", false);
  token.rstrip = fields.boolean("rstrip", false);
  token.special = fields.boolean("special", false);
  token.normalized = fields.boolean("normalized", !token.special);
  return token;
}

// tokenizers gives an added token the id its content has in the model, or the next free one, whatever the file says;
// the file has to agree.
void check_added_ids(const TokenizerDefinition& definition, const std::string& path) {
  std::unordered_map<std::string, int64_t> ids;
  for (const std::string& token : definition.model.tokens) ids.emplace(token, ids.size());
  std::unordered_set<std::string> seen;
  for (const AddedToken& token : definition.added_tokens) {
    const auto next_id = static_cast<int64_t>(ids.size());
    const int64_t expected = ids.emplace(token.content, next_id).first->second;
    if (token.id != expected) {
      fail(definition.file, path + ": the id of " + quote(token.content) + " must be " + std::to_string(expected) +
                                ", got " + std::to_string(token.id));
    }
    if (!seen.insert(token.content).second) {
      fail(definition.file, path + " lists " + quote(token.content) + " twice");
    }
  }
}

void read_added_tokens(const Fields& root, TokenizerDefinition& definition) {
  if (root.find("added_tokens") == nullptr) return;
  const Json& tokens = root.require("added_tokens", Json::value_t::array);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const Fields fields(tokens[i], root.file(), "added_tokens[" + std::to_string(i) + "]");
    AddedToken token = read_added_token(fields);
    const Json* id = fields.find("id");
    if (id == nullptr || !id->is_number_unsigned()) fields.fail_field("id", "must be a whole number");
    token.id = static_cast<int64_t>(std::min<uint64_t>(id->get<uint64_t>(), INT64_MAX));
    definition.added_tokens.push_back(std::move(token));
  }
  check_added_ids(definition, "added_tokens");
}

SplitStage read_split(const Fields& fields) {
  const Fields pattern = fields.object("pattern");
  SplitStage stage;
  stage.regex = pattern.find("Regex") != nullptr ? pattern.string("Regex") : escape_regex(pattern.string("String"));
  const std::string behavior = fields.string("behavior");
  const bool invert = fields.boolean("invert", false);
  if (behavior == "Removed") {
    (invert ? stage.drop_between : stage.drop_matches) = true;
  } else if (behavior != "Isolated") {
    fields.fail_field("behavior", "must be \"Isolated\" or \"Removed\"");
  }
  return stage;
}

SplitStage read_stage(const Fields& fields) {
  const std::string type = fields.string("type");
  if (type == "Split") return read_split(fields);
  SplitStage stage;
  if (type == "ByteLevel") {
    stage.add_prefix_space = fields.boolean("add_prefix_space", true);
    if (fields.boolean("use_regex", true)) stage.regex = kGpt2SplitPattern;
  } else if (type == "Digits") {
    stage.regex = fields.boolean("individual_digits", false) ? "\\p{N}" : "\\p{N}+";
  } else {
    fields.fail_field("type", "must be \"ByteLevel\", \"Split\", \"Digits\" or a \"Sequence\" of them");
  }
  return stage;
}

// tokenizers maps bytes to the byte alphabet in the step ByteLevel, so it has to come last.
std::vector<SplitStage> read_pre_tokenizer(const Fields& root) {
  const Fields fields = root.object("pre_tokenizer");
  std::vector<Fields> steps;
  if (fields.string("type") == "Sequence") {
    const Json& list = fields.require("pretokenizers", Json::value_t::array);
    if (list.size() > kMostStages)
      fail(root.file(), "pre_tokenizer has more than " + std::to_string(kMostStages) + " steps");
    for (size_t i = 0; i < list.size(); ++i) {
      steps.emplace_back(list[i], root.file(), "pre_tokenizer.pretokenizers[" + std::to_string(i) + "]");
    }
  } else {
    steps.push_back(fields);
  }
  std::vector<SplitStage> stages;
  for (size_t i = 0; i < steps.size(); ++i) {
    if ((steps[i].string("type") == "ByteLevel") != (i + 1 == steps.size())) {
      steps[i].fail_field("type", "is out of place: ByteLevel must be the last step, and only that");
    }
    stages.push_back(read_stage(steps[i]));
  }
  if (stages.empty()) fields.fail_field("pretokenizers", "must end in ByteLevel");
  return stages;
}

TokenizerDefinition read_tokenizer_json(const std::string& file) {
  const Json json = read_json_object(file);
  const Fields root(json, file, "");
  TokenizerDefinition definition;
  definition.file = file;
  if (root.find("normalizer") != nullptr) root.fail_field("normalizer", "must be null");
  for (const char* step : {"post_processor", "decoder"}) {
    if (root.find(step) != nullptr && root.object(step).string("type") != "ByteLevel") {
      root.fail_field(step, "must be null or of type \"ByteLevel\"");
    }
  }
  definition.model = read_model(root.object("model"));
  definition.stages = read_pre_tokenizer(root);
  read_added_tokens(root, definition);
  return definition;
}

// The tokens that tokenizer_config.json adds to vocab.json.
void read_added_tokens_decoder(const Fields& config, TokenizerDefinition& definition) {
  const std::string name = "added_tokens_decoder";
  if (config.find(name) == nullptr) return;
  for (const auto& [id, value] : config.require(name, Json::value_t::object).items()) {
    AddedToken token = read_added_token(Fields(value, config.file(), name + "." + id));
    if (id.empty() || id.size() > 9 || id.find_first_not_of("0123456789") != std::string::npos) {
      fail(config.file(), name + ": an id must be a whole number, got " + quote(id));
    }
    token.id = std::stoll(id);
    definition.added_tokens.push_back(std::move(token));
  }
  std::sort(definition.added_tokens.begin(), definition.added_tokens.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.id < b.id; });
}

TokenizerDefinition read_vocabulary_and_merges(const std::string& folder, const Fields& config,
                                               const std::string& end_of_text) {
  TokenizerDefinition definition;
  definition.file = folder + "/vocab.json";
  definition.model.tokens = read_vocabulary(read_json_object(definition.file), definition.file, "the vocabulary");
  read_merges_text(folder + "/merges.txt", definition.model);
  SplitStage stage;
  stage.regex = kGpt2SplitPattern;
  stage.add_prefix_space = config.boolean("add_prefix_space", false);
  definition.stages.push_back(stage);

  read_added_tokens_decoder(config, definition);
  const auto& tokens = definition.model.tokens;
  const auto found = std::find(tokens.begin(), tokens.end(), end_of_text);
  const auto is_end = [&end_of_text](const AddedToken& token) { return token.content == end_of_text; };
  auto& added = definition.added_tokens;
  if (found != tokens.end() && std::none_of(added.begin(), added.end(), is_end)) {
    AddedToken token;
    token.content = end_of_text;
    token.id = found - tokens.begin();
    token.special = true;
    added.push_back(std::move(token));
  }
  check_added_ids(definition, "added tokens");
  return definition;
}

std::string read_end_of_text(const Fields& config) {
  const Json* token = config.find("eos_token");
  if (token == nullptr) return kDefaultEndOfText;
  return token->is_object() ? config.object("eos_token").string("content") : config.string("eos_token");
}

}  // namespace

TokenizerDefinition read_tokenizer_files(const std::string& folder) {
  const auto exists = [&folder](const char* name) { return std::filesystem::exists(folder + "/" + name); };
  if (!std::filesystem::is_directory(folder)) fail(folder, "no such folder");
  const std::string config_file = folder + "/tokenizer_config.json";
  const Json config_json = exists("tokenizer_config.json") ? read_json_object(config_file) : Json::object();
  const Fields config(config_json, config_file, "");
  const std::string end_of_text = read_end_of_text(config);

  if (!exists("tokenizer.json") && !exists("vocab.json")) {
    fail(folder, "has no tokenizer files: neither tokenizer.json nor vocab.json with merges.txt");
  }
  TokenizerDefinition definition = exists("tokenizer.json") ? read_tokenizer_json(folder + "/tokenizer.json")
                                                            : read_vocabulary_and_merges(folder, config, end_of_text);
  definition.end_of_text = end_of_text;
  return definition;
}

}  // namespace gptq
