"""TorchScript files of transformers' GPT-2 and of other modules, through the driver and back into Python."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("gptq")
transformers = pytest.importorskip("transformers")
import export_torchscript  # noqa: E402

warnings.filterwarnings("ignore", category=FutureWarning)

LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
module = torch.jit.load(sys.argv[2])
torch.save(module(torch.load(sys.argv[3])), sys.argv[4])
"""


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=4096, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def demo_model(root):
    return root / "tests" / "data" / "demo_gpt2"


@pytest.fixture(scope="module")
def text(tmp_path_factory, root):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((root / "scripts" / "train_demo_model.py").read_text() * 4)
    return path


def logits_in_a_fresh_process(library, module, ids, folder):
    """Load with nothing but torch.ops.load_library."""
    torch.save(ids, folder / "ids.pt")
    command = [sys.executable, "-c", LOAD, library, module, folder / "ids.pt", folder / "logits.pt"]
    subprocess.run([str(part) for part in command], check=True)
    return torch.load(folder / "logits.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (5, 9)])
def test_traced_gpt2_takes_any_batch_and_length(gpt2, dtype, shape):
    model = gpt2.to(dtype)
    traced = export_torchscript.trace(model)
    ids = torch.randint(4096, shape)
    with torch.no_grad():
        expected = model(ids).logits.float()
    # The operators are the same; their products may be blocked otherwise, which moves a sum by a few roundings.
    assert (traced(ids).float() - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()
    gpt2.to(torch.float32)


def test_other_attention_is_refused():
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="must have attn_implementation='eager', got 'sdpa'"):
        export_torchscript.trace(transformers.GPT2LMHeadModel(config))


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("traced", torch.float32), ("frozen", torch.float32), ("traced", torch.bfloat16), ("traced", torch.float16)],
)
def test_gpt2_goes_through_the_driver(gpt2, form, dtype, run_driver, library_path, demo_model, text, tmp_path, shown):
    model = copy.deepcopy(gpt2).to(dtype)
    traced = export_torchscript.trace(model)
    module = torch.jit.freeze(traced) if form == "frozen" else traced
    torch.jit.save(module, tmp_path / "float.pt")
    tokenizer = ["--tokenizer", demo_model]
    scoring = ["--window", "32", "--max-tokens", "500"]
    result = run_driver(
        *["quantize", tmp_path / "float.pt", *tokenizer, "-o", tmp_path / "int4.pt"],
        *["--calibration", text, "--samples", "16", "--sequence-length", "32", "--group-size", "32"],
        *["--eval", text, *scoring, "--json", tmp_path / "report.json"],
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [layer["bits"] for layer in report["layers"]] == [4] * 8 + [8]  # the head is the embedding
    assert report["kl_divergence"]["quantized"] < report["kl_divergence"]["rtn"]

    result = run_driver(
        *["eval", tmp_path / "int4.pt", *tokenizer, "--text", text, *scoring, "--json", tmp_path / "eval.json"]
    )
    assert result.returncode == 0, result.stderr
    loaded = json.loads((tmp_path / "eval.json").read_text())
    assert loaded["perplexity"]["baseline"] == report["perplexity"]["quantized"]
    result = run_driver("generate", tmp_path / "int4.pt", *tokenizer, "--prompt", "import os", "--max-new-tokens", "4")
    assert result.returncode == 0 and result.stdout.startswith("import os"), result.stderr

    ids = torch.randint(4096, (3, 20))
    got = logits_in_a_fresh_process(library_path, tmp_path / "int4.pt", ids, tmp_path)
    with torch.no_grad():
        expected = gpt2(ids).logits
    assert got.shape == expected.shape
    assert got.dtype == dtype
    error = float((got.detach().float() - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.1  # 4-bit weights: each layer's outputs are off by a few per cent

    options = f"GPT-2 of transformers, {form}, {str(dtype).removeprefix('torch.')}"
    shown("TorchScript .pt", "gptq quantize", options, "gptq", "same bits")
    shown("TorchScript .pt", "gptq quantize", options, "torch", f"{100 * error:.1f} % from the float model")

    # Of the float weights only the embeddings, layer norms and biases are left.
    kept = [model.transformer.wte.weight, model.transformer.wpe.weight]
    kept += [parameter for name, parameter in model.named_parameters() if parameter.dim() == 1]
    expected_bytes = sum(parameter.nbytes for parameter in kept) + report["bytes"]["linears_after"]
    assert (tmp_path / "int4.pt").stat().st_size < expected_bytes + 200_000  # code and the archive's own


def test_a_file_says_how_its_linears_multiply(gpt2, run_driver, demo_model, text, tmp_path):
    torch.jit.save(export_torchscript.trace(gpt2), tmp_path / "float.pt")
    scoring = ["--tokenizer", demo_model, "--window", "32", "--max-tokens", "500", "--json", tmp_path / "report.json"]

    def perplexity(command, *options):
        result = run_driver(command, *options, *scoring)
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / "report.json").read_text())["perplexity"]

    quantized = ["-o", tmp_path / "int4.pt", "--mode", "rtn", "--compute", "int8", "--eval", text]
    expected = perplexity("quantize", tmp_path / "float.pt", *quantized)["quantized"]
    loaded = [tmp_path / "int4.pt", "--text", text]
    assert perplexity("eval", *loaded)["baseline"] == expected
    assert perplexity("eval", *loaded, "--compute", "exact")["baseline"] != expected
