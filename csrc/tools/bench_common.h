#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tools/report.h"

namespace gptq::tools {

inline constexpr double kGiga = 1e9;

/// What the benchmarks of one weight have in common.
struct BenchSettings {
  int64_t rounds;
  int64_t threads = 0;  ///< 0: torch's
  int64_t group_size = 128;
  std::string json = {};

  /// Adds --rounds, --threads, --group-size and --json.
  void add_to(CLI::App& command);
  /// To be called before anything is computed.
  void set_threads() const;
  /// The settings as they are reported.
  Json describe() const;
};

/// Seconds of each contender, one for each round.
using Times = std::map<std::string, std::vector<double>>;

/// A name and what is timed.
using Contender = std::pair<std::string, std::function<void()>>;

double median(std::vector<double> values);

/// Median, 10th and 90th percentile.
Json spread(const std::vector<double>& values);
Json seconds_json(const Times& times);

/// The contenders one after the other, round by round, so that all see the same machine, after two calls of each that
/// warm up.
/// @param least_seconds a contender is called again and again until it has run for so long in each round; what counts
/// is
///        the time of one call
Times interleave(const std::vector<Contender>& contenders, int64_t rounds, double least_seconds = 0);

/// How many times faster than the peer each of the others is, round by round.
std::vector<double> speedups(const Times& times, const std::string& name, const std::string& peer);

/// Two sizes from text like 768x3072.
/// @param flag and letters, like NxK, are for the error
std::pair<int64_t, int64_t> parse_shape(const std::string& text, const char* flag, const char* letters);

}  // namespace gptq::tools
