#pragma once

#include <optional>
#include <string>

#include "model/quantization_config.h"

/// Model cards: a README.md whose front matter, YAML between two lines "---", the Hugging Face hub reads.
namespace gptq {

/// The card that lies in a folder, empty if there is none.
std::string read_card(const std::string& folder);

/// The lines of a card's front matter that hold for a quantized model too: language, license, license_name,
/// license_link and pipeline_tag. Empty where there are none, and without values that are more than plain scalars and
/// lists.
std::string inherited_metadata(const std::string& card);

/// Whether it can be the name of a model on the hub: "owner/name" or "name".
bool is_hub_name(const std::string& name);

/// The name of a folder in the hub's cache, "…/models--owner--name/snapshots/…"; nothing for others.
std::optional<std::string> hub_name(const std::string& folder);

/// How folders of the format are loaded: a section in Markdown between two comments, by which convert_checkpoint finds
/// it.
std::string loading_section(CheckpointFormat format);

/// The folder's card with that section in place of its own; as it is, where it has none.
std::string converted_card(const std::string& folder, CheckpointFormat format);

}  // namespace gptq
