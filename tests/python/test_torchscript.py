"""TorchScript files of transformers' GPT-2 and of other modules, through the driver and back into Python."""

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


@pytest.fixture
def run_driver(driver_path):
    def run(*arguments):
        command = [str(part) for part in (driver_path, *arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


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


@pytest.mark.parametrize("form", ["traced", "frozen"])
def test_gpt2_goes_through_the_driver(gpt2, form, run_driver, library_path, demo_model, text, tmp_path):
    traced = export_torchscript.trace(gpt2)
    module = torch.jit.freeze(traced) if form == "frozen" else traced
    torch.jit.save(module, tmp_path / "float.pt")
    result = run_driver(
        *["quantize", tmp_path / "float.pt", "--tokenizer", demo_model, "-o", tmp_path / "int4.pt"],
        *["--calibration", text, "--samples", "16", "--sequence-length", "32", "--group-size", "32"],
        *["--eval", text, "--window", "32", "--max-tokens", "500", "--json", tmp_path / "report.json"],
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [layer["bits"] for layer in report["layers"]] == [4] * 8 + [8]  # the head is the embedding
    assert report["kl_divergence"]["quantized"] < report["kl_divergence"]["rtn"]

    ids = torch.randint(4096, (3, 20))
    got = logits_in_a_fresh_process(library_path, tmp_path / "int4.pt", ids, tmp_path)
    with torch.no_grad():
        expected = gpt2(ids).logits
    assert got.shape == expected.shape
    error = float((got.detach() - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.1  # 4-bit weights: each layer's outputs are off by a few per cent

    # Of the float weights only the embeddings, layer norms and biases are left.
    kept = [gpt2.transformer.wte.weight, gpt2.transformer.wpe.weight]
    kept += [parameter for name, parameter in gpt2.named_parameters() if parameter.dim() == 1]
    expected_bytes = 4 * sum(parameter.numel() for parameter in kept) + report["bytes"]["linears_after"]
    assert (tmp_path / "int4.pt").stat().st_size < expected_bytes + 200_000  # code and the archive's own


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(24, 40)
        self.shared = torch.nn.Linear(40, 40)
        self.last = torch.nn.Linear(40, 5, bias=False)

    def forward(self, x):
        x = torch.relu(self.first(x))
        for _ in range(2):
            x = torch.relu(self.shared(x)) + x
        return self.last(x)


def small_vit():
    """Return a vision transformer of torch's own modules: patches by a convolution, an encoder, a classifier."""
    encoder = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 4, stride=4),
        torch.nn.Flatten(2),
        Transpose(),
        torch.nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False),
        torch.nn.LayerNorm(32),
        torch.nn.Linear(32, 10),
    )


class Transpose(torch.nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def make_scripted(module, example):
    return torch.jit.script(module)


def make_traced(module, example):
    return torch.jit.trace(module, example, check_trace=False)


def make_frozen(module, example):
    return torch.jit.freeze(torch.jit.script(module))


# A script keeps the loop, in which the shared linear stands once; the others unroll it.
@pytest.mark.parametrize(("make", "calls"), [(make_scripted, 1), (make_traced, 2), (make_frozen, 2)])
def test_inspect_finds_the_linears_of_an_mlp(make, calls, run_driver, tmp_path):
    torch.manual_seed(1)
    module = make(Mlp().eval(), torch.randn(4, 24))
    torch.jit.save(module, tmp_path / "mlp.pt")
    result = run_driver("inspect", tmp_path / "mlp.pt", "--json", tmp_path / "inspect.json")
    assert result.returncode == 0, result.stderr
    shapes = [linear["shape"] for linear in json.loads((tmp_path / "inspect.json").read_text())["linears"]]
    assert sorted(shapes) == sorted([[40, 24], [5, 40], *[[40, 40]] * calls])


def test_inspect_finds_the_linears_of_a_vision_transformer(run_driver, tmp_path):
    torch.manual_seed(2)
    # In training mode torch's encoder runs its modules one by one instead of one fused operator; without dropout
    # the result is the same.
    module = torch.jit.trace(small_vit().train(), torch.randn(2, 3, 16, 16), check_trace=False)
    torch.jit.save(module, tmp_path / "vit.pt")
    result = run_driver("inspect", tmp_path / "vit.pt", "--json", tmp_path / "inspect.json")
    assert result.returncode == 0, result.stderr
    shapes = [linear["shape"] for linear in json.loads((tmp_path / "inspect.json").read_text())["linears"]]
    block = [[96, 32], [32, 32], [64, 32], [32, 64]]
    assert sorted(shapes) == sorted(block * 2 + [[10, 32]])
