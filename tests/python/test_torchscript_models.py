"""TorchScript modules of every kind through the driver, `gptq quantize FILE.pt`, and back into Python."""

import json
import math
import subprocess
import sys

import pytest
import tokenizers
import torch
from conftest import built, refused
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

torch.ops.load_library(built("GPTQ_LIBRARY", "build/lib/libgptq.so"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
module = torch.jit.load(sys.argv[2])
with torch.no_grad():
    torch.save([module(x) for x in torch.load(sys.argv[3])], sys.argv[4])
"""


@pytest.fixture
def run_alone(library_path, tmp_path):
    """Return a function that runs a saved module in a process with nothing but torch.ops.load_library."""

    def run(module, inputs):
        torch.save(inputs, tmp_path / "inputs.pt")
        command = [sys.executable, "-c", LOAD, library_path, module, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
        subprocess.run([str(part) for part in command], check=True)
        return torch.load(tmp_path / "outputs.pt")

    return run


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make):
    """Return make() in eval mode, with weights that do not depend on what ran before and no two that are equal."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def scripted(module, example):
    return torch.jit.script(module)


def traced(module, example):
    with torch.no_grad():
        return torch.jit.trace(module, example, check_trace=False)


def frozen(module, example):
    return torch.jit.freeze(torch.jit.script(module))


def matrices(path):
    """Return the shapes of the floating-point matrices of 32 bits or of bfloat16 in a file, constants included."""
    module = torch.jit.load(path)
    held = [*module.parameters(), *module.buffers(), *constants(module.graph)]
    return sorted(tuple(t.shape) for t in held if t.dim() == 2 and t.dtype in (torch.float32, torch.bfloat16))


def constants(block):
    for node in block.nodes():
        if node.kind() == "prim::Constant" and node.hasAttribute("value") and node.kindOf("value") == "t":
            yield node.t("value")
        for nested in node.blocks():
            yield from constants(nested)


# Language models


class Block(nn.Module):
    """A block of a language model in which no linear looks like another."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.looking = nn.Linear(width, 3 * width)
        self.mixing = nn.Parameter(torch.randn(width, width) * 0.05)
        self.shift = nn.Parameter(torch.zeros(width))
        self.wide = nn.Parameter(torch.randn(width, 2 * width) * 0.05)
        self.wide_bias = nn.Parameter(torch.zeros(2 * width))
        self.narrow = nn.Parameter(torch.randn(width, 2 * width) * 0.05)

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.looking(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + (seen.transpose(1, 2).flatten(2) @ self.mixing.t() + self.shift)
        flat = self.norm(x).view(-1, width)
        hidden = functional.gelu(torch.addmm(self.wide_bias, flat, self.wide))
        return x + functional.linear(hidden, self.narrow).view(batch, length, width)


class LanguageModel(nn.Module):
    def __init__(self, vocabulary=4096, width=64, layers=2):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(64, width)
        self.blocks = nn.ModuleList([Block(width, 4) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(ids.size(1)))
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.tokens.weight)


@pytest.fixture(scope="module")
def short_text(tmp_path_factory, root):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((root / "scripts" / "train_demo_model.py").read_text() * 4)
    return path


def perplexity_of(logits, windows):
    """Return exp of the mean over all tokens but the first of each window, summed as the driver does."""
    nll = 0.0
    for y, ids in zip(logits, windows, strict=True):
        picked = torch.log_softmax(y[0, :-1].float(), -1).gather(1, ids[0, 1:, None])
        nll -= picked.sum(dtype=torch.float64).item()
    return math.exp(nll / sum(ids.numel() - 1 for ids in windows))


@pytest.mark.parametrize("make", [scripted, traced, frozen])
def test_a_language_model_of_ones_own(make, gptq, run_alone, demo_model, short_text, tmp_path, shown):
    model = seeded(LanguageModel)
    torch.jit.save(make(model, torch.zeros(1, 32, dtype=torch.long)), tmp_path / "float.pt")
    tokenizer = ["--tokenizer", demo_model]
    scoring = ["--window", "32", "--max-tokens", "320"]
    result = gptq(
        *["quantize", tmp_path / "float.pt", *tokenizer, "-o", tmp_path / "int4.pt", "--calibration", short_text],
        *["--samples", "16", "--sequence-length", "32", "--group-size", "32", "--json", tmp_path / "report.json"],
        *["--eval", short_text, *scoring],
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    shapes = [[192, 64], [64, 64], [128, 64], [64, 128]]
    assert [layer["shape"] for layer in report["layers"]] == [*shapes, *shapes, [4096, 64]]
    assert all(layer["samples"] == 16 * 32 for layer in report["layers"])
    assert report["kl_divergence"]["quantized"] < report["kl_divergence"]["rtn"]

    result = gptq(
        *["eval", tmp_path / "int4.pt", *tokenizer, "--text", short_text, *scoring, "--json", tmp_path / "eval.json"],
    )
    assert result.returncode == 0, result.stderr
    loaded = json.loads((tmp_path / "eval.json").read_text())["perplexity"]["baseline"]
    assert loaded == report["perplexity"]["quantized"]

    ids = tokenizers.Tokenizer.from_file(str(demo_model / "tokenizer.json")).encode(short_text.read_text()).ids[:320]
    windows = list(torch.tensor(ids).view(10, 1, 32))
    assert perplexity_of(run_alone(tmp_path / "int4.pt", windows), windows) == loaded
    with torch.no_grad():
        assert perplexity_of([model(x) for x in windows], windows) == pytest.approx(
            report["perplexity"]["baseline"], rel=1e-4
        )
    assert matrices(tmp_path / "int4.pt") == [(64, 64), (4096, 64)]  # the embeddings
    for reader in ("gptq", "torch"):
        shown("TorchScript .pt", "gptq quantize", f"a model of one's own, {make.__name__}", reader, "same bits")


# Other models: --calibration and --eval take tensors


@pytest.fixture
def quantize(gptq, tmp_path):
    """Return a function that quantizes a module on random inputs of a shape; gives the report."""

    def run(module, shape, *options, dtype=torch.float32):
        torch.jit.save(module, tmp_path / "float.pt")
        inputs = {f"batch_{i}": random(*shape, seed=i).to(dtype) for i in range(11)}
        save_file({name: inputs[name] for name in list(inputs)[:8]}, tmp_path / "calibration.safetensors")
        save_file({name: inputs[name] for name in list(inputs)[8:]}, tmp_path / "heldout.safetensors")
        result = gptq(
            *["quantize", tmp_path / "float.pt", "-o", tmp_path / "int4.pt", "--group-size", "16"],
            *["--calibration", tmp_path / "calibration.safetensors", "--eval", tmp_path / "heldout.safetensors"],
            *["--json", tmp_path / "report.json", *options],
        )
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / "report.json").read_text())

    return run


def error_of(outputs, expected):
    squares = sum(float((y.double() - z.double()).square().sum()) for y, z in zip(outputs, expected, strict=True))
    return math.sqrt(squares / sum(float(z.double().square().sum()) for z in expected))


def check(report, model, shape, path, dtype=torch.float32):
    """Compare the saved module's outputs with what the report says of them."""
    heldout = [random(*shape, seed=i).to(dtype) for i in range(8, 11)]
    saved = torch.jit.load(path)
    with torch.no_grad():
        outputs, expected = [saved(x) for x in heldout], [model(x) for x in heldout]
    assert outputs[0].dtype == expected[0].dtype == dtype
    # The float model is traced: its products may be blocked otherwise, and in 16 bits a rounding is not small.
    allowed = 1e-3 if dtype == torch.float32 else 0.05
    assert error_of(outputs, expected) == pytest.approx(report["output_error"]["quantized"], rel=allowed)
    assert 0.001 < report["output_error"]["quantized"] < report["output_error"]["rtn"] < 0.15
    for layer in report["layers"]:
        assert layer["samples"] > 0, layer
        assert layer["relative_error"] < layer["rtn_relative_error"], layer


class Mlp(nn.Module):
    """Linears that are called once, called twice, and called inside a loop and a branch."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 48)
        self.twice = nn.Linear(48, 48)
        self.looped = nn.Linear(48, 48)
        self.last = nn.Linear(48, 16, bias=False)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = self.twice(torch.tanh(self.twice(x))) + x
        for i in range(4):
            if i % 2 == 0:
                x = x + torch.relu(self.looped(x))
        return self.last(x)


@pytest.mark.parametrize("make", [scripted, traced, frozen])
def test_an_mlp(make, quantize, tmp_path):
    model, shape = seeded(Mlp), (100, 24)
    report = quantize(make(model, random(*shape)), shape)
    check(report, model, shape, tmp_path / "int4.pt")
    samples = sorted(layer["samples"] for layer in report["layers"])
    assert samples == [800, 800, 1600, 1600]  # both calls of a linear are gathered
    assert matrices(tmp_path / "int4.pt") == []


class Shared(nn.Module):
    """Two linears with one weight, and a weight that is used both ways round."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(32, 32)
        self.other = nn.Linear(32, 32)
        self.other.weight = self.one.weight
        self.tied = nn.Parameter(torch.randn(32, 32) * 0.2)

    def forward(self, x):
        x = self.other(torch.relu(self.one(x))) + x
        return torch.relu(functional.linear(x, self.tied)) @ self.tied


@pytest.mark.parametrize("make", [scripted, traced, frozen])
def test_shared_weights(make, quantize, tmp_path):
    model, shape = seeded(Shared), (100, 32)
    report = quantize(make(model, random(*shape)), shape)
    check(report, model, shape, tmp_path / "int4.pt")
    assert [layer["samples"] for layer in report["layers"]] == [1600, 800, 800]
    assert matrices(tmp_path / "int4.pt") == []


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def vision_transformer(**options):
    """Return a vision transformer of torch's own modules: patches by a convolution, an encoder, a classifier."""
    settings = {"batch_first": True, "dropout": 0.0, **options}
    layer = nn.TransformerEncoderLayer(32, 4, 64, **settings)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=4), nn.Flatten(2), Transpose(), encoder, nn.LayerNorm(32), nn.Linear(32, 10)
    )


# Traced without gradients each encoder layer is one fused operator; traced with them its linears are seen.
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}])
def test_a_traced_vision_transformer(gradients, options, quantize, tmp_path):
    model, shape = seeded(lambda: vision_transformer(**options)), (8, 3, 16, 16)
    with torch.set_grad_enabled(gradients):
        module = torch.jit.trace(model, random(*shape), check_trace=False)
    assert ("_transformer_encoder_layer_fwd" in str(module.inlined_graph)) is not gradients
    report = quantize(module, shape)
    check(report, model, shape, tmp_path / "int4.pt")
    layer = [[96, 32], [32, 32], [64, 32], [32, 64]]
    assert [layer["shape"] for layer in report["layers"]] == [*layer, *layer, [10, 32]]
    assert matrices(tmp_path / "int4.pt") == []


# The script tests at run time whether to take the fused operator, and reads every weight for that: the float weights
# stay in the file.
@pytest.mark.parametrize("make", [scripted, frozen])
def test_a_scripted_vision_transformer(make, quantize, tmp_path):
    model, shape = seeded(vision_transformer), (8, 3, 16, 16)
    report = quantize(make(model, random(*shape)), shape)
    check(report, model, shape, tmp_path / "int4.pt")
    assert len(report["layers"]) == 9


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("make", [scripted, traced])
def test_torchs_own_attention(make, quantize, tmp_path):
    model, shape = seeded(Attention), (8, 20, 32)
    module = make(model, random(*shape))
    assert "_native_multi_head_attention" in str(module.inlined_graph)
    report = quantize(module, shape)
    check(report, model, shape, tmp_path / "int4.pt")
    assert sorted(layer["shape"] for layer in report["layers"]) == [[32, 32], [96, 32]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype, quantize, tmp_path):
    model, shape = seeded(Mlp).to(dtype), (100, 24)
    report = quantize(traced(model, random(*shape).to(dtype)), shape, dtype=dtype)
    check(report, model, shape, tmp_path / "int4.pt", dtype)
    assert matrices(tmp_path / "int4.pt") == []


def test_the_file_has_only_what_is_read(quantize, tmp_path):
    class Bystander(nn.Module):
        """A weight that no output needs."""

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(256, 512)
            self.unused = nn.Linear(256, 256)

        def forward(self, x):
            return self.fc(x)

    report = quantize(scripted(seeded(Bystander), None), (300, 256))
    held = dict(torch.jit.load(tmp_path / "int4.pt").named_buffers()) | dict(
        torch.jit.load(tmp_path / "int4.pt").named_parameters()
    )
    assert {name.partition(".")[2] for name in held} == {"packed", "scales", "corrected_bias"}
    assert (tmp_path / "int4.pt").stat().st_size < report["bytes"]["linears_after"] + 4 * 512 + 4096
    assert (tmp_path / "float.pt").stat().st_size > 4 * 256 * (512 + 256)


def test_what_cannot_be_is_refused(gptq, tmp_path):
    torch.jit.save(scripted(seeded(Mlp), None), tmp_path / "float.pt")
    save_file({"x": random(4, 25)}, tmp_path / "wide.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08")
    save_file({"x": torch.full((40, 24), float("nan"))}, tmp_path / "nan.safetensors")
    for name, message in [
        ("wide", "first: .*24., got .4, 25."),
        ("empty", "must hold at least one tensor"),
        ("broken", "broken.safetensors: offset 0"),
        ("missing", "missing.safetensors"),
        ("nan", "first: "),
    ]:
        calibration = tmp_path / f"{name}.safetensors"
        refused(gptq("quantize", tmp_path / "float.pt", "-o", tmp_path / "out.pt", "--calibration", calibration),
                saying=message)  # fmt: skip
        assert not (tmp_path / "out.pt").exists()
