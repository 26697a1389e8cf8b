#pragma once

#include <istream>
#include <ostream>
#include <string>

namespace gptq {

/// Encodes and decodes with the tokenizer of a model folder, line by line.
/// A line of `in` holds a JSON string, answered with the list of its ids, or a list of ids, answered with their text as
/// a JSON string.
/// @return the exit status, 0
/// @throws std::runtime_error for tokenizer files or lines that cannot be read, and if `out` cannot be written.
int tokenize_command(const std::string& folder, std::istream& in, std::ostream& out);

}  // namespace gptq
