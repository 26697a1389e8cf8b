#include "model/json_file.h"

#include <torch/script.h>

#include <set>
#include <vector>

#include "model/mapped_file.h"

namespace gptq {

namespace {

// A long value would drown the message that quotes it.
constexpr size_t kShownCharacters = 120;

}  // namespace

Json parse_json_object(std::string_view text, const std::string& source, uint64_t base_offset, int max_depth) {
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    using Event = Json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      // Thrown, because a rejected value is still read to its end.
      TORCH_CHECK(depth < max_depth, source, ": offset ", base_offset, ": JSON must be nested at most ", max_depth,
                  " deep");
      keys.emplace_back();
    } else if (event == Event::object_end || event == Event::array_end) {
      keys.pop_back();
    } else if (event == Event::key) {
      TORCH_CHECK(keys.back().insert(parsed.get_ref<const std::string&>()).second, source, ": offset ", base_offset,
                  ": JSON must have no duplicate key, has ", show(parsed), " twice");
    }
    return true;
  };
  try {
    Json result = Json::parse(text.begin(), text.end(), check);
    TORCH_CHECK(result.is_object(), source, ": offset ", base_offset, ": must be a JSON object, got ", show(result));
    return result;
  } catch (const Json::parse_error& error) {
    TORCH_CHECK(false, source, ": offset ", base_offset + (error.byte > 0 ? error.byte - 1 : 0), ": not valid JSON");
  } catch (const Json::exception& error) {
    TORCH_CHECK(false, source, ": offset ", base_offset, ": JSON has a value out of range");
  }
}

Json read_json_object(const std::string& path) {
  return parse_json_object(read_file(path, 100'000'000), path);
}

std::string show(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > kShownCharacters) text = text.substr(0, kShownCharacters) + "...";
  return text;
}

}  // namespace gptq
