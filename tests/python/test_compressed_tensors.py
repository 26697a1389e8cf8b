"""Checkpoints of compressed-tensors: what the driver writes the package decompresses to the same weights, and the
other way round.

transformers cannot run them for a GPT-2, so the weights that the package decompresses go into a float model.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors_reader import LEAVES, PackQuantized, decompressed, package_scheme, settings_of, tensors_of
from conftest import refused
from safetensors.torch import load_file, save_file

SCORING = ["--window", "128", "--max-tokens", "256"]
LAYER = "transformer.h.1.mlp.c_fc"

# By name: options of `quantize`. How the codes came about does not matter here.
SETTINGS = {
    "default": [],
    "asymmetric": ["--asymmetric", "--group-size", "32"],
    "rows": ["--bits", "8", "--group-size", "-1"],
    "three": ["--bits", "3", "--group-size", "64", "--asymmetric"],
    "six": ["--bits", "6", "--group-size", "256"],
    "mixed": ["--override", r"h\.0\.:bits=8,group_size=32", "--override", r"h\.1\.mlp:skip"],
}


@pytest.fixture(scope="module")
def written(gptq, demo_model, tmp_path_factory):
    """Return a function that gives what `quantize` wrote with such settings in a format."""
    folders = {}

    def quantize(name, form="compressed-tensors"):
        if (name, form) not in folders:
            folder = tmp_path_factory.mktemp(name) / form
            common = ["quantize", demo_model, "-o", folder, "--mode", "rtn", "--lm-head", "keep"]
            result = gptq(*common, "--format", form, *SETTINGS[name])
            assert result.returncode == 0, result.stderr
            folders[name, form] = folder
        return folders[name, form]

    return quantize


@pytest.mark.parametrize("name", SETTINGS)
def test_the_package_decompresses_the_same_weights(written, library_path, shown, name):
    torch.ops.load_library(library_path)
    folder = written(name)
    weights, packed = decompressed(folder), tensors_of(written(name, "libgptq"))
    settings = settings_of(written(name, "libgptq"))["modules"]
    assert sorted(weights) == sorted(layer for layer in settings if f"{layer}.packed" in packed)
    assert len(weights) == (22 if name == "mixed" else 24)
    for layer, weight in weights.items():
        held = [packed.get(f"{layer}.{leaf}") for leaf in ("packed", "scales", "zeros")]
        dequantize = torch.ops.gptq.dequantize_w8 if settings[layer]["bits"] > 4 else torch.ops.gptq.dequantize_w4
        expected = dequantize(*held, weight.shape[1])
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, expected, rtol=0, atol=0)
    shown("compressed-tensors", "gptq quantize", " ".join(SETTINGS[name]), "compressed-tensors", "same bits")


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_that_readers_want(written, name):
    settings = settings_of(written(name))
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["format"] == "pack-quantized"
    assert settings["quantization_status"] == "compressed"
    tensors = tensors_of(written(name))
    blocks = {layer.removesuffix(".weight_packed") for layer in tensors if layer.endswith(".weight_packed")}
    linears = {f"transformer.h.{h}.{part}" for h in range(6) for part in ("attn.c_attn", "attn.c_proj")}
    linears |= {f"transformer.h.{h}.mlp.{part}" for h in range(6) for part in ("c_fc", "c_proj")}
    assert set(settings["ignore"]) == {"lm_head"} | linears - blocks
    for layer in blocks:
        weights = package_scheme(settings, layer).weights
        bits = 8 if name == "mixed" and ".h.0." in layer else {"rows": 8, "three": 3, "six": 6}.get(name, 4)
        assert weights.num_bits == bits
        assert weights.symmetric == ("--asymmetric" not in SETTINGS[name])
        assert (weights.strategy == "channel") == (name == "rows")
    assert all(package_scheme(settings, layer) is None for layer in settings["ignore"])


@pytest.mark.parametrize("name", SETTINGS)
def test_formats_score_the_same_to_the_last_bit(gptq, written, perplexity, tmp_path, shown, name):
    folder = written(name)
    assert perplexity(folder) == perplexity(written(name, "libgptq"))
    for source, target, form in ((folder, "packed", "libgptq"), (tmp_path / "packed", "back", "compressed-tensors")):
        result = gptq("convert", source, tmp_path / target, "--format", form)
        assert result.returncode == 0, result.stderr
    for one, other in ((tmp_path / "packed", written(name, "libgptq")), (tmp_path / "back", folder)):
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert settings_of(tmp_path / "back") == settings_of(folder)
    shown("compressed-tensors", "gptq quantize", " ".join(SETTINGS[name]), "gptq", "same bits")


def test_conversion_by_way_of_the_gptq_format(gptq, written, tmp_path):
    folder = written("asymmetric")
    assert gptq("convert", folder, tmp_path / "gptq", "--format", "gptq").returncode == 0
    assert gptq("convert", tmp_path / "gptq", tmp_path / "back", "--format", "compressed-tensors").returncode == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@torch.no_grad()
def transformers_perplexity(folder, text):
    """Return the perplexity of the folder's float tensors with the weights that the package decompresses."""
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("quantization_config")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).float().eval()
    state = {name: tensor.float() for name, tensor in tensors_of(folder).items() if tensor.is_floating_point()}
    state |= {f"{layer}.weight": weight.t() for layer, weight in decompressed(folder).items()}  # Conv1D has [K, N]
    missing, _ = model.load_state_dict(state, strict=False)
    assert missing in ([], ["lm_head.weight"])
    model.tie_weights()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text.read_text(), verbose=False)["input_ids"][:256]).reshape(-1, 128)
    logits = model(ids).logits[:, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())


@pytest.mark.parametrize("name", ["mixed"])
def test_a_float_model_with_those_weights_scores_the_same(written, perplexity, text, name):
    assert perplexity(written(name)) == pytest.approx(transformers_perplexity(written(name), text[1]), rel=1e-5)


def test_transformers_does_not_see_the_linears_of_a_gpt2(written):
    """Its integration looks for nn.Linear; a GPT-2 has Conv1D. When this fails, docs/checkpoints.md can say better."""
    model = transformers.AutoModelForCausalLM.from_pretrained(written("default"))
    assert not any(hasattr(module, "quantization_scheme") for module in model.modules())


def compress(demo_model, folder, groups, dtype=torch.float16):
    """Write the demo model as the package compresses it.

    Each group is a list of targets and the package's arguments for their weights.
    """
    folder.mkdir()
    for file in demo_model.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    schemes = {
        f"group_{i}": QuantizationScheme(targets=targets, weights=QuantizationArgs(**arguments))
        for i, (targets, arguments) in enumerate(groups)
    }
    settings = QuantizationConfig(
        config_groups=schemes, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
    ).model_dump(mode="json")
    state = {}
    for stored_name, tensor in tensors_of(demo_model).items():
        name = f"transformer.{stored_name}"
        layer = name.removesuffix(".weight")
        if layer == name or layer.rsplit(".", 1)[-1] not in ("c_attn", "c_proj", "c_fc"):
            state[name] = tensor
            continue
        scheme = package_scheme(settings, layer)
        weight = tensor.t().float().contiguous()
        width = scheme.weights.group_size or weight.shape[1]
        grouped = weight.reshape(weight.shape[0], -1, width)
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        top = 2**scheme.weights.num_bits - 1
        if scheme.weights.symmetric:
            scale = (torch.maximum(-low, high) * 2 / top).to(dtype)
            zero = None
        else:
            scale = ((high - low) / top).to(dtype)
            zero = (-low / scale.float() - (top + 1) // 2).round().clamp(-(top + 1) // 2, top // 2).to(torch.int8)
        stored = {"weight": weight, "weight_scale": scale} | ({} if zero is None else {"weight_zero_point": zero})
        for leaf, value in PackQuantized.compress(stored, scheme).items():
            state[f"{layer}.{leaf}"] = value.contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((demo_model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


GROUP = {"type": "int", "strategy": "group"}
COMPRESSED = {
    "w4 g128": ([(["Linear"], {**GROUP, "num_bits": 4, "group_size": 128})], torch.float16),
    "w4 g32 asymmetric bf16": (
        [(["Linear"], {**GROUP, "num_bits": 4, "group_size": 32, "symmetric": False})],
        torch.bfloat16,
    ),
    "w8 channel": ([(["Linear"], {"num_bits": 8, "type": "int", "strategy": "channel"})], torch.float16),
    "w3 g64 asymmetric": (
        [(["re:.*c_(attn|proj|fc)$"], {**GROUP, "num_bits": 3, "group_size": 64, "symmetric": False})],
        torch.float16,
    ),
    "mixed": (
        [
            (["Linear"], {**GROUP, "num_bits": 4, "group_size": 128}),
            ([r"re:.*\.h\.0\.", LAYER], {**GROUP, "num_bits": 8, "group_size": 64, "symmetric": False}),
        ],
        torch.float16,
    ),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_what_the_package_writes_is_read_here(gptq, demo_model, perplexity, text, tmp_path, shown, name):
    folder = compress(demo_model, tmp_path / "model", *COMPRESSED[name])
    ours, theirs = perplexity(folder), transformers_perplexity(folder, text[1])
    assert ours == pytest.approx(theirs, rel=1e-5)
    shown("compressed-tensors", "compressed-tensors", name, "compressed-tensors", f"{theirs:.3f}")
    shown("compressed-tensors", "compressed-tensors", name, "gptq", f"{theirs:.3f} → {ours:.3f}")
    # Back to what the package wrote, but for the settings and the dtype of the scales.
    assert gptq("convert", folder, tmp_path / "packed", "--format", "libgptq").returncode == 0
    assert perplexity(tmp_path / "packed") == ours
    assert gptq("convert", tmp_path / "packed", tmp_path / "back", "--format", "compressed-tensors").returncode == 0
    theirs, back = tensors_of(folder), tensors_of(tmp_path / "back")
    assert theirs.keys() == back.keys()
    for tensor, value in theirs.items():
        torch.testing.assert_close(back[tensor], value, rtol=0, atol=0, check_dtype="scale" not in tensor)


class TestRefusals:
    """Each ends with one line on stderr, a non-zero exit and no output left behind."""

    @pytest.mark.parametrize(
        ("options", "saying"),
        [
            (["--lm-head", "w8"], "--lm-head: must be keep with --format compressed-tensors, got w8"),
            (["--group-size", "96"], "c_attn: group_size must be -1 or divide the 256 inputs"),
            (["--act-order", "dynamic"], "--act-order: must not be dynamic with --format compressed-tensors"),
            (["--base-model", "a/b: c"], "--base-model: must be OWNER/NAME"),
        ],
    )
    def test_what_the_format_cannot_hold(self, gptq, demo_model, text, tmp_path, options, saying):
        common = ["-o", tmp_path / "out", "--calibration", text[0], "--samples", "2", "--format", "compressed-tensors"]
        refused(gptq("quantize", demo_model, *common, *options), saying=saying)
        assert list(tmp_path.iterdir()) == []

    def test_what_cannot_be_converted(self, gptq, demo_model, written, text, tmp_path):
        out = tmp_path / "out"
        refused(
            gptq("convert", written("default"), out, "--format", "compressed-tensors"),
            saying="is compressed-tensors already",
        )
        common = ["quantize", demo_model, "-o", tmp_path / "packed"]
        assert gptq(*common, "--mode", "rtn").returncode == 0
        refused(
            gptq("convert", tmp_path / "packed", out, "--format", "compressed-tensors"),
            saying="lm_head must keep its weight in the compressed-tensors format",
        )
        reordered = ["--act-order", "dynamic", "--group-size", "32", "--lm-head", "keep", "--skip", r"h\.[1-5]\."]
        assert gptq(*common, *reordered, "--calibration", text[0], "--samples", "1").returncode == 0
        refused(
            gptq("convert", tmp_path / "packed", out, "--format", "compressed-tensors"),
            saying="columns of a group must lie together",
        )
        refused(
            gptq("quantize", written("default"), "-o", out, "--mode", "rtn"),
            saying="must be a float model",
        )
        assert not out.exists()

    @pytest.fixture
    def broken(self, written, tmp_path):
        """Return a copy of a checkpoint to break."""
        return shutil.copytree(written("asymmetric"), tmp_path / "broken")

    def test_malformed_tensors(self, gptq, broken, text):
        weights = broken / "model.safetensors"
        good = load_file(weights)

        def attempt(leaf, tensor, *, saying):
            tensors = {**good, f"{LAYER}.{leaf}": tensor}
            save_file({name: value for name, value in tensors.items() if value is not None}, weights)
            refused(gptq("eval", broken, "--text", text[1]), saying=saying)

        for leaf in LEAVES:
            value = good[f"{LAYER}.{leaf}"]
            attempt(leaf, None, saying=rf"tensor \"transformer\.h\.1\.mlp\.c_fc\.{leaf}\" of shape .* is missing")
            attempt(leaf, value[:-1].clone(), saying=rf"c_fc\.{leaf}\" must have shape")
            attempt(leaf, value.to(torch.uint8), saying=rf"c_fc\.{leaf}\"? must be .*, got Byte")
        attempt("weight_shape", torch.tensor([256, 1024]), saying=r"weight_shape must be \[N, K\] = \[1024, 256\], got")
        scale = good[f"{LAYER}.weight_scale"].clone()
        scale[0, 0] = np.nan
        attempt("weight_scale", scale, saying=r"c_fc\.weight_scale must be finite")
        groups = torch.arange(256, dtype=torch.int32) // 32
        groups[5] = 8
        attempt("weight_g_idx", groups, saying=r"c_fc\.weight_g_idx must be in 0\.\.7, element 5 is 8")
        attempt("packed", good[f"{LAYER}.weight_packed"].clone(), saying=r"c_fc\.packed\" is not part of the model")

    @pytest.mark.parametrize(
        ("changes", "saying"),
        [
            (
                {"num_bits": 8},
                r"weight_packed\" must have shape \[768, 64\], which config.json asks for, got \[768, 32\]",
            ),
            ({"num_bits": 9}, "num_bits must be an integer from 2 to 8, got 9"),
            ({"group_size": 64}, r"weight_scale\" must have shape"),
            ({"symmetric": True}, r"weight_zero_point\" is not part of the model"),
            ({"type": "float"}, 'type must be "int", got "float"'),
        ],
    )
    def test_malformed_settings(self, gptq, broken, text, changes, saying):
        config = json.loads((broken / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)
        (broken / "config.json").write_text(json.dumps(config))
        refused(gptq("eval", broken, "--text", text[1]), saying=saying)


def test_groups_in_another_order_are_read(written, perplexity, tmp_path):
    """Hidden units change places, and so do the groups of the next linear's inputs: older packages wrote these."""
    folder = shutil.copytree(written("default"), tmp_path / "model")
    tensors = tensors_of(folder)
    after = "transformer.h.1.mlp.c_proj"
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(0))
    for name in (f"{LAYER}.weight_packed", f"{LAYER}.weight_scale", f"{LAYER}.bias"):
        tensors[name] = tensors[name][order]
    codes = unpack_from_int32(tensors[f"{after}.weight_packed"], 4, torch.Size([256, 1024]))
    tensors[f"{after}.weight_packed"] = pack_to_int32(codes[:, order].contiguous(), 4)
    tensors[f"{after}.weight_g_idx"] = (order // 128).to(torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert perplexity(folder) == pytest.approx(perplexity(written("default")), rel=1e-6)
