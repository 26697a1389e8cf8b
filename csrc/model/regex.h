#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace gptq {

/// A regular expression of PCRE2 on UTF-8. Its work is limited, so that no expression hangs. Safe to use from several
/// threads.
class Regex {
 public:
  /// @throws std::runtime_error with the reason
  explicit Regex(const std::string& pattern);

  /// Matches in one text.
  class Search {
   public:
    /// @param text valid UTF-8; neither it nor the expression may go away before this does
    Search(const Regex& regex, std::string_view text);

    /// Where the first match at or after `start` begins and ends.
    /// @throws std::runtime_error if matching exceeds PCRE2's limits (possible only with nested repeats)
    std::optional<std::pair<size_t, size_t>> from(size_t start) const;

   private:
    const Regex& regex_;
    std::string_view text_;
    std::shared_ptr<void> data_;  // pcre2_match_data
  };

 private:
  std::shared_ptr<const void> code_;  // pcre2_code, kept out of this header
};

}  // namespace gptq
