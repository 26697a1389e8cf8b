"""gptq::quantize_weight and torch.classes.gptq.GPTQLayer from Python and TorchScript."""

import copy
import io
import os
import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
torch.ops.load_library(os.environ.get("GPTQ_LIBRARY", str(ROOT / "build" / "lib" / "libgptq.so")))
GPTQLayer = torch.classes.gptq.GPTQLayer


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(k=128, n=256):
    layer = torch.nn.Linear(k, n)
    with torch.no_grad():
        layer.weight.copy_(random(n, k, seed=1) * 0.05)
        layer.bias.copy_(random(n, seed=2))
    return layer


def dequantize(codes, scales, zeros, group_size):
    group = torch.arange(codes.shape[1]) // group_size
    return (codes.float() - zeros.t()[:, group]) * scales.t()[:, group].float()


def test_hook_flow_on_a_linear():
    layer = linear()
    gathered = GPTQLayer(layer.weight, layer.bias)
    hook = layer.register_forward_hook(lambda module, args, output: gathered.add_batch(args[0]))
    for batch in range(10):
        layer(random(1, 128, seed=batch))
    layer(random(2, 16, 128, seed=11))
    hook.remove()
    assert gathered.nsamples() == 42
    assert gathered.hessian().shape == (128, 128)

    before = layer.weight.detach().clone()
    codes, scales, zeros, report, _, _ = gathered.quantize(bits=4, group_size=32)
    assert torch.equal(layer.weight, before)
    assert codes.dtype == torch.uint8 and codes.shape == (256, 128) and codes.max() <= 15
    assert scales.dtype == torch.float16 and scales.shape == (4, 256)
    assert zeros.dtype == torch.uint8 and zeros.shape == (4, 256)
    assert report["loss"] < report["rtn_loss"]

    assert torch.equal(gathered.quantize(bits=4)[0], gathered.quantize(bits=4, group_size=128)[0])
    again = gathered.quantize(bits=4, group_size=32, write_back=True)
    assert torch.equal(again[0], codes)
    assert torch.equal(layer.weight, dequantize(codes, scales, zeros, 32))
    assert layer.weight.requires_grad


def test_per_tensor_leaves_at_most_sixteen_values():
    layer = linear()
    gathered = GPTQLayer(layer.weight)
    gathered.add_batch(random(64, 128))
    gathered.quantize(bits=4, per_tensor=True, write_back=True)
    assert len(layer.weight.unique()) <= 16


def test_operator_equals_the_layer():
    layer = linear()
    gathered = GPTQLayer(layer.weight)
    gathered.add_batch(random(200, 128))
    expected = gathered.quantize(3, 64, False)
    result = torch.ops.gptq.quantize_weight(layer.weight, gathered.hessian(), 3, 64, False)
    for a, b in zip(result[:3], expected[:3], strict=True):
        assert torch.equal(a, b)
    assert result[3] == expected[3]
    assert set(result[3]) == {
        "loss", "rtn_loss", "relative_error", "rtn_relative_error", "sweep_loss", "guarded_rows",
        "refined", "damping", "damping_escalations", "float64", "dead_columns", "too_few_samples",
    }  # fmt: skip


def test_round_to_nearest_needs_no_hessian():
    weight = random(5, 12)
    codes, scales, zeros, *_ = torch.ops.gptq.quantize_weight(weight, None, mode="rtn")
    step = scales.t().float()
    # Half a step inside the grid; its upper end is 7 steps where the largest weight may be 7.5 of them, and float16
    # moved the step by at most 2^-11 of it.
    error = (dequantize(codes, scales, zeros, 12) - weight).abs()
    assert (error <= step * (0.5 + 7.5 * 2**-11)).all()


def test_bias_takes_the_mean_error():
    layer = linear()
    x = random(300, 128) + 0.5
    expected = layer(x).detach()
    gathered = GPTQLayer(layer.weight, layer.bias)
    gathered.add_batch(x)
    shift = gathered.quantize(correct_bias=True, write_back=True)[4]
    assert shift.shape == (256,)
    assert (layer(x) - expected).mean(0).abs().max() < 1e-5


def test_float_inputs_without_drift_give_their_mean_alone():
    layer, x = linear(), random(300, 128)
    float_inputs = x + 0.1 * random(300, 128, seed=1)
    results = {}
    for drift, target_alpha in ((True, 0.0), (False, 0.0), (False, 1.0), (True, 1.0)):
        gathered = GPTQLayer(layer.weight, layer.bias, drift=drift)
        gathered.add_batch(x, float_inputs)
        results[drift, target_alpha] = gathered.quantize(correct_bias=True, target_alpha=target_alpha)
    for key in ((False, 0.0), (False, 1.0)):
        assert torch.equal(results[key][0], results[True, 0.0][0])
        assert torch.equal(results[key][4], results[True, 0.0][4])
    assert not torch.equal(results[True, 1.0][0], results[True, 0.0][0])


def test_search_damping_needs_halves():
    gathered = GPTQLayer(linear().weight, halves=False)
    gathered.add_batch(random(300, 128))
    with pytest.raises(RuntimeError, match="half_hessian is required to search the damping"):
        gathered.quantize(search_damping=True)


def test_dynamic_order_runs_with_input_order():
    weight, x = random(24, 64), random(200, 64, seed=3)
    gathered = GPTQLayer(weight)
    gathered.add_batch(x)
    codes, scales, zeros, _, _, order = gathered.quantize(group_size=16, act_order="dynamic", write_back=True)
    assert sorted(order.tolist()) == list(range(64))
    packed = torch.ops.gptq.pack_w4(codes)
    y = torch.ops.gptq.linear_w4(x, packed, scales, zeros, None, order, 16)
    torch.testing.assert_close(y, x @ weight.t())


def test_padding_is_not_counted():
    x, mask = random(4, 10, 32), torch.arange(10).expand(4, 10) < torch.tensor([10, 3, 7, 1]).unsqueeze(1)
    padded, kept = GPTQLayer(random(8, 32)), GPTQLayer(random(8, 32))
    padded.add_batch(x, None, mask)
    kept.add_batch(x[mask])
    assert padded.nsamples() == 21
    assert torch.equal(padded.hessian(), kept.hessian())


def test_conv1d_square():
    weight = random(48, 48)
    transposed = weight.t().contiguous()
    a, b = GPTQLayer(weight), GPTQLayer(transposed, None, True)
    for gathered in (a, b):
        gathered.add_batch(random(100, 48, seed=5))
    assert torch.equal(a.quantize()[0], b.quantize(write_back=True)[0])
    a.quantize(write_back=True)
    assert torch.equal(transposed, weight.t())


def test_script():
    @torch.jit.script
    def quantize(weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, float, int]:
        layer = torch.classes.gptq.GPTQLayer(weight)
        layer.add_batch(x)
        codes, scales, zeros, report, _, _ = layer.quantize(bits=4, group_size=16)
        result = torch.ops.gptq.quantize_weight(weight, layer.hessian(), 4, 16)
        assert bool((codes == result[0]).all())
        return codes, report["loss"], layer.nsamples()

    weight, x = random(8, 40), random(3, 20, 40, seed=1)
    codes, loss, samples = quantize(weight, x)
    layer = GPTQLayer(weight)
    layer.add_batch(x)
    expected = layer.quantize(4, 16)
    assert torch.equal(codes, expected[0])
    assert loss == expected[3]["loss"]
    assert samples == 60


class Holder(torch.nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.layer = torch.classes.gptq.GPTQLayer(weight, bias)

    def forward(self, x: torch.Tensor):
        self.layer.add_batch(x)
        return self.layer.nsamples()


@pytest.mark.parametrize("with_bias", [True, False])
def test_saved_with_a_scripted_module(with_bias):
    layer = linear(24, 10)
    module = torch.jit.script(Holder(layer.weight.detach(), layer.bias.detach() if with_bias else None))
    module(random(30, 24))
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert loaded.layer.nsamples() == 30
    assert torch.equal(loaded.layer.hessian(), module.layer.hessian())
    assert torch.equal(loaded.layer.quantize()[0], module.layer.quantize()[0])
    assert loaded(random(5, 24)) == 35


def test_deep_copy():
    gathered = GPTQLayer(linear(24, 10).weight.detach())
    gathered.add_batch(random(30, 24))
    copied = copy.deepcopy(gathered)
    copied.add_batch(random(3, 24))
    assert (gathered.nsamples(), copied.nsamples()) == (30, 33)


def test_a_copy_gathers_as_its_source_does():
    layer, x = linear(24, 10), random(30, 24)
    gathered = GPTQLayer(layer.weight.detach(), layer.bias.detach(), halves=False, drift=False)
    copied = copy.deepcopy(gathered)  # before it has seen anything
    for each in (gathered, copied):
        each.add_batch(x, x + 0.1 * random(30, 24, seed=1))
    assert torch.equal(copied.quantize()[0], gathered.quantize()[0])
    assert torch.equal(copied.quantize()[0], gathered.quantize(target_alpha=0.0)[0])
    with pytest.raises(RuntimeError, match="half_hessian is required to search the damping"):
        copied.quantize(search_damping=True)


def test_inference_mode():
    layer = linear(40, 12)
    outside = GPTQLayer(layer.weight)
    outside.add_batch(random(50, 40))
    expected = outside.quantize()[0]
    with torch.inference_mode():
        gathered = GPTQLayer(layer.weight)
        gathered.add_batch(random(50, 40))
        codes = gathered.quantize(write_back=True)[0]
    assert torch.equal(codes, expected)
    assert len(layer.weight[0].unique()) <= 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.quantize(bits=9), "bits must be in 2..8, got 9"),
        (lambda g: g.quantize(group_size=0), "group_size must be at least 1, or -1"),
        (lambda g: g.quantize(mode="best"), 'got "best"'),
        (lambda g: g.quantize(damping=float("nan")), "damping must be finite"),
        (lambda g: g.add_batch(torch.full((2, 24), float("nan"))), "got 48 NaN or Inf values of 48"),
        (lambda g: g.add_batch(torch.ones(2, 25)), r"got \[2, 25\]"),
    ],
)
def test_errors(call, message):
    gathered = GPTQLayer(linear(24, 10).weight.detach())
    gathered.add_batch(random(30, 24))
    with pytest.raises(RuntimeError, match=message):
        call(gathered)
    assert gathered.nsamples() == 30
