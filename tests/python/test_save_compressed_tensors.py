"""gptq.compressed_tensors.save_pretrained: transformers and the driver load the same weights from what it wrote."""

import math

import pytest
import torch
import transformers

pytest.importorskip("gptq")
import gptq.compressed_tensors
from compressed_tensors_reader import decompressed, settings_of, tensors_of
from small_models import TOKENS, gpt2, llama, logits, quantized, random, token_ids, vit

IDS = token_ids(2, 30, seed=9)
SCORING = ["--window", "128", "--max-tokens", "256"]


def quantized_body(make=llama, calibration=TOKENS, **options):
    return quantized(make, calibration, **{"lm_head": "keep", **options})


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, gptq.QuantizedLinear)}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_weights(folder, model):
    """Check that the package unpacks the model's weights, and return its layers."""
    layers = layers_of(model)
    weights = decompressed(folder)
    assert weights.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(weights[name], layer.dequantize()), name
    return layers


def told(what, options):
    return ", ".join([what, *(f"{name}={value!r}" for name, value in options.items())])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 8, "group_size": -1},
        {"bits": 3},
        {"overrides": {"mlp": {"bits": 8, "group_size": -1}, r"layers\.0": {"skip": True}}},
    ],
)
def test_transformers_loads_the_same_weights(options, tmp_path, shown):
    model = quantized_body(**options)
    gptq.compressed_tensors.save_pretrained(model, tmp_path)
    layers = check_weights(tmp_path, model)
    assert len(layers) == (7 if "overrides" in options else 14)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected, found = logits(model, IDS), logits(loaded, IDS)  # the package unpacks weights in the first forward pass
    # Each output of a linear is off by a few roundings here and there, and two blocks do not make many of them.
    assert (found - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()
    for name, layer in layers.items():
        assert torch.equal(loaded.get_submodule(name).weight, layer.dequantize()), name
    for reader in ("compressed-tensors", "transformers"):
        shown("compressed-tensors", "save_pretrained", told("a Llama", options), reader, "same bits")


def perplexity_of(model):
    loss = torch.nn.functional.cross_entropy(logits(model, IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    return math.exp(loss.item())


@pytest.mark.parametrize("options", [{"symmetric": False}, {"bits": 2, "symmetric": False}])
def test_zero_points_that_transformers_unpacks_while_it_loads(options, tmp_path, shown):
    """Otherwise transformers 5.23 refuses the packed zero points, whoever wrote them."""
    model = quantized_body(**options)
    gptq.compressed_tensors.save_pretrained(model, tmp_path)
    layers = check_weights(tmp_path, model)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=config
    )
    for name, layer in layers.items():
        expected = layer.dequantize()
        # It multiplies in the scales' float16: half a unit in the last of 11 bits, or of the subnormal 2^-24.
        tolerance = 2.0**-11 * expected.abs() + 2.0**-25
        assert ((loaded.get_submodule(name).weight - expected).abs() <= tolerance).all(), name
    ours, theirs = perplexity_of(model), perplexity_of(loaded)
    assert theirs == pytest.approx(ours, rel=1e-3)
    shown("compressed-tensors", "save_pretrained", told("a Llama", options), "compressed-tensors", "same bits")
    shown(
        "compressed-tensors",
        "save_pretrained",
        told("a Llama", options),
        "transformers",
        f"{ours:.3f} → {theirs:.3f}, with `dequantize=True`",
    )


@pytest.mark.parametrize("options", [{"group_size": 128}, {"bits": 8, "group_size": -1, "symmetric": False}])
def test_the_driver_loads_the_same_model(run_driver, demo_model, perplexity, tmp_path, shown, options):
    model = transformers.GPT2LMHeadModel.from_pretrained(demo_model, dtype=torch.float32)
    gptq.quantize(model, mode="rtn", lm_head="keep", progress=False, **options)
    model.save_pretrained(tmp_path / "libgptq")
    gptq.compressed_tensors.save_pretrained(model, tmp_path / "exported")
    for folder in tmp_path.iterdir():
        for name in ("vocab.json", "merges.txt"):
            (folder / name).write_bytes((demo_model / name).read_bytes())
    assert perplexity(tmp_path / "exported") == perplexity(tmp_path / "libgptq")
    check_weights(tmp_path / "exported", model)
    for reader in ("gptq", "compressed-tensors"):
        shown("compressed-tensors", "save_pretrained", told("the demo model", options), reader, "same bits")
    # What the driver makes of the other folder of the same model.
    done = run_driver("convert", tmp_path / "libgptq", tmp_path / "driver", "--format", "compressed-tensors")
    assert done.returncode == 0, done.stderr
    ours, theirs = (settings_of(tmp_path / name) for name in ("exported", "driver"))
    assert ours["ignore"] == theirs["ignore"] == ["lm_head"]
    assert [group["targets"] for group in ours["config_groups"].values()] == [["Linear"]]
    for name, value in ours["config_groups"]["group_0"]["weights"].items():
        assert theirs["config_groups"]["group_0"]["weights"][name] == value


def test_the_model_stays_as_it_is(tmp_path):
    model = quantized_body(gpt2)
    before = logits(model, IDS)
    model.save_pretrained(tmp_path / "before")
    gptq.compressed_tensors.save_pretrained(model, tmp_path / "exported", max_shard_size="20KB")
    assert (tmp_path / "exported" / "model.safetensors.index.json").is_file()
    model.save_pretrained(tmp_path / "after")
    assert files_of(tmp_path / "before") == files_of(tmp_path / "after")
    assert torch.equal(logits(model, IDS), before)


def test_a_model_that_was_loaded(tmp_path):
    model = quantized_body()
    model.save_pretrained(tmp_path / "libgptq")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "libgptq")
    gptq.compressed_tensors.save_pretrained(loaded, tmp_path / "exported")
    assert len(check_weights(tmp_path / "exported", model)) == 14


def test_a_layer_with_two_names(tmp_path):
    model = quantized_body()
    first, second = (model.model.layers[i].mlp for i in (0, 1))
    second.up_proj = first.up_proj
    gptq.compressed_tensors.save_pretrained(model, tmp_path)
    weights = decompressed(tmp_path)
    assert len(weights) == 14
    assert torch.equal(weights["model.layers.1.mlp.up_proj"], first.up_proj.dequantize())


def test_a_float_head_stays_tied(tmp_path):
    model = quantized_body(gpt2)
    gptq.compressed_tensors.save_pretrained(model, tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    assert "lm_head.weight" not in tensors_of(tmp_path)


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        ({"lm_head": "w8"}, 'lm_head must keep its weight in the compressed-tensors format, see lm_head="keep"'),
        ({"act_order": "dynamic"}, r'q_proj: act_order must not be "dynamic" in the compressed-tensors format'),
        ({"group_size": 20}, "q_proj: group_size must be -1 or divide the 32 inputs in the .* format, got 20"),
    ],
)
def test_what_the_format_cannot_hold(options, saying, tmp_path):
    with pytest.raises(ValueError, match=saying):
        gptq.compressed_tensors.save_pretrained(quantized_body(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_convolution_is_refused(tmp_path):
    model = quantized_body(vit, [random(6, 3, 16, 16)])
    with pytest.raises(ValueError, match="must not be quantized in the compressed-tensors format: it is a convolution"):
        gptq.compressed_tensors.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model must have layers that gptq\.quantize quantized, has none"):
        gptq.compressed_tensors.save_pretrained(llama(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
