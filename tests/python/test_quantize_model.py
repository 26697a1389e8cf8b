"""What gptq.quantize computes on PyTorch and transformers models."""

import copy
import json
import subprocess

import gptq
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import (
    MODELS,
    QUIET,
    agreement,
    codes_of,
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


@pytest.mark.parametrize("target_alpha", [1.0, 0.0])
def test_second_layer_aims_at_the_float_model(target_alpha):
    model = mlp()
    first, second = copy.deepcopy(model[0]), copy.deepcopy(model[2])
    x = random(200, 32)
    gptq.quantize(model, [x], target_alpha=target_alpha, **QUIET)
    gathered = gptq.GPTQLayer(second.weight, second.bias, halves=False)
    with torch.no_grad():
        gathered.add_batch(nn.functional.gelu(model[0](x)), nn.functional.gelu(first(x)))
    expected = gathered.quantize(group_size=16, correct_bias=True, target_alpha=target_alpha)
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
    text = (root / "LICENSE").read_text()
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
        # Attention and gelu round otherwise in the driver than in transformers, which tips codes over, the more the
        # later; then layers aim elsewhere and have other Hessians.
        is_first = ours is report.layers[0]
        assert ours.loss == pytest.approx(theirs["loss"], rel=1e-6 if is_first else 1e-2)
        assert ours.rtn_loss == pytest.approx(theirs["rtn_loss"], rel=1e-6 if is_first else 5e-2)
        assert ours.input_error == pytest.approx(theirs["input_error"], rel=1e-2)
        layer = model.get_submodule(ours.name)
        n, columns = layer.out_features, layer.packed.shape[1] * 8
        unpack = gptq.unpack_w8 if ours.bits > 4 else gptq.unpack_w4
        difference = unpack(tensors[f"{ours.name}.packed"], n, columns).int() - unpack(layer.packed, n, columns).int()
        # Unrelated codes would agree in about one of eight.
        agreeing = (difference == 0).float().mean()
        assert agreeing == 1 if is_first else agreeing > 0.5
    # The driver's tensors have the names and shapes of ours.
    keys = model.load_state_dict(tensors, strict=False)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert torch.equal(tensors[f"{ours.name}.packed"], layer.packed)


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
