#include "tools/bench_common.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <regex>

namespace gptq::tools {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_of(const std::function<void()>& call, int64_t repeats) {
  const auto start = Clock::now();
  for (int64_t i = 0; i < repeats; ++i) {
    call();
  }
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  const double position = share * static_cast<double>(values.size() - 1);
  const auto below = static_cast<size_t>(position), above = std::min(below + 1, values.size() - 1);
  return values[below] + (position - static_cast<double>(below)) * (values[above] - values[below]);
}

}  // namespace

void BenchSettings::add_to(CLI::App& command) {
  command.add_option("--rounds", rounds, "Rounds")->capture_default_str()->check(CLI::Range(1, 100000));
  command.add_option("--group-size", group_size, "Inputs that share a scale")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command.add_option("--threads", threads, "Threads")->default_str("all cores")->check(CLI::PositiveNumber);
  command.add_option("--json", json, "File to write the result to");
}

void BenchSettings::set_threads() const {
  if (threads > 0) {
    at::set_num_threads(static_cast<int>(threads));
  }
}

Json BenchSettings::describe() const {
  return {{"threads", at::get_num_threads()}, {"rounds", rounds}, {"group_size", group_size}};
}

double median(std::vector<double> values) {
  return quantile(std::move(values), 0.5);
}

Json spread(const std::vector<double>& values) {
  return {{"median", median(values)}, {"p10", quantile(values, 0.1)}, {"p90", quantile(values, 0.9)}};
}

Json seconds_json(const Times& times) {
  Json json;
  for (const auto& [name, seconds] : times) {
    json[name] = spread(seconds);
  }
  return json;
}

Times interleave(const std::vector<Contender>& contenders, int64_t rounds, double least_seconds) {
  std::map<std::string, int64_t> repeats;
  for (const auto& [name, call] : contenders) {
    call();
    const double once = std::max(seconds_of(call, 1), 1e-9);
    repeats[name] = std::max<int64_t>(1, std::llround(least_seconds / once));
  }
  Times times;
  for (int64_t round = 0; round < rounds; ++round) {
    for (const auto& [name, call] : contenders) {
      times[name].push_back(seconds_of(call, repeats[name]) / static_cast<double>(repeats[name]));
    }
  }
  return times;
}

std::vector<double> speedups(const Times& times, const std::string& name, const std::string& peer) {
  const std::vector<double>&ours = times.at(name), &theirs = times.at(peer);
  std::vector<double> ratios(ours.size());
  std::transform(theirs.begin(), theirs.end(), ours.begin(), ratios.begin(), std::divides<double>());
  return ratios;
}

std::pair<int64_t, int64_t> parse_shape(const std::string& text, const char* flag, const char* letters) {
  std::smatch parts;
  TORCH_CHECK(std::regex_match(text, parts, std::regex("([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")), flag, ": must be ",
              letters, " with sizes from 1 to 999999, got ", text);
  return {std::stoll(parts[1]), std::stoll(parts[2])};
}

}  // namespace gptq::tools
