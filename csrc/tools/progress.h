#pragma once

#include <chrono>
#include <cstddef>
#include <string>

namespace gptq::tools {

/// Shows on stderr how far a long task is: one bar that redraws itself on a terminal, a plain line a step otherwise.
class Progress {
 public:
  explicit Progress(std::string title);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// @param detail shown beside the count, as the layer's name and loss
  void update(size_t done, size_t total, const std::string& detail);

 private:
  void draw(double fraction, const std::string& text, double seconds_left) const;

  std::string title_;
  bool terminal_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point start_;
  std::chrono::steady_clock::time_point last_line_;
};

}  // namespace gptq::tools
