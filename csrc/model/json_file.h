#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace gptq {

using Json = nlohmann::json;

/// Parses one JSON object strictly: no duplicate keys, nesting of at most max_depth, nothing after it.
///
/// @param source names the text in errors
/// @param base_offset where the text starts in its file
/// @throws c10::Error "<source>: offset N: reason"
Json parse_json_object(std::string_view text, const std::string& source, uint64_t base_offset = 0, int max_depth = 32);

/// parse_json_object on a file of at most 100 MB.
Json read_json_object(const std::string& path);

/// The value as it may stand in an error message: JSON on one line, plain ASCII, shortened.
std::string show(const Json& value);

}  // namespace gptq
