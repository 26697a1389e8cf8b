#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <sys/utsname.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include "model/json_file.h"
#include "model/safetensors.h"
#include "tools/lab_common.h"

namespace gptq::tools {

namespace fs = std::filesystem;

namespace {

// Absolute, without a slash at the end.
fs::path folder_path(const std::string& path) {
  TORCH_CHECK(!path.empty(), "--output: must name a folder, got an empty name");
  const fs::path result = fs::weakly_canonical(path);
  return result.has_filename() ? result : result.parent_path();
}

// A hidden name in the same folder.
fs::path beside(const fs::path& folder, const char* purpose) {
  return folder.parent_path() / c10::str(".", folder.filename().string(), ".", purpose, "-", getpid());
}

bool is_earlier_run(const fs::path& folder) {
  try {
    return gptq::read_json_object((folder / "manifest.json").string()).contains("study");
  } catch (const c10::Error&) {
    return false;
  }
}

// Whether the folder holds an earlier run, which may be replaced: what a study and its plots leave, and nothing else.
bool check_replaceable(const fs::path& folder) {
  if (!fs::is_directory(folder) || fs::is_empty(folder)) {
    return false;
  }
  TORCH_CHECK(is_earlier_run(folder), folder.string(),
              ": output folder must be new, empty or an earlier run of a study (with manifest.json)");
  const std::set<std::string> ours{"results.json", "manifest.json", "layers.safetensors"};
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    TORCH_CHECK(entry.is_regular_file() && (ours.count(name) > 0 || entry.path().extension() == ".png"),
                folder.string(), ": output folder must hold nothing but an earlier run of a study, holds ", name);
  }
  return true;
}

void write_json(const std::string& path, const Json& value) {
  JsonOutput(path).write(value);
}

std::string utc(std::chrono::system_clock::time_point moment) {
  const std::time_t seconds = std::chrono::system_clock::to_time_t(moment);
  char text[32];
  std::tm parts{};
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&seconds, &parts));
  return text;
}

std::string processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0 && line.find(": ") != std::string::npos) {
      return line.substr(line.find(": ") + 2);
    }
  }
  return "unknown";
}

Json host() {
  utsname system{};
  uname(&system);
  const double memory = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  return {{"processor", processor()},
          {"cores", sysconf(_SC_NPROCESSORS_ONLN)},
          {"instruction_set", at::get_cpu_capability()},
          {"memory_gb", memory / 1e9},
          {"system", std::string(system.sysname) + " " + system.machine}};
}

// The arguments as they were given, for a person to repeat.
std::string command_line() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  text.erase(0, text.find('\0'));
  for (char& c : text) {
    c = c == '\0' ? ' ' : c;
  }
  text.erase(text.find_last_not_of(' ') + 1);
  return "gptq" + text;
}

}  // namespace

void Study::add_to(CLI::App& sub) {
  sub.add_option("-o,--output", output_, "Folder to write results.json and manifest.json to")->required();
  setting(sub, "seed", seed_, "Seed of all random draws")->check(CLI::NonNegativeNumber);
  sub.add_option("--threads", threads_, "Threads to compute with")
      ->default_str("all cores")
      ->check(CLI::PositiveNumber);
}

void Study::begin() {
  const fs::path folder = folder_path(output_);
  check_output_folder(check_replaceable(folder) ? beside(folder, "new").string() : folder.string());
  if (threads_ > 0) {
    at::set_num_threads(static_cast<int>(threads_));
  }
  started_ = std::chrono::system_clock::now();
}

at::Generator Study::generator(uint64_t purpose) const {
  // An odd constant, so that no two purposes of neighbouring seeds meet.
  return at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed_) + purpose * 0x9E3779B97F4A7C15u);
}

Json Study::settings() const {
  Json settings;
  for (const auto& [name, value] : settings_) {
    std::string key = name;
    std::replace(key.begin(), key.end(), '-', '_');
    settings[key] = value();
  }
  return settings;
}

Json Study::manifest() const {
  const double seconds = std::chrono::duration<double>(std::chrono::system_clock::now() - started_).count();
  return {{"study", name_},
          {"command", command_line()},
          {"seed", seed_},
          {"settings", settings()},
          {"versions", {{"gptq", GPTQ_VERSION}, {"torch", TORCH_VERSION}, {"compiler", __VERSION__}}},
          {"host", host()},
          {"threads", at::get_num_threads()},
          {"started", utc(started_)},
          {"seconds", seconds}};
}

void Study::finish(Json results, const std::vector<std::pair<std::string, at::Tensor>>& layers) const {
  Json all{{"study", name_}, {"settings", settings()}};
  all.update(results);
  const fs::path folder = folder_path(output_);
  fs::path aside;
  if (check_replaceable(folder)) {
    aside = beside(folder, "old");
    fs::rename(folder, aside);
  }
  try {
    AtomicFolder out(folder.string());
    write_json(out.file("results.json"), all);
    write_json(out.file("manifest.json"), manifest());
    if (!layers.empty()) {
      save_safetensors(out.file("layers.safetensors"), layers);
    }
    out.commit();
  } catch (...) {
    if (!aside.empty()) {
      fs::rename(aside, folder);
    }
    throw;
  }
  if (!aside.empty()) {
    fs::remove_all(aside);
  }
}

}  // namespace gptq::tools
