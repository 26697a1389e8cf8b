"""The model card beside a quantized checkpoint: front matter that the hub reads, and the numbers of the JSON report."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

SCORING = ["--window", "128", "--max-tokens", "256"]


@pytest.fixture(scope="module")
def quantized(gptq, demo_model, text, tmp_path_factory):
    """Quantize the demo model's first block; return the folder, its card and the report."""
    folder = tmp_path_factory.mktemp("card")
    result = gptq(
        *["quantize", demo_model, "-o", folder / "model", "--json", folder / "report.json", "--skip", r"h\.[1-5]\."],
        *["--lm-head", "keep", "--override", "mlp:bits=8,group_size=-1", "--base-model", "someone/demo"],
        *["--calibration", text[0], "--samples", "2", "--sequence-length", "64", "--seed", "5"],
        *["--eval", text[1], *SCORING],
    )
    assert result.returncode == 0, result.stderr
    card = ModelCard.load(folder / "model" / "README.md")
    return folder / "model", card, json.loads((folder / "report.json").read_text())


def table(card, heading):
    """Return the cells of the table under a heading, row by row."""
    lines = card.text.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


def test_front_matter(quantized):
    _, card, _ = quantized
    data = yaml.safe_load(card.content.split("---\n")[1])
    assert data == {
        "license": "psf-2.0",
        "language": "en",
        "pipeline_tag": "text-generation",
        "base_model": "someone/demo",
        "base_model_relation": "quantized",
        "library_name": "libgptq",
        "tags": ["quantized", "gptq", "libgptq"],
    }
    assert card.data.base_model == "someone/demo"


def test_numbers_are_those_of_the_report(quantized, text):
    _, card, report = quantized
    names = ("baseline", "rtn", "quantized")
    scores = table(card, "Quality")
    assert [row[1] for row in scores] == [f"{report['perplexity'][name]:.4f}" for name in names]
    assert [row[2] for row in scores[1:]] == [f"{report['kl_divergence'][name]:.6f}" for name in names[1:]]
    assert [row[3] for row in scores[1:]] == [f"{100 * report['top1_agreement'][name]:.2f} %" for name in names[1:]]
    assert f"On `{text[1].name}`: {report['tokens_scored']} tokens scored in windows of 128, stride 128." in card.text
    size = report["bytes"]
    assert f"{size['linears_after'] / 1e6:.2f} MB, {size['linears_before'] / 1e6:.2f} MB before" in card.text
    layers = table(card, "Layers")
    assert len(layers) == 4
    for row, layer in zip(layers, report["layers"], strict=True):
        width = "whole rows" if layer["group_size"] == -1 else str(layer["group_size"])
        shape = " × ".join(map(str, layer["shape"]))
        assert row == [
            *[layer["name"], shape, str(layer["bits"]), width],
            *[f"{layer['loss']:.4g}", f"{layer['loss'] / layer['rtn_loss']:.3f}"],
        ]


def test_settings_and_calibration(quantized, text):
    _, card, _ = quantized
    settings = {name: value for name, value in table(card, "How it was made")}
    assert settings["calibration"] == f"2 windows of 64 tokens of `{text[0].name}`, drawn with seed 5"
    assert settings["bits"] == "4"
    assert settings["group size"] == "128"
    assert settings["zero points"] == "the middle code"
    assert "to 4, 8 bits" in card.text
    assert str(text[0].parent) not in card.text


def test_conversion_carries_it_over(gptq, quantized, tmp_path):
    folder, card, _ = quantized
    assert gptq("convert", folder, tmp_path / "gptq", "--format", "gptq").returncode == 0
    converted = (tmp_path / "gptq" / "README.md").read_text()
    assert "gptqmodel" in converted.split("## How to load")[1].split("## Quality")[0]
    assert gptq("convert", tmp_path / "gptq", tmp_path / "back", "--format", "libgptq").returncode == 0
    assert (tmp_path / "back" / "README.md").read_text() == card.content


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_a_model_of_which_nothing_is_known(gptq, demo_model, tmp_path, form):
    source = shutil.copytree(demo_model, tmp_path / "so|me `model")
    (source / "README.md").unlink()
    common = ["--mode", "rtn", "--format", form, "--skip", r"h\.[1-5]\."]
    result = gptq("quantize", source, "-o", tmp_path / "out", *common)
    assert result.returncode == 0, result.stderr
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {"library_name": "libgptq", "tags": ["quantized", "gptq", "libgptq"]}
    assert card.text.startswith("# so_me _model, quantized to 4 bits\n")
    assert "## Quality" not in card.text
    assert "calibration |" not in card.text
    assert ("compressed-tensors" in card.text) == (form == "compressed-tensors")


def test_a_folder_of_the_hubs_cache_names_the_base_model(gptq, demo_model, tmp_path):
    source = shutil.copytree(demo_model, tmp_path / "models--someone--demo" / "snapshots" / "0123abc")
    result = gptq("quantize", source, "-o", tmp_path / "out", "--mode", "rtn", "--skip", r"h\.[1-5]\.")
    assert result.returncode == 0, result.stderr
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "someone/demo"
    assert "[someone/demo](https://huggingface.co/someone/demo)" in card.text
