"""gptq.quantize on PyTorch and transformers models."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

gptq = pytest.importorskip("gptq")
transformers = pytest.importorskip("transformers")

VOCABULARY = 120


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def token_ids(*shape, seed=0):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def seeded(make):
    """Return make() with weights that do not depend on what ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def gpt2(**options):
    config = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    settings = transformers.GPT2Config(vocab_size=VOCABULARY, initializer_range=0.2, **{**config, **options})
    return seeded(lambda: transformers.GPT2LMHeadModel(settings))


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2}
    settings = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_attention_heads=4, bos_token_id=0, eos_token_id=0, initializer_range=0.2, **sizes
    )
    return seeded(lambda: transformers.LlamaForCausalLM(settings))


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 8)))


class Vision(nn.Module):
    """A small vision transformer over 16 patches."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 48, batch_first=True), 2)
        self.head = nn.Linear(32, 5)

    def forward(self, image):
        return self.head(self.encoder(self.patches(image).flatten(2).transpose(1, 2)).mean(1))


def encoder():
    return seeded(Vision)


def convnet():
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 24, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 6),
        )
    )


MODELS = {
    "gpt2": (gpt2, [token_ids(2, 40, seed=s) for s in range(4)]),
    "llama": (llama, [token_ids(2, 40, seed=s) for s in range(4)]),
    "mlp": (mlp, [random(100, 32, seed=s) for s in range(3)]),
    "encoder": (encoder, [random(8, 3, 16, 16, seed=s) for s in range(4)]),
    "convnet": (convnet, [random(4, 3, 12, 12, seed=s) for s in range(3)]),
}
QUIET = {"group_size": 16, "progress": False}


def logits(model, x):
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def codes_of(model):
    return {name: m.codes() for name, m in model.named_modules() if isinstance(m, gptq.QuantizedLinear)}


def same_codes(one, other):
    a, b = codes_of(one), codes_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def test_one_layer_gives_the_codes_of_quantize_weight():
    model = nn.Sequential(seeded(lambda: nn.Linear(24, 10, bias=False)))
    weight = model[0].weight.detach().clone()
    # Small integers and a power of two of them: their Hessian is exact in float32 in whatever order it is summed.
    x = random(256, 24).mul(2).round()
    hessian = 2 / 256 * x.T @ x
    report = gptq.quantize(model, [x[:100], x[100:]], **QUIET)
    expected = gptq.quantize_weight(weight, hessian, group_size=16)
    assert torch.equal(model[0].codes(), expected.codes)
    assert torch.equal(model[0].scales, expected.scales)
    (layer,) = report.layers
    assert (layer.name, layer.shape, layer.nsamples, layer.input_error) == ("0", (10, 24), 256, 0.0)
    assert layer.loss == pytest.approx(expected.report["loss"], rel=1e-6)


def test_second_layer_aims_at_the_float_model():
    model = mlp()
    first, second = copy.deepcopy(model[0]), copy.deepcopy(model[2])
    x = random(200, 32)
    gptq.quantize(model, [x], **QUIET)
    gathered = gptq.GPTQLayer(second.weight, second.bias)
    with torch.no_grad():
        gathered.add_batch(nn.functional.gelu(model[0](x)), nn.functional.gelu(first(x)))
    expected = gathered.quantize(group_size=16, correct_bias=True)
    assert torch.equal(model[2].codes(), expected.codes)
    assert torch.equal(model[2].bias, second.bias + expected.bias_shift)


def test_block_by_block_is_the_same_as_the_whole_model(kind):
    make, calibration = MODELS[kind]
    by_block, whole, calls = make(), make(), {True: 0, False: 0}
    for model, blockwise in ((by_block, True), (whole, False)):

        def count(*_, blockwise=blockwise):
            calls[blockwise] += 1

        handle = model.register_forward_pre_hook(count)
        report = gptq.quantize(model, calibration, blockwise=blockwise, **QUIET)
        handle.remove()
    assert same_codes(by_block, whole)
    assert len(report.layers) == len(codes_of(whole))
    x = calibration[0]
    assert torch.equal(logits(by_block, x), logits(whole, x))
    # The whole model runs for the trace, and for each stage outside of blocks twice, but once for the very first stage.
    outside = {"gpt2": 1, "llama": 1, "mlp": 0, "encoder": 2, "convnet": 0}[kind]
    enters = kind == "encoder"  # the quantized model runs once to the encoder, since a layer before it is quantized
    first_is_outside = kind == "encoder"
    runs = 1 + 2 * outside - first_is_outside + enters
    assert calls[True] == runs * len(calibration)
    assert calls[False] > calls[True]


def test_better_than_rounding_to_nearest(kind):
    make, calibration = MODELS[kind]
    model, rounded = make(), make()
    expected = logits(model, calibration[0])
    gptq.quantize(model, calibration, **QUIET)
    gptq.quantize(rounded, mode="rtn", **QUIET)
    error = (logits(model, calibration[0]) - expected).square().mean()
    rtn_error = (logits(rounded, calibration[0]) - expected).square().mean()
    assert 0 < error < 0.5 * rtn_error


def test_report(kind):
    make, calibration = MODELS[kind]
    model = make()
    names = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    names |= {name for name, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    report = gptq.quantize(model, calibration, **QUIET)
    assert {layer.name for layer in report.layers} | set(report.skipped) == names
    for layer in report.layers:
        assert 0 < layer.loss < layer.rtn_loss
        assert 0 < layer.relative_error < layer.rtn_relative_error < 0.2
        assert layer.input_error < 0.3 and layer.seconds > 0 and layer.bytes_after < layer.bytes_before
        assert (layer.bits, layer.group_size) == ((8, -1) if layer.name == "lm_head" else (4, 16))
    assert report.layers[0].input_error == 0 < report.layers[-1].input_error
    assert report.bytes_after < report.bytes_before
    assert report.bytes_before - report.bytes_after < sum(layer.bytes_before for layer in report.layers)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["name"] == report.layers[0].name
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["layer", "shape", "bits"]
    assert [line.split()[0] for line in lines[1 : 1 + len(report.layers)]] == [x.name for x in report.layers]
    for name, reason in report.skipped.items():
        assert f"{name} stays as it was: {reason}" in lines


def test_whole_models_copy_save_and_load(kind, tmp_path):
    make, calibration = MODELS[kind]
    model, other = make(), make()
    gptq.quantize(model, calibration, **QUIET)
    gptq.quantize(other, mode="rtn", **QUIET)
    x = calibration[1]
    expected = logits(model, x)
    assert torch.equal(logits(copy.deepcopy(model), x), expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False), x), expected)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert not torch.equal(logits(other, x), expected)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(logits(other, x), expected)


@pytest.mark.parametrize("kind", ["mlp", "encoder", "convnet"])
def test_quantized_models_export(kind):
    make, calibration = MODELS[kind]
    model = make()
    gptq.quantize(model, mode="rtn", **QUIET)
    x = calibration[0]
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(logits(program.module(), x), logits(model, x))


def test_quantized_llama_compiles_without_graph_breaks():
    model = llama()
    gptq.quantize(model, mode="rtn", **QUIET)
    ids = token_ids(1, 9)
    with torch.no_grad():  # or there would be a backward to compile
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_gpt2_as_the_driver(driver_path, root, tmp_path):
    demo = root / "tests" / "data" / "demo_gpt2"
    model = transformers.GPT2LMHeadModel.from_pretrained(demo, dtype=torch.float32).eval()
    model.transformer.h = model.transformer.h[:1]
    model.config.n_layer = 1
    model.save_pretrained(tmp_path / "float")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (tmp_path / "float" / name).write_bytes((demo / name).read_bytes())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(demo / "tokenizer.json"))
    text = "".join(path.read_text() for path in sorted((root / "scripts").glob("*.py")))
    text = tokenizer.decode(tokenizer(text)["input_ids"][:480], clean_up_tokenization_spaces=False)
    assert len(tokenizer(text)["input_ids"]) == 480
    (tmp_path / "text.txt").write_text(text)
    # The driver gathers the Hessian in two halves, as GPTQLayer always does, only for search_damping.
    options = {"group_size": 64, "search_damping": True, "progress": False}
    report = gptq.quantize(model, [text], tokenizer=tokenizer, **options)
    # One window that is as long as the text: both see the same tokens.
    subprocess.run(
        [driver_path, "quantize", tmp_path / "float", "-o", tmp_path / "packed", "--group-size", "64"]
        + ["--search-damping", "--calibration", tmp_path / "text.txt", "--samples", "1", "--sequence-length", "480"]
        + ["--json", tmp_path / "report.json"],
        check=True,
        capture_output=True,
    )
    expected = json.loads((tmp_path / "report.json").read_text())["layers"]
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    assert [layer.name for layer in report.layers] == [layer["name"] for layer in expected]
    for ours, theirs in zip(report.layers, expected, strict=True):
        assert (ours.bits, ours.group_size) == (theirs["bits"], theirs["group_size"])
        assert ours.loss == pytest.approx(theirs["loss"], rel=1e-2)
        assert ours.rtn_loss == pytest.approx(theirs["rtn_loss"], rel=1e-2)
        assert ours.input_error == pytest.approx(theirs["input_error"], rel=1e-2)
        layer = model.get_submodule(ours.name)
        n, columns = layer.out_features, layer.packed.shape[1] * 8
        packed = gptq.unpack_w4(tensors[f"{ours.name}.packed"], n, columns)
        # Attention and gelu round otherwise in the driver than in transformers, which tips codes over, the more the
        # later; unrelated codes would agree in about one of eight.
        agreeing = (packed == gptq.unpack_w4(layer.packed, n, columns)).float().mean()
        assert agreeing == 1 if ours is report.layers[0] else agreeing > 0.5


def test_layers_that_read_the_same_tensor_come_out_as_alone():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(24, 8), nn.Linear(24, 12, bias=False)

        def forward(self, x):
            return self.a(x), self.b(x)

    model, x = seeded(Fork), random(100, 24)
    alone = {name: nn.Sequential(copy.deepcopy(getattr(model, name))) for name in "ab"}
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    gptq.quantize(model, [x], **QUIET)
    assert len(runs) == 2  # the trace, and one stage for both
    for name, single in alone.items():
        gptq.quantize(single, [x], **QUIET)
        assert torch.equal(getattr(model, name).codes(), single[0].codes())
    assert torch.equal(model.a.bias, alone["a"][0].bias)
    assert model.b.bias is None


def agreement(one, other):
    """Return which share of its codes each layer of two models has in common, in the order of the model."""
    a, b = codes_of(one), codes_of(other)
    return torch.tensor([float((a[name] == b[name]).float().mean()) for name in a])


def test_padding_is_not_counted():
    lengths = (40, 17, 25)
    ids = token_ids(3, 40)
    mask = torch.arange(40) < torch.tensor(lengths).unsqueeze(1)
    padded, kept, ignored = gpt2(), gpt2(), gpt2()
    # Both off, since with so few samples they turn roundings of 1e-7 into other codes.
    options = {"target_alpha": 0.0, "correct_bias": False, **QUIET}
    report = gptq.quantize(padded, [{"input_ids": ids, "attention_mask": mask.long()}], **options)
    alone = gptq.quantize(kept, [ids[i : i + 1, :length] for i, length in enumerate(lengths)], **options)
    # Padding on the right leaves the tokens' own activations as they are, but for the rounding of longer sums.
    for masked, unpadded in zip(report.layers, alone.layers, strict=True):
        assert masked.nsamples == unpadded.nsamples == sum(lengths)
    counted = gptq.quantize(ignored, [ids], **options)
    assert counted.layers[0].nsamples == 120
    # The same inputs, summed in another order, may tip over a code or two, and these all the codes of later layers.
    same, other = agreement(padded, kept), agreement(ignored, kept)
    assert same[0] > 0.99 > 0.9 > other[0]
    assert same.mean() > other.mean() + 0.05


def test_token_weights_beside_the_arguments():
    ids = token_ids(2, 30)
    weighted, masked = gpt2(), gpt2()
    mask = (torch.arange(30) < 20).expand(2, 30)
    report = gptq.quantize(weighted, [{"input_ids": ids, "token_weights": mask.float()}], **QUIET)
    assert {layer.nsamples for layer in report.layers} == {40}
    gptq.quantize(masked, [{"input_ids": ids[:, :20]}], **QUIET)
    assert agreement(weighted, masked)[0] > 0.99  # the halves of the sums differ, which may tip over a code


@pytest.mark.parametrize("form", ["tensors", "one tensor", "tuples", "dicts", "loader", "generator"])
def test_kinds_of_calibration(form):
    x = random(60, 32)
    batches = list(x.split(20))
    calibration = {
        "tensors": batches,
        "one tensor": x,
        "tuples": [(batch,) for batch in batches],
        "dicts": [{"input": batch} for batch in batches],
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=20),
        "generator": (batch for batch in batches),
    }[form]
    model = mlp()
    report = gptq.quantize(model, calibration, **QUIET)
    assert [layer.nsamples for layer in report.layers] == [60, 60, 60]
    plain = mlp()
    gptq.quantize(plain, [x], **QUIET)
    assert agreement(model, plain)[0] > 0.99  # the same vectors, summed in other batches


def test_text_needs_a_tokenizer():
    def tokenizer(text, return_tensors):
        assert return_tensors == "pt"
        return {"input_ids": torch.tensor([[ord(c) % VOCABULARY for c in text]])}

    report = gptq.quantize(gpt2(), ["some text", "more"], tokenizer=tokenizer, **QUIET)
    assert report.layers[0].nsamples == 13
    with pytest.raises(ValueError, match="needs a tokenizer"):
        gptq.quantize(gpt2(), ["some text"], **QUIET)


@pytest.mark.parametrize("calibration", [None, [], iter(())])
def test_no_calibration(calibration):
    with pytest.raises(ValueError, match='at least one sample in mode "default", got none'):
        gptq.quantize(mlp(), calibration, **QUIET)


def test_rtn_without_calibration_is_rounding():
    model = gpt2()
    weight = model.transformer.h[1].mlp.c_fc.weight.detach().clone()
    report = gptq.quantize(model, mode="rtn", symmetric=False, **QUIET)
    expected = gptq.quantize_weight(weight.T, None, mode="rtn", symmetric=False, group_size=16)
    layer = model.transformer.h[1].mlp.c_fc
    assert torch.equal(layer.codes(), expected.codes) and torch.equal(layer.zeros, expected.zeros)
    assert len(report.layers) == 13 and report.layers[0].nsamples == 0


def test_which_layers_and_how():
    model = gpt2()
    report = gptq.quantize(
        model,
        MODELS["gpt2"][1],
        skip=[r"^transformer\.h\.0\."],
        overrides={
            r"c_fc$": {"bits": 3, "group_size": 8},
            r"h\.2\.attn": {"skip": True},
            r"h\.1\.mlp\.c_fc": {"bits": 6},
        },
        lm_head="keep",
        **QUIET,
    )
    grids = {layer.name.removeprefix("transformer.h."): (layer.bits, layer.group_size) for layer in report.layers}
    assert grids == {
        "1.attn.c_attn": (4, 16),
        "1.attn.c_proj": (4, 16),
        "1.mlp.c_fc": (6, 8),
        "1.mlp.c_proj": (4, 16),
        "2.mlp.c_fc": (3, 8),
        "2.mlp.c_proj": (4, 16),
    }
    assert report.skipped["lm_head"] == 'lm_head="keep"'
    assert report.skipped["transformer.h.0.mlp.c_fc"].startswith("skip")
    assert report.skipped["transformer.h.2.attn.c_attn"] == "an override"
    assert isinstance(model.lm_head, nn.Linear) and model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.h[1].mlp.c_fc.bits == 6
    four = gptq.quantize(gpt2(), mode="rtn", lm_head="w4", skip=lambda name: name != "lm_head", **QUIET)
    assert [(layer.name, layer.bits, layer.group_size) for layer in four.layers] == [("lm_head", 4, 16)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lm_head": "w2"}, 'lm_head must be "w8", "w4" or "keep"'),
        ({"bits": 9}, "bits must be in 2..8, got 9"),
        ({"group_size": 0}, "group_size must be -1 or at least 1, got 0"),
        ({"overrides": {"x": {"symmetric": True}}}, "overrides may set bits, group_size and skip, got"),
        ({"overrides": {"x": {"bits": 1}}}, "bits must be in 2..8, got 1"),
        ({"mode": "best"}, 'got "best"'),
        ({"damping": -1.0}, "damping"),
    ],
)
def test_wrong_options(options, message):
    model = mlp()
    modules = list(model.modules())
    with pytest.raises((ValueError, RuntimeError), match=message):
        gptq.quantize(model, [random(50, 32)], **{**QUIET, **options})
    assert list(model.modules()) == modules


def test_what_cannot_be_quantized_says_why():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = seeded(
        lambda: nn.ModuleDict(
            {
                "own": Own(8, 8),
                "wide": nn.Linear(8, 8).double(),
                "norm": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
                "lazy": nn.LazyLinear(8),
                "unused": nn.Linear(8, 8),
                "used": nn.Linear(8, 8),
            }
        )
    )
    model.forward = lambda x: model["used"](x)
    report = gptq.quantize(model, [random(40, 8)], **QUIET)
    assert [layer.name for layer in report.layers] == ["used"]
    assert report.skipped == {
        "own": "Own has a forward of its own",
        "wide": "its weight is torch.float64",
        "norm": "its weight is no parameter of its own",
        "lazy": "its weight is no parameter of its own",
        "unused": "no calibration input reaches it",
    }
    with pytest.raises(ValueError, match="model is itself a Linear"):
        gptq.quantize(nn.Linear(8, 8), [random(40, 8)], **QUIET)
    with pytest.raises(TypeError, match="got int"):
        gptq.quantize(mlp(), [3], **QUIET)


def test_encoder_leaves_its_fast_path():
    model = encoder()
    report = gptq.quantize(model, MODELS["encoder"][1], **QUIET)
    assert set(report.skipped) == {f"encoder.layers.{i}.self_attn.out_proj" for i in (0, 1)}
    assert "nn.MultiheadAttention reads its weight" in next(iter(report.skipped.values()))
    x, padding = random(2, 6, 32), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():  # with the fast path this makes a nested tensor
        y = model.encoder(x, src_key_padding_mask=padding)
    assert y.shape == x.shape
    restored = encoder()
    with pytest.raises(RuntimeError, match="NaN"):
        gptq.quantize(restored, [torch.full((2, 3, 16, 16), float("nan"))], **QUIET)
    assert restored.encoder.layers[0].activation_relu_or_gelu == 1 and restored.encoder.use_nested_tensor


def test_shared_modules_and_weights_are_handled_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.again = self.first
            self.tied = nn.Linear(16, 16)
            self.tied.weight = self.first.weight

        def forward(self, x):
            return self.tied(torch.relu(self.again(torch.relu(self.first(x)))))

    model = seeded(Shared)
    expected = logits(model, random(10, 16))
    report = gptq.quantize(model, [random(50, 16, seed=1)], **QUIET)
    (layer,) = report.layers
    assert (layer.name, layer.nsamples) == ("first", 150)
    assert model.first is model.again and model.first is not model.tied
    assert model.first.packed.data_ptr() == model.tied.packed.data_ptr()
    assert not torch.equal(model.first.bias, model.tied.bias)
    # Three layers whose outputs are off by a few percent each.
    error = (logits(model, random(10, 16)) - expected).norm() / expected.norm()
    assert 0 < error < 6 * layer.rtn_relative_error


def snapshot(model):
    return (
        dict(model.named_modules(remove_duplicate=False)),
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


def assert_unchanged(model, before):
    modules, state, training, hooks = snapshot(model)
    assert modules == before[0] and training == before[2] and hooks == before[3]
    assert all(torch.equal(state[name], tensor) for name, tensor in before[1].items())


@pytest.mark.parametrize("cause", ["weight", "input", "interrupt", "model"])
@pytest.mark.parametrize("blockwise", [True, False])
def test_an_error_leaves_the_model_as_it_was(cause, blockwise):
    model = gpt2().train()
    last = model.transformer.h[2].mlp.c_proj
    ids = MODELS["gpt2"][1]
    error, message = RuntimeError, r"^transformer\.h\.2\.mlp\.c_proj: .*finite"
    if cause == "weight":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        with torch.no_grad():
            model.lm_head.weight[3, 4] = float("inf")
        message = "^lm_head: .*finite"
    elif cause == "input":
        # NaN only in the last block, after the others were replaced.
        handle = last.register_forward_pre_hook(lambda m, args: (args[0] * float("nan"),))
    else:
        seen = []
        raised = KeyboardInterrupt if cause == "interrupt" else OverflowError

        def interrupt(*_):
            seen.append(1)
            if len(seen) > 6:
                raise raised("stop")

        handle = last.register_forward_hook(interrupt)
        error, message = raised, "stop"
    before = copy.deepcopy(model.state_dict()), snapshot(model)
    with pytest.raises(error, match=message):
        gptq.quantize(model, ids, blockwise=blockwise, **QUIET)
    modules = snapshot(model)
    assert modules[0] == before[1][0] and modules[2:] == before[1][2:]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][name])
    assert model.config.use_cache is True
    if cause != "weight":
        handle.remove()
        gptq.quantize(model, ids, blockwise=blockwise, **QUIET)  # and it can be quantized after that


def test_not_a_number_in_the_calibration_names_the_layer():
    x = random(50, 32)
    x[7, 3] = float("nan")
    with pytest.raises(RuntimeError, match="^0: add_batch: input must be finite in float32, got 1 NaN"):
        gptq.quantize(mlp(), [x], **QUIET)
    report = gptq.quantize(mlp(), [x], drop_nonfinite=True, **QUIET)
    assert [(layer.nsamples, layer.dropped) for layer in report.layers] == [(49, 1)] * 3


def test_leaves_no_trace_in_the_process_or_the_model():
    model = gpt2().train()
    model.transformer.h[1].eval()
    flags = {name: m.training for name, m in model.named_modules()}
    ids = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in MODELS["gpt2"][1]]
    before = copy.deepcopy(ids)
    state = torch.get_rng_state()
    python_state = __import__("random").getstate()
    assert torch.is_grad_enabled()
    gptq.quantize(model, ids, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    assert __import__("random").getstate() == python_state
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.config.use_cache is True
    for sample, was in zip(ids, before, strict=True):
        assert all(torch.equal(sample[name], was[name]) for name in was)


def test_dropout_is_off_while_calibrating():
    one, other = gpt2().train(), gpt2()
    gptq.quantize(one, MODELS["gpt2"][1], **QUIET)
    gptq.quantize(other, MODELS["gpt2"][1], **QUIET)
    assert same_codes(one, other)


def test_inside_inference_mode():
    model, outside = mlp(), mlp()
    gptq.quantize(outside, [random(60, 32)], **QUIET)
    with torch.inference_mode():
        gptq.quantize(model, [random(60, 32)], **QUIET)
    assert same_codes(model, outside)


def test_hooks_of_the_caller_stay():
    model, seen = mlp(), []
    handle = model[2].register_forward_hook(lambda m, args, output: seen.append(output.shape))
    gptq.quantize(model, mode="rtn", **QUIET)
    logits(model, random(5, 32))
    assert seen == [(5, 40)]
    handle.remove()
    logits(model, random(5, 32))
    assert len(seen) == 1


def test_bfloat16():
    model = llama().bfloat16()
    ids = MODELS["llama"][1]
    expected = logits(model, ids[0])
    report = gptq.quantize(model, ids, **QUIET)
    y = logits(model, ids[0])
    assert y.dtype == torch.bfloat16 and len(report.layers) == 15
    assert 0 < (y - expected).float().norm() / expected.float().norm() < 0.2
    assert model.model.layers[0].self_attn.q_proj.scales.dtype == torch.float16


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    settings = transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    return seeded(lambda: transformers.T5ForConditionalGeneration(settings))


def vit():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    settings = transformers.ViTConfig(image_size=16, patch_size=4, **sizes)
    return seeded(lambda: transformers.ViTForImageClassification(settings))


@pytest.mark.parametrize(
    ("make", "calibration"),
    [
        # Its blocks pass on a position bias beside their output, so that they run as a whole.
        (t5, [{"input_ids": token_ids(2, 20, seed=s), "decoder_input_ids": token_ids(2, 12, seed=s)} for s in (0, 1)]),
        (vit, [{"pixel_values": random(4, 3, 16, 16, seed=s)} for s in (0, 1, 2)]),
    ],
)
def test_models_that_ask_for_the_dtype_of_a_weight(make, calibration):
    model, rounded = make(), make()
    with torch.no_grad():
        expected = model(**calibration[0]).logits
        report = gptq.quantize(model, calibration, **QUIET)
        gptq.quantize(rounded, mode="rtn", **QUIET)
        error, rtn_error = ((m(**calibration[0]).logits - expected).square().mean() for m in (model, rounded))
    assert not report.skipped
    assert 0 < error < 0.7 * rtn_error


def test_tying_leaves_a_quantized_head():
    model = gpt2()
    gptq.quantize(model, MODELS["gpt2"][1], **QUIET)
    names = set(model.state_dict())
    model.tie_weights()
    assert set(model.state_dict()) == names


def test_generates_with_a_cache():
    model = gpt2()
    gptq.quantize(model, MODELS["gpt2"][1], **QUIET)
    ids = token_ids(1, 5)
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert cached.shape[1] > 8
    for step in range(5, cached.shape[1]):
        # Greedy, from the model without a cache.
        assert cached[0, step] == logits(model, cached[:, :step])[0, -1].argmax()


def test_blocks_that_get_more_than_their_predecessors_output_run_as_a_whole():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

        def forward(self, x):
            y = x
            for block in self.blocks:
                y = y + torch.relu(block(y))  # not the block's output as it is
            return y

    one, other = seeded(Skipping), seeded(Skipping)
    gptq.quantize(one, [random(80, 16)], **QUIET)
    gptq.quantize(other, [random(80, 16)], blockwise=False, **QUIET)
    assert same_codes(one, other)


def test_tokens_that_a_router_sends_elsewhere():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)
            self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

        def forward(self, x):
            x = self.inner(x)
            choice = x[:, :3].argmax(1)
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                if (choice == i).any():
                    y[choice == i] = expert(x[choice == i])
            return y

    model = seeded(Routed)
    x = random(400, 16)
    expected = logits(model, x)
    report = gptq.quantize(model, [x[:200], x[200:]], bits=2, **QUIET)
    experts = report.layers[1:]
    assert sum(layer.nsamples for layer in experts) == 400
    assert any("other tokens" in layer.note for layer in experts)
    assert (logits(model, x) - expected).square().mean() < expected.square().mean()


def test_works_without_transformers(root):
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch, gptq\n"
        "model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))\n"
        "print(gptq.quantize(model, [torch.randn(50, 16)], group_size=8))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root / "ops" / "python", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 layers in" in done.stdout
    assert "2/2" in done.stderr  # the progress bar
