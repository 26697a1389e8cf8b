"""How gptq.quantize is used: its arguments, its errors, unusual models, and that it leaves nothing behind."""

import copy
import subprocess
import sys

import gptq
import pytest
import torch
import transformers
from small_models import (
    MODELS,
    QUIET,
    VOCABULARY,
    encoder,
    gpt2,
    llama,
    logits,
    mlp,
    random,
    same_codes,
    seeded,
    token_ids,
)
from torch import nn


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
    modules = dict(model.named_modules(remove_duplicate=False))
    state = copy.deepcopy(model.state_dict())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules.values()]
    with pytest.raises(error, match=message):
        gptq.quantize(model, ids, blockwise=blockwise, **QUIET)
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    assert all(module.training for module in modules.values())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules.values()] == hooks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
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


class Chain(nn.Module):
    """Three blocks one after the other, but for one thing in their way."""

    def __init__(self, trouble):
        super().__init__()
        self.trouble = trouble
        self.blocks = nn.ModuleList([Block(trouble) for _ in range(3)])
        if trouble == "a weight that two blocks share":
            self.blocks[2].linear.weight = self.blocks[0].linear.weight

    def forward(self, x):
        first = None
        for block in self.blocks:
            if self.trouble == "a sum between them":
                x = x + block(x)
            elif self.trouble == "a sum in place between them":
                x = block(x)
                x.add_(0.5 * x.roll(1, 1))
            elif self.trouble == "an earlier output":
                x = block(x, first)
                first = x if first is None else first
            else:
                x = block(x)
        return x


class Block(nn.Module):
    def __init__(self, trouble):
        super().__init__()
        self.trouble = trouble
        self.linear = nn.Linear(16, 16)

    def forward(self, x, other=None):
        if self.trouble == "an input changed in place":
            x.mul_(1.5).add_(0.1)
        return torch.tanh(self.linear(x if other is None else x + other))


@pytest.mark.parametrize(
    "trouble",
    [
        "a sum between them",
        "a sum in place between them",
        "an earlier output",
        "a weight that two blocks share",
        "an input changed in place",
    ],
)
def test_chains_of_blocks_that_are_none(trouble):
    one, other, x = seeded(lambda: Chain(trouble)), seeded(lambda: Chain(trouble)), random(80, 16)
    inputs = []
    other.blocks[0].linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    kept = x.clone()
    gptq.quantize(one, [x], bits=3, **QUIET)
    gptq.quantize(other, [x], bits=3, blockwise=False, **QUIET)
    assert same_codes(one, other)
    assert torch.equal(x, kept)
    assert all(torch.equal(seen, inputs[0]) for seen in inputs)


def test_a_tensor_changed_in_place_is_another_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            y = self.a(x)
            return y + self.b(x.sub_(x.roll(1, 1)))

    model, x = seeded(Twice), random(80, 16)
    alone = nn.Sequential(copy.deepcopy(model.b))
    gptq.quantize(model, [x], **QUIET)
    gptq.quantize(alone, [x - x.roll(1, 1)], **QUIET)
    assert torch.equal(model.b.codes(), alone[0].codes())


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


def test_layers_that_no_token_reaches_any_more_are_rounded():
    class Vanishing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.expert = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            x = self.inner(x)
            return self.expert(x) if isinstance(self.inner, nn.Linear) else x

    model = seeded(Vanishing)
    weight = model.expert.weight.detach().clone()
    report = gptq.quantize(model, [random(50, 16)], **QUIET)
    assert report.layers[1].nsamples == 0 and "rounded to nearest" in report.layers[1].note
    expected = gptq.quantize_weight(weight, None, mode="rtn", group_size=16)
    assert torch.equal(model.expert.codes(), expected.codes)


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
