#include "model/aoti_package.h"

#include <ATen/ops/aminmax.h>
#include <caffe2/serialize/inline_container.h>
#include <dlfcn.h>
#include <sys/utsname.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <memory>
#include <set>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

#include "model/error_line.h"
#include "model/json_file.h"

namespace gptq {

namespace {

using caffe2::serialize::PyTorchStreamReader;

constexpr std::string_view kModels = "data/aotinductor/";
constexpr std::string_view kModel = "data/aotinductor/model/";
constexpr std::string_view kMetadata = "_metadata.json";
constexpr size_t kMostMetadata = size_t{1} << 20;
/// The major and minor version of torch that this is compiled with.
constexpr const char* kTorch = C10_STRINGIZE(TORCH_VERSION_MAJOR) "." C10_STRINGIZE(TORCH_VERSION_MINOR) ".";

std::string read_record(PyTorchStreamReader& reader, const std::string& name) {
  const auto [data, size] = reader.getRecord(name);
  return {static_cast<const char*>(data.get()), size};
}

// The record that holds the metadata of the model "model".
std::string metadata_record(PyTorchStreamReader& reader, const std::string& path) {
  std::set<std::string> models;
  for (const std::string& record : reader.getAllRecords()) {
    if (record.starts_with(kModel) && record.ends_with(kMetadata)) return record;
    if (!record.starts_with(kModels)) continue;
    models.insert(record.substr(kModels.size(), record.find('/', kModels.size()) - kModels.size()));
  }
  TORCH_CHECK(!models.empty(), path,
              ": must be an AOTInductor package, is a program of torch.export.save that is not compiled");
  TORCH_CHECK(models.count("model") == 0, path, ": must hold the metadata of its model, holds none");
  TORCH_CHECK(false, path, ": must hold a model named \"model\", holds ", show(Json(models)));
}

const std::string* find(const AotiMetadata& metadata, const char* name) {
  const auto found = metadata.find(name);
  return found == metadata.end() ? nullptr : &found->second;
}

void require(const AotiMetadata& metadata, const std::string& path, const char* name, const std::string& wanted) {
  const std::string* value = find(metadata, name);
  TORCH_CHECK(value == nullptr || *value == wanted, path, ": must be compiled for ", wanted, ", is compiled for ",
              show(*value));
}

bool machine_has(std::string_view instructions) {
#ifdef __x86_64__
  if (instructions == "AVX2") return __builtin_cpu_supports("avx2");
  if (instructions == "AVX512") return __builtin_cpu_supports("avx512f");
  if (instructions == "AVX512_VNNI") return __builtin_cpu_supports("avx512vnni");
#endif
  return true;  // whatever a torch to come may call it
}

// What cannot run here, before it is tried: an illegal instruction ends the process.
void check_runs_here(const AotiMetadata& metadata, const std::string& path) {
  require(metadata, path, "AOTI_DEVICE_KEY", "cpu");
  utsname machine{};
  if (uname(&machine) == 0) require(metadata, path, "AOTI_MACHINE", machine.machine);
  if (const std::string* isa = find(metadata, "AOTI_CPU_ISA")) {
    std::istringstream words(*isa);
    for (std::string word; words >> word;) {
      TORCH_CHECK(machine_has(word), path, ": must be compiled for this machine, is compiled for one with ", word);
    }
  }
  if (const std::string* version = find(metadata, "torch_version")) {
    TORCH_CHECK(version->starts_with(kTorch), path, ": must be compiled by torch ", kTorch, "*, is compiled by torch ",
                show(*version));
  }
}

// A limit that the metadata names, as decimal digits.
std::optional<int64_t> read_limit(const AotiMetadata& metadata, const char* name, const std::string& path) {
  const std::string* text = find(metadata, name);
  if (text == nullptr) return std::nullopt;
  const bool digits = !text->empty() && text->size() < 10 &&
                      std::all_of(text->begin(), text->end(), [](char c) { return c >= '0' && c <= '9'; });
  const int64_t value = digits ? std::stoll(*text) : 0;
  TORCH_CHECK(value >= 1, path, ": metadata: ", name, " must be a number in 1..999999999, got ", show(*text));
  return value;
}

// The code in a package asks for libtorch.so, which this program does without: it holds nothing itself, and pulls in
// the CUDA libraries where torch has them. It lies where the other libraries of torch were found.
void load_libtorch(const std::string& path) {
  static void* const library = dlopen("libtorch.so", RTLD_LAZY | RTLD_GLOBAL);
  TORCH_CHECK(library != nullptr, path, ": needs libtorch.so of torch, which does not load: ", dlerror());
}

/// The code in a package, as TorchScript can hold it.
class CompiledModel final : public torch::CustomClassHolder {
 public:
  CompiledModel(const std::string& path, std::optional<int64_t> context_length, std::optional<int64_t> vocab_size)
      : loader_(path), context_length_(context_length), vocab_size_(vocab_size) {}

  at::Tensor forward(const at::Tensor& input_ids) {
    check(input_ids);
    std::vector<at::Tensor> outputs = loader_.run({input_ids});
    TORCH_CHECK(!outputs.empty(), "model must return logits, returned nothing");
    return outputs[0];
  }

 private:
  // Compiled code checks neither the shapes nor, where several threads share the work, its indices: it aborts.
  void check(const at::Tensor& input_ids) const {
    TORCH_CHECK(input_ids.dim() == 2 && input_ids.scalar_type() == at::kLong,
                "input_ids must be Long [batch, length], got ", input_ids.scalar_type(), " ", input_ids.sizes());
    TORCH_CHECK(!context_length_ || input_ids.size(1) <= *context_length_, "input_ids must have at most ",
                *context_length_, " tokens, the context that the model was compiled for, got ", input_ids.size(1));
    if (!vocab_size_ || input_ids.numel() == 0) return;
    const auto [low, high] = at::aminmax(input_ids);
    TORCH_CHECK(low.item<int64_t>() >= 0 && high.item<int64_t>() < *vocab_size_, "input_ids must be in 0..",
                *vocab_size_ - 1, ", the model's vocabulary, got ", low.item<int64_t>(), " to ", high.item<int64_t>());
  }

  torch::inductor::AOTIModelPackageLoader loader_;
  std::optional<int64_t> context_length_, vocab_size_;
};

const auto kRegistration =
    torch::class_<CompiledModel>("gptq", "CompiledModel").def("forward", &CompiledModel::forward);

torch::jit::Module as_module(c10::intrusive_ptr<CompiledModel> compiled) {
  torch::jit::Module module{c10::QualifiedName("__torch__.gptq.compiled.model"),
                            std::make_shared<torch::jit::CompilationUnit>()};
  module.register_attribute("training", c10::BoolType::get(), false);
  module.register_attribute("compiled", c10::getCustomClassType<c10::intrusive_ptr<CompiledModel>>(),
                            c10::IValue(std::move(compiled)));
  module.define("def forward(self, input_ids: Tensor) -> Tensor:\n    return self.compiled.forward(input_ids)\n");
  return module;
}

}  // namespace

bool is_pt2_archive(const std::string& path) {
  try {
    PyTorchStreamReader reader(path);
    return reader.hasRecord("archive_format") && reader.getRecordSize("archive_format") == 3 &&
           read_record(reader, "archive_format") == "pt2";
  } catch (const std::exception&) {
    return false;
  }
}

AotiMetadata read_aoti_metadata(const std::string& path) {
  PyTorchStreamReader reader(path);
  const std::string record = metadata_record(reader, path);
  const std::string source = path + ": " + show(record);
  const size_t size = reader.getRecordSize(record);
  TORCH_CHECK(size <= kMostMetadata, source, " must have at most ", kMostMetadata, " bytes, has ", size);
  AotiMetadata metadata;
  const Json json = parse_json_object(read_record(reader, record), source);
  for (const auto& [name, value] : json.items()) {
    TORCH_CHECK(value.is_string(), source, ": ", show(name), " must be a string, got ", show(value));
    metadata[name] = value.get<std::string>();
  }
  return metadata;
}

AotiPackage load_aoti_package(const std::string& path) {
  const AotiMetadata metadata = read_aoti_metadata(path);
  check_runs_here(metadata, path);
  AotiPackage result;
  result.context_length = read_limit(metadata, "context_length", path);
  const std::optional<int64_t> vocab_size = read_limit(metadata, "vocab_size", path);
  load_libtorch(path);
  try {
    result.module = as_module(c10::make_intrusive<CompiledModel>(path, result.context_length, vocab_size));
  } catch (const std::exception& error) {
    TORCH_CHECK(false, path, ": does not load: ", error_line(error));
  }
  return result;
}

}  // namespace gptq
