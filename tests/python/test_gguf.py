"""GGUF files of the driver, read with the gguf package and compared with the checkpoint that they were made from.

The test with llama.cpp itself runs where the environment variable GPTQ_LLAMA_PYTHON names an interpreter that has
cyllama, which carries it, and numpy.
"""

import json
import os
import re
import shutil
import subprocess

import gguf
import numpy as np
import pytest
import torch
from conftest import refused
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from safetensors.torch import save_file

LINEARS = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
NORMS = {"ln_1": "attn_norm", "ln_2": "ffn_norm"}
# By name: options of `quantize`, and the types of its weights.
SETTINGS = {
    "default": (["--group-size", "32"], {Type.Q4_0, Type.Q8_0}),
    "rows": (["--group-size", "-1", "--lm-head", "keep"], {Type.Q4_0}),
    "bytes": (["--bits", "8", "--group-size", "64", "--lm-head", "w4"], {Type.Q8_0}),
    "mixed": (
        ["--override", r"h\.0\.:bits=8,group_size=32", "--override", r"h\.1\.mlp:skip"],
        {Type.Q4_0, Type.Q8_0, Type.F16},
    ),
}
ASYMMETRIC = ("--asymmetric", "--group-size", "64", "--lm-head", "keep")
Q4_1 = f"{' '.join(ASYMMETRIC)}, scales of 7 bits"
TINY = ("--mode", "rtn", "--lm-head", "keep", "--skip", r"mlp\.c_fc", "--group-size", "32")
# Where the nibbles of a dword lie in the packed format: column by column.
NIBBLE_OF_COLUMN = np.array([0, 2, 4, 6, 1, 3, 5, 7], np.uint32)


def read_folder(folder):
    """Return the config, and the tensors by name."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return json.loads((folder / "config.json").read_text()), tensors


def unpack(packed, n, k):
    """Return the codes [N, K] of what pack_w4 or pack_w8 packed."""
    if packed.shape[2] == 128:
        halves = packed.numpy().reshape(*packed.shape[:2], 2, 16, 4)  # columns k0 .. k3 of each row, then k4 .. k7
        return halves.transpose(0, 3, 1, 2, 4).reshape(packed.shape[0] * 16, -1)[:n, :k].astype(np.int64)
    dwords = packed.numpy().view(np.uint32)  # [N / 16, K / 8, 16]
    nibbles = (dwords[..., None] >> (4 * NIBBLE_OF_COLUMN)) & 15
    return nibbles.transpose(0, 2, 1, 3).reshape(dwords.shape[0] * 16, -1)[:n, :k].astype(np.int64)


def decode(tensors, path, settings, k):
    """Return the weight [N, K] in float32 that a linear of a libgptq checkpoint stands for, every value exact."""
    scales = tensors[f"{path}.scales"].double().numpy()
    layout = {**settings, **settings["modules"].get(path, {})}
    codes = unpack(tensors[f"{path}.packed"], scales.shape[1], k)
    group_size = k if layout["group_size"] == -1 else layout["group_size"]
    groups = np.arange(k) // group_size
    zeros = tensors.get(f"{path}.zeros")
    middle = 128 if layout["bits"] > 4 else 8
    zeros = np.full(scales.shape, middle) if zeros is None else zeros.numpy().astype(np.int64)
    weight = (codes - zeros.T[:, groups]) * scales.T[:, groups]
    if f"{path}.input_order" in tensors:
        ordered, weight = weight, np.empty_like(weight)
        weight[:, tensors[f"{path}.input_order"].numpy()] = ordered
    assert np.array_equal(weight, weight.astype(np.float32))
    return weight.astype(np.float32)


def expected_tensors(folder):
    """Return what a GGUF file of the folder must hold, in float32."""
    config, tensors = read_folder(folder)
    settings = config.get("quantization_config")

    def linear(path, k):
        if f"{path}.packed" in tensors:
            return decode(tensors, path, settings, k)
        weight = tensors[f"{path}.weight"].float()
        return (weight if path == "lm_head" else weight.T).numpy()

    def floats(name):
        return tensors[f"transformer.{name}"].float().numpy()

    expected = {"token_embd.weight": floats("wte.weight"), "position_embd.weight": floats("wpe.weight")}
    norms = {"ln_f": "output_norm"}
    for layer in range(config["n_layer"]):
        norms.update({f"h.{layer}.{theirs}": f"blk.{layer}.{name}" for theirs, name in NORMS.items()})
        for theirs, name in LINEARS.items():
            inner = config.get("n_inner") or 4 * config["n_embd"]
            k = inner if theirs == "mlp.c_proj" else config["n_embd"]
            path = f"h.{layer}.{theirs}"
            expected[f"blk.{layer}.{name}.weight"] = linear(f"transformer.{path}", k)
            expected[f"blk.{layer}.{name}.bias"] = floats(f"{path}.bias")
    for theirs, name in norms.items():
        expected.update({f"{name}.{leaf}": floats(f"{theirs}.{leaf}") for leaf in ("weight", "bias")})
    if any(name.startswith("lm_head.") for name in tensors):
        expected["output.weight"] = linear("lm_head", config["n_embd"])
    return expected


def check_tensors(reader, folder):
    """Check that the file holds the folder's tensors, bit for bit; return the types by name."""
    expected = expected_tensors(folder)
    held = {tensor.name: tensor for tensor in reader.tensors}
    assert held.keys() == expected.keys()
    for name, tensor in held.items():
        assert list(reversed(tensor.shape.tolist())) == list(expected[name].shape), name
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # Adding 0 makes one of the two zeros that float has.
        assert (weight + 0).tobytes() == (expected[name] + 0).tobytes(), name
        if weight.ndim == 1:
            assert tensor.tensor_type == Type.F32, name
    return {name: tensor.tensor_type for name, tensor in held.items()}


def values_of(reader):
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


@pytest.fixture(scope="module")
def short_model(demo_model, tmp_path_factory):
    """Return the folder of the demo model's first two layers."""
    folder = shutil.copytree(demo_model, tmp_path_factory.mktemp("float") / "model")
    config, tensors = read_folder(folder)
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 2}))
    kept = {name: tensor for name, tensor in tensors.items() if not re.match(r"h\.[2-9]\.", name)}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def quantized(gptq, short_model, tmp_path_factory):
    """Return a function that gives the folder of `quantize --mode rtn` with such options, of the short model."""
    folders = {}

    def quantize(*options, model=short_model):
        if (model, options) not in folders:
            folder = folders[model, options] = tmp_path_factory.mktemp("model") / "model"
            result = gptq("quantize", model, "-o", folder, "--mode", "rtn", *options)
            assert result.returncode == 0, result.stderr
        return folders[model, options]

    return quantize


@pytest.mark.parametrize("name", SETTINGS)
def test_every_weight_is_the_same_to_the_last_bit(gptq, quantized, tmp_path, shown, name):
    options, kinds = SETTINGS[name]
    folder = quantized(*options)
    result = gptq("convert", folder, tmp_path / "model.gguf", "--format", "gguf")
    assert result.returncode == 0, result.stderr
    types = check_tensors(gguf.GGUFReader(tmp_path / "model.gguf"), folder)
    assert {kind for tensor, kind in types.items() if "blk" in tensor and "weight" in tensor} - {Type.F32} <= kinds
    assert types["token_embd.weight"] == types["position_embd.weight"] == Type.F16
    assert types.get("output.weight") == (None if "keep" in options else Type.Q8_0)
    assert (types["blk.1.ffn_up.weight"] == Type.F16) == (name == "mixed")
    assert (types["blk.0.ffn_up.weight"] == Type.Q8_0) == (name in ("mixed", "bytes"))
    shown("gguf", "gptq convert", " ".join(options), "gguf", "same bits")


def test_quantize_writes_the_same_file(gptq, short_model, text, tmp_path):
    """Biases that the quantizer moves included."""
    common = ["quantize", short_model, "--calibration", text[0], "--samples", "2", "--sequence-length", "64"]
    assert gptq(*common, "-o", tmp_path / "folder").returncode == 0
    result = gptq(*common, "-o", tmp_path / "straight.gguf", "--format", "gguf")
    assert result.returncode == 0, result.stderr
    assert gptq("convert", tmp_path / "folder", tmp_path / "model.gguf", "--format", "gguf").returncode == 0
    assert (tmp_path / "straight.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    moved = read_folder(tmp_path / "folder")[1]["transformer.h.0.mlp.c_fc.bias"]
    left = read_folder(short_model)[1]["h.0.mlp.c_fc.bias"]
    assert not torch.equal(moved, left)


def test_keys_and_tokens_are_those_that_llama_cpp_wants(gptq, quantized, demo_model, tmp_path):
    assert gptq("convert", quantized(), tmp_path / "model.gguf", "--format", "gguf").returncode == 0
    values = values_of(gguf.GGUFReader(tmp_path / "model.gguf"))
    tokenizer = json.loads((demo_model / "tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    assert values.pop("tokenizer.ggml.tokens") == sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    assert values.pop("tokenizer.ggml.merges") == merges
    assert values.pop("tokenizer.ggml.token_type") == [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 4095
    assert values.pop("gpt2.attention.layer_norm_epsilon") == np.float32(1e-5)
    assert values == {
        "general.architecture": "gpt2",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "gpt2.context_length": 512,
        "gpt2.embedding_length": 256,
        "gpt2.feed_forward_length": 1024,
        "gpt2.block_count": 2,
        "gpt2.attention.head_count": 4,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


def test_a_gptq_folder_with_reordered_columns(gptq, quantized, tmp_path):
    """g_idx may give any 32 columns that lie side by side to a group, not others."""
    folder = quantized("--format", "gptq", "--group-size", "64")
    shutil.copytree(folder, tmp_path / "reordered")
    config, tensors = read_folder(folder)
    layer = "transformer.h.1.attn.c_attn"
    blocks = torch.tensor([3, 0, 1, 2, 0, 1, 3, 2], dtype=torch.int32)
    tensors[f"{layer}.g_idx"] = blocks.repeat_interleave(32)
    save_file(tensors, tmp_path / "reordered" / "model.safetensors")
    for source, target, form in (("reordered", "packed", "libgptq"), ("reordered", "model.gguf", "gguf")):
        result = gptq("convert", tmp_path / source, tmp_path / target, "--format", form)
        assert result.returncode == 0, result.stderr
    assert f"{layer}.input_order" in read_folder(tmp_path / "packed")[1]
    check_tensors(gguf.GGUFReader(tmp_path / "model.gguf"), tmp_path / "packed")

    tensors[f"{layer}.g_idx"][[40, 200]] = tensors[f"{layer}.g_idx"][[200, 40]]
    save_file(tensors, tmp_path / "reordered" / "model.safetensors")
    refused(
        gptq("convert", tmp_path / "reordered", tmp_path / "mixed.gguf", "--format", "gguf"),
        saying=r"h\.1\.attn\.c_attn: columns 32\.\.63 must be of one group in a GGUF file, column 32 is of group 0 and "
        "column 40 of group 3",
    )
    assert not (tmp_path / "mixed.gguf").exists()


@pytest.fixture
def tiny(demo_model, tmp_path):
    """Return a function that writes a float folder with the demo's tokenizer; its tensors may have several dtypes."""

    def write(name, *, tied=True, **changes):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_model / file, folder)
        config = {"model_type": "gpt2", "vocab_size": 4100, "n_positions": 24, "n_embd": 64, "n_layer": 1, "n_head": 2}
        config.update({"n_inner": 96, "tie_word_embeddings": tied, **changes})
        (folder / "config.json").write_text(json.dumps(config))
        random = torch.Generator().manual_seed(0)
        width, inner = config["n_embd"], config["n_inner"]

        def tensor(*shape):
            return torch.randn(*shape, generator=random) * 0.1

        tensors = {"wte.weight": tensor(4100, width).bfloat16(), "wpe.weight": tensor(24, width)}
        sizes = [(width, 3 * width), (width, width), (width, inner), (inner, width)]
        for path, size in zip(LINEARS, sizes, strict=True):
            tensors[f"h.0.{path}.weight"] = tensor(*size).bfloat16()
            tensors[f"h.0.{path}.bias"] = tensor(size[1]).bfloat16()
        for path in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
            tensors.update({f"{path}.weight": 1 + tensor(width).half(), f"{path}.bias": tensor(width).half()})
        tensors = {f"transformer.{name}": value for name, value in tensors.items()}
        if not tied:
            tensors["lm_head.weight"] = tensor(4100, width).half()
        save_file(tensors, folder / "model.safetensors")
        return folder

    return write


@pytest.mark.parametrize("tied", [True, False])
def test_other_dtypes_heads_and_vocabularies(gptq, tiny, tmp_path, tied):
    assert gptq("quantize", tiny("float", tied=tied), "-o", tmp_path / "packed", *TINY).returncode == 0
    result = gptq("convert", tmp_path / "packed", tmp_path / "model.gguf", "--format", "gguf")
    assert result.returncode == 0, result.stderr
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    types = check_tensors(reader, tmp_path / "packed")
    assert types["token_embd.weight"] == types["blk.0.ffn_up.weight"] == Type.BF16
    assert types["position_embd.weight"] == Type.F32
    assert types.get("output.weight") == (None if tied else Type.F16)
    values = values_of(reader)
    assert values["gpt2.feed_forward_length"] == 96
    assert values["tokenizer.ggml.tokens"][4095:] == [values["tokenizer.ggml.tokens"][4095]] + [
        f"[PAD{token}]" for token in range(4096, 4100)
    ]
    assert values["tokenizer.ggml.token_type"][4095:] == [gguf.TokenType.NORMAL] + [gguf.TokenType.UNUSED] * 4
    # config.json's default, 50256, is beyond the vocabulary; the tokenizer's <|endoftext|> is 0.
    assert values["tokenizer.ggml.bos_token_id"] == values["tokenizer.ggml.eos_token_id"] == 0


def with_short_scales(folder, out):
    """Copy a folder with scales of 7 bits, which leave room for the 4 of a zero point in the 11 of an f16."""
    shutil.copytree(folder, out)
    _, tensors = read_folder(folder)
    for name in tensors:
        if name.endswith(".scales"):
            tensors[name] = (tensors[name].view(torch.int16) & -16).view(torch.half)
    save_file(tensors, out / "model.safetensors")
    return out


def test_minima_that_are_halves_make_q4_1(gptq, quantized, tmp_path, shown):
    refused(
        gptq("convert", quantized(*ASYMMETRIC), tmp_path / "model.gguf", "--format", "gguf"),
        saying=r"transformer\.h\.\d\.\S+: row \d+, group \d: -scale \* zero point must be an f16 in a GGUF file",
    )
    assert list(tmp_path.iterdir()) == []
    folder = with_short_scales(quantized(*ASYMMETRIC), tmp_path / "short")
    result = gptq("convert", folder, tmp_path / "model.gguf", "--format", "gguf")
    assert result.returncode == 0, result.stderr
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    types = check_tensors(reader, folder)
    assert {types[f"blk.{layer}.{name}.weight"] for layer in range(2) for name in LINEARS.values()} == {Type.Q4_1}
    assert values_of(reader)["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    shown("gguf", "gptq convert", Q4_1, "gguf", "same bits")


@pytest.fixture
def compare_with_llama_cpp(gptq, root, text, tmp_path):
    """Return a function that scores a folder here and as a GGUF file in llama.cpp."""
    if "GPTQ_LLAMA_PYTHON" not in os.environ:
        pytest.skip("GPTQ_LLAMA_PYTHON names no interpreter with llama.cpp")

    def compare(folder, window):
        assert gptq("convert", folder, tmp_path / "model.gguf", "--format", "gguf").returncode == 0
        scoring = ["--text", text[1], "--window", str(window), "--max-tokens", "2048", "--json"]
        script = [os.environ["GPTQ_LLAMA_PYTHON"], root / "scripts" / "peer_gguf.py", tmp_path / "model.gguf"]
        subprocess.run([*script, *scoring, tmp_path / "theirs.json"], check=True, capture_output=True)
        assert gptq("eval", folder, *scoring, tmp_path / "ours.json").returncode == 0
        theirs = json.loads((tmp_path / "theirs.json").read_text())
        ours = json.loads((tmp_path / "ours.json").read_text())["perplexity"]["baseline"]
        assert theirs["perplexity"] == pytest.approx(ours, rel=0.002)
        question = json.dumps(text[1].read_text(encoding="utf-8"))
        assert theirs["ids"] == json.loads(gptq("tokenize", folder, input=question).stdout)
        return f"{ours:.3f} → {theirs['perplexity']:.3f}"

    return compare


@pytest.mark.parametrize("name", SETTINGS)
def test_llama_cpp_scores_the_same(compare_with_llama_cpp, quantized, demo_model, shown, name):
    options = SETTINGS[name][0]
    result = compare_with_llama_cpp(quantized(*options, model=demo_model), 256)
    shown("gguf", "gptq convert", " ".join(options), "llama.cpp", result)


def test_llama_cpp_scores_q4_1_the_same(compare_with_llama_cpp, quantized, demo_model, tmp_path, shown):
    folder = with_short_scales(quantized(*ASYMMETRIC, model=demo_model), tmp_path / "short")
    shown("gguf", "gptq convert", Q4_1, "llama.cpp", compare_with_llama_cpp(folder, 256))


@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_takes_other_dtypes_heads_and_vocabularies(gptq, compare_with_llama_cpp, tiny, tmp_path, tied):
    assert gptq("quantize", tiny("float", tied=tied), "-o", tmp_path / "packed", *TINY).returncode == 0
    compare_with_llama_cpp(tmp_path / "packed", 24)


class TestRefusals:
    """Each ends with one line on stderr, a non-zero exit and no file left behind."""

    @pytest.mark.parametrize(
        ("options", "saying"),
        [
            (["--bits", "3"], "c_attn: bits must be 4 or 8 in a GGUF file, got 3"),
            (["--override", r"h\.1\.mlp:bits=6"], r"h\.1\.mlp\.c_fc: bits must be 4 or 8 in a GGUF file, got 6"),
            (["--group-size", "16"], "c_attn: group_size must be -1 or a multiple of 32 in a GGUF file, got 16"),
        ],
    )
    def test_what_the_blocks_cannot_hold(self, gptq, quantized, short_model, tmp_path, options, saying):
        out = tmp_path / "model.gguf"
        command = ["quantize", short_model, "-o", out, "--mode", "rtn", "--format", "gguf"]
        refused(gptq(*command, *options), saying=saying)
        refused(gptq("convert", quantized(*options, "--lm-head", "keep"), out, "--format", "gguf"), saying=saying)
        assert list(tmp_path.iterdir()) == []

    def test_what_needs_luck_is_refused_before_the_long_work(self, gptq, short_model, text, tmp_path):
        command = ["quantize", short_model, "-o", tmp_path / "model.gguf", "--calibration", text[0], "--format", "gguf"]
        refused(gptq(*command, "--asymmetric"), saying="c_attn: must be symmetric with --format gguf")
        refused(gptq(*command, "--act-order", "dynamic"), saying="c_attn: act-order must be auto, static or off")
        assert list(tmp_path.iterdir()) == []

    def test_rows_that_are_no_whole_blocks(self, gptq, tiny, tmp_path):
        folder = tiny("float", n_embd=40)
        command = ["quantize", folder, "-o", tmp_path / "model.gguf", "--mode", "rtn", "--group-size", "-1"]
        refused(gptq(*command, "--format", "gguf"), saying="c_attn: inputs must be a multiple of 32.*got 40")
        assert [path.name for path in tmp_path.iterdir()] == ["float"]

    @pytest.mark.parametrize(
        ("file", "changes", "saying"),
        [
            ("config.json", {"activation_function": "gelu"}, 'activation_function must be gelu_new .*got "gelu"'),
            ("config.json", {"scale_attn_weights": False}, "scale_attn_weights must be true in a GGUF file"),
            (
                "config.json",
                {"scale_attn_by_inverse_layer_idx": True},
                "scale_attn_by_inverse_layer_idx must be false in a GGUF file",
            ),
            (
                "tokenizer.json",
                {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
                "add_prefix_space must be false in a GGUF file",
            ),
            (
                "tokenizer.json",
                {
                    "pre_tokenizer": {
                        "type": "Sequence",
                        "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel", "add_prefix_space": False}],
                    }
                },
                "pre_tokenizer must be GPT-2's ByteLevel",
            ),
        ],
    )
    def test_what_llama_cpp_would_compute_otherwise(self, gptq, quantized, tmp_path, file, changes, saying):
        folder = shutil.copytree(quantized(), tmp_path / "model")
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **changes}))
        refused(gptq("convert", folder, tmp_path / "model.gguf", "--format", "gguf"), saying=rf"{file}: {saying}")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_what_is_no_quantized_folder_or_no_file(self, gptq, quantized, short_model, text, tmp_path):
        out = tmp_path / "model.gguf"
        refused(gptq("convert", short_model, out, "--format", "gguf"), saying="must be a quantized model")
        refused(gptq("convert", quantized(), tmp_path, "--format", "gguf"), saying="output must be a file, is a folder")
        assert gptq("convert", quantized(), out, "--format", "gguf").returncode == 0
        refused(gptq("eval", out, "--text", text[1]), saying="model.gguf: GGUF files are written only")
