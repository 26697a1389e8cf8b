#include "model/model_card.h"

#include "tests/model/tiny_gpt2.h"

namespace gptq {
namespace {

TEST(ModelCard, WhatHoldsOfTheSourceIsInherited) {
  EXPECT_EQ(inherited_metadata("---\nlicense: mit\ntags:\n- a\n- license: b\nlanguage:\n- en\n\n- de\n---\ntext\n"),
            "license: mit\nlanguage:\n- en\n- de\n");
  EXPECT_EQ(inherited_metadata("---\r\nlicense: other\r\nlicense_name: my-own\r\n---\r\n"),
            "license: other\nlicense_name: my-own\n");
  EXPECT_EQ(inherited_metadata("---\npipeline_tag: text-generation\nmodel-index:\n- name: x\n---"),
            "pipeline_tag: text-generation\n");
  EXPECT_EQ(inherited_metadata("---\nlicense: *anchor\nlanguage: en\n---\n"), "language: en\n");
  EXPECT_EQ(inherited_metadata("---\nlicense: \"a\x1b[0m\"\nlanguage: en # comment\n---\n"), "");
  for (const char* card :
       {"", "text", "license: mit\n", "---", "---\nlicense: mit\n", "---\n---\n", "\n---\nlicense: mit\n---\n"}) {
    EXPECT_EQ(inherited_metadata(card), "") << card;
  }
}

TEST(ModelCard, FoldersOfTheHubsCacheHaveAName) {
  EXPECT_EQ(hub_name("/c/hub/models--openai-community--gpt2/snapshots/607a30d"), "openai-community/gpt2");
  EXPECT_EQ(hub_name("/c/hub/models--gpt2/snapshots/607a30d/"), "gpt2");
  EXPECT_EQ(hub_name("/c/models/gpt2"), std::nullopt);
  EXPECT_EQ(hub_name("/c/models--a--b\n/snapshots/c"), std::nullopt);
  EXPECT_EQ(hub_name("/c/models--a--b: c/snapshots/c"), std::nullopt);
  EXPECT_EQ(hub_name("/c/snapshots/models--a--b"), std::nullopt);
}

TEST(ModelCard, TheLoadingSectionAloneIsConverted) {
  const test::TempFolder folder;
  EXPECT_EQ(converted_card(folder.path(), CheckpointFormat::kGptq), "");
  const auto section = [](CheckpointFormat format) { return "before\n" + loading_section(format) + "after\n"; };
  for (const auto from : {CheckpointFormat::kLibgptq, CheckpointFormat::kGptq, CheckpointFormat::kCompressedTensors}) {
    for (const auto to : {CheckpointFormat::kLibgptq, CheckpointFormat::kGptq, CheckpointFormat::kCompressedTensors}) {
      folder.write("README.md", section(from));
      EXPECT_EQ(converted_card(folder.path(), to), section(to));
    }
  }
  EXPECT_NE(section(CheckpointFormat::kLibgptq), section(CheckpointFormat::kGptq));
  for (const char* card : {"someone else's", "<!-- loading -->\n", "<!-- /loading -->\n<!-- loading -->\n"}) {
    folder.write("README.md", card);
    EXPECT_EQ(converted_card(folder.path(), CheckpointFormat::kGptq), card);
  }
}

}  // namespace
}  // namespace gptq
