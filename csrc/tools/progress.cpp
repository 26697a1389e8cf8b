#include "tools/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace gptq::tools {
namespace {

constexpr size_t kBarWidth = 24;

std::string clock_text(double seconds) {
  const auto whole = static_cast<long>(std::lround(seconds));
  char text[32];
  std::snprintf(text, sizeof(text), "%ld:%02ld", whole / 60, whole % 60);
  return text;
}

size_t terminal_width() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

}  // namespace

Progress::Progress(std::string title)
    : title_(std::move(title)), terminal_(isatty(STDERR_FILENO) == 1), start_(std::chrono::steady_clock::now()) {}

Progress::~Progress() {
  if (drawn_) {
    std::fputs("\n", stderr);
  }
}

void Progress::update(size_t done, size_t total, const std::string& detail) {
  const auto now = std::chrono::steady_clock::now();
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  const double fraction = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 1.0;
  const double left = fraction > 0 ? elapsed * (1 - fraction) / fraction : 0;
  const std::string text = std::to_string(done) + "/" + std::to_string(total) + "  " + detail;
  if (terminal_) {
    draw(fraction, text, left);
    drawn_ = true;
  } else if (done == total || now - last_line_ > std::chrono::seconds(1)) {
    std::fprintf(stderr, "%s %s  %s left\n", title_.c_str(), text.c_str(), clock_text(left).c_str());
    last_line_ = now;
  }
}

void Progress::draw(double fraction, const std::string& text, double seconds_left) const {
  const auto filled = static_cast<size_t>(fraction * kBarWidth);
  std::string line = title_ + " [" + std::string(filled, '#') + std::string(kBarWidth - filled, '.') + "] ";
  line += clock_text(seconds_left) + " left  " + text;
  line.resize(std::min(line.size(), terminal_width() - 1));
  std::fprintf(stderr, "\r\033[K%s", line.c_str());
  std::fflush(stderr);
}

}  // namespace gptq::tools
