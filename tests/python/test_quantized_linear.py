"""QuantizedLinear and QuantizedConv2d: what they compute, and that they move, copy, save and compile as modules do."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

gptq = pytest.importorskip("gptq")
QuantizedLinear = gptq.QuantizedLinear

# bits, group size, act_order, symmetric. K = 100 is a multiple neither of 8 nor of 32.
KINDS = [
    (4, 32, "auto", True),
    (4, 32, "dynamic", False),
    (4, 500, "off", True),
    (2, -1, "auto", False),
    (3, 32, "dynamic", True),
    (5, 20, "static", True),
    (8, -1, "auto", True),
    (8, 32, "dynamic", False),
]
N, K = 17, 100


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(bits, group_size, act_order="auto", symmetric=True):
    """Return a layer, what it was made of, and its bias."""
    x = random(300, K, seed=1)
    result = gptq.quantize_weight(
        random(N, K), x.T @ x / 150, bits=bits, group_size=group_size, act_order=act_order, symmetric=symmetric
    )
    bias = random(N, seed=2).half().float()  # survives a cast to float16
    layer = QuantizedLinear.from_codes(
        result.codes, result.scales, result.zeros, bias, result.input_order, bits=bits, group_size=group_size
    )
    return layer, result, bias


def fresh(layer, **options):
    """Return a layer of zeros with the shapes of another."""
    return QuantizedLinear(
        *(layer.in_features, layer.out_features, layer.bits, layer.group_size, layer.bias is not None),
        zeros=layer.zeros is not None,
        input_order=layer.input_order is not None,
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_computes_the_dequantized_weight(kind):
    layer, result, bias = quantized(*kind)
    group_size = layer.group_size if layer.group_size != -1 else K
    group = torch.arange(K) // group_size
    stored = (result.codes.float() - result.zeros.T[:, group]) * result.scales.T[:, group].float()
    expected = stored.clone()
    if result.input_order is not None:
        expected[:, result.input_order.long()] = stored
    # A 9-bit difference times an 11-bit scale is exact in float32.
    assert torch.equal(layer.dequantize(), expected)
    assert torch.equal(layer.codes(), result.codes)

    x = random(2, 3, K, seed=3)
    reference = x.double() @ expected.double().T + bias.double()
    # Activations are split into 24 bits of their group's maximum and the sums rounded in float32: each term is off by
    # at most 2^-22 of the largest |x| times |w|.
    bound = 2.0**-22 * (x.abs().max() * expected.abs().sum(1) + reference.abs())
    assert ((layer(x) - reference).abs() <= bound).all()
    for dtype, digits in ((torch.bfloat16, 8), (torch.float16, 11)):
        rounded = x.to(dtype)
        y = layer(rounded)
        assert y.dtype == dtype
        reference = rounded.double() @ expected.double().T + bias.double()
        # 16-bit inputs are split into 16 bits; the output is rounded to its own digits.
        slack = 2.0**-14 * x.abs().max() * expected.abs().sum(1)
        assert ((y - reference).abs() <= slack + 2.0**-digits * reference.abs()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_into_a_fresh_layer(kind):
    layer, *_ = quantized(*kind)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    loaded = fresh(layer)
    x = random(5, K)
    assert not torch.equal(loaded(x), layer(x))
    loaded.load_state_dict(state)
    assert torch.equal(loaded(x), layer(x))
    assert torch.equal(loaded.dequantize(), layer.dequantize())
    on_meta = fresh(layer, device="meta")
    on_meta.load_state_dict(state, assign=True)
    assert torch.equal(on_meta(x), layer(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_weights_store_no_zeros(bits):
    assert "zeros" not in quantized(bits, 32)[0].state_dict()
    assert "zeros" in quantized(bits, 32, symmetric=False)[0].state_dict()


def test_zeros_that_are_left_out_are_the_middle_code():
    layer, result, bias = quantized(3, 32)
    without = QuantizedLinear.from_codes(result.codes, result.scales, None, bias, bits=3, group_size=32)
    assert torch.equal(without.zeros, result.zeros)  # of 3 bits, not linear_w4's 8


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "save"])
def test_copies(copier):
    layer, *_ = quantized(8, 32, "dynamic")
    layer.eval()
    if copier == "deepcopy":
        twin = copy.deepcopy(layer)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    x = random(5, K)
    assert torch.equal(twin(x), layer(x)) and not twin.training
    twin.packed.zero_()
    assert not torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)])
def test_casts_leave_the_scales(cast):
    layer, *_ = quantized(4, 32)
    scales, packed = layer.scales.clone(), layer.packed.clone()
    outer = cast(nn.Sequential(layer))
    assert layer.bias.dtype not in (torch.float32, None)
    assert layer.scales.dtype == torch.float16 and torch.equal(layer.scales, scales)
    assert torch.equal(layer.packed, packed)
    outer.float()
    assert layer.bias.dtype == torch.float32 and layer.scales.dtype == torch.float16
    assert outer.to("meta")[0].scales.is_meta


@pytest.mark.parametrize(("kind", "bias"), [(KINDS[0], True), (KINDS[-1], True), ((4, 32, "dynamic", True), False)])
def test_compile_export_and_script(kind, bias):
    layer, *_ = quantized(*kind)
    if not bias:
        state = layer.state_dict()
        del state["bias"]
        layer.bias = None
        layer = fresh(layer)
        layer.load_state_dict(state)
    layer.eval()
    x = random(4, 3, K)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert torch.equal(program.module()(x[:2]), expected[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        assert torch.equal(torch.jit.script(layer)(x), expected)
        assert torch.equal(torch.jit.trace(layer, x)(x), expected)


def test_weight_tells_dtype_device_and_shape_alone():
    layer, *_ = quantized(8, 32)
    assert layer.weight.shape == (N, K) and layer.weight.isnan().all()
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    layer.weight = nn.Parameter(torch.zeros(N, K))  # as when transformers ties lm_head to the embedding
    assert layer.weight.isnan().all() and not list(layer.parameters())
    assert set(layer.state_dict()) == {"packed", "scales", "bias"}
    assert layer.to("meta").weight.is_meta


def test_backward_says_that_there_is_none():
    layer, *_ = quantized(4, 32)
    with pytest.raises(RuntimeError, match="derivative for gptq::linear_w4 is not implemented"):
        layer(random(2, K).requires_grad_()).sum().backward()


def test_prints_its_sizes():
    text = repr(quantized(8, 32)[0])
    assert text == "QuantizedLinear(in_features=100, out_features=17, bits=8, group_size=32, bias=True)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, s: QuantizedLinear(8, 8, bits=9), r"bits must be in 2..8, got 9"),
        (lambda c, s: QuantizedLinear(8, 8, group_size=0), "group_size must be -1 or at least 1, got 0"),
        (lambda c, s: QuantizedLinear(0, 8), "at least 1, got 0 and 8"),
        (lambda c, s: QuantizedLinear(8, 8, bits=3, zeros=False), "only with 4 or 8 bits, got bits=3"),
        (lambda c, s: QuantizedLinear.from_codes(c + 8, s, bits=3), r"codes must be below 2\*\*bits = 8, got 8"),
        (lambda c, s: QuantizedLinear.from_codes(c, s, group_size=4), r"scales must be \[2, 6\], got \[1, 6\]"),
        (lambda c, s: QuantizedLinear.from_codes(c, s.float()), "scales must be torch.float16, got torch.float32"),
        (lambda c, s: QuantizedLinear.from_codes(c, s, bias=torch.zeros(5)), r"bias must be \[6\], got \[5\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(6, 8, dtype=torch.uint8), torch.ones(1, 6, dtype=torch.float16))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        {"kernel_size": (4, 3), "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "bias": False},
        {"kernel_size": 1, "stride": 3},
    ],
)
def test_convolution(options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(5, 7, **options)
    weight = conv.weight.detach().flatten(1)
    result = gptq.quantize_weight(weight, None, mode="rtn", bits=8, group_size=-1)
    linear = QuantizedLinear.from_codes(*result[:3], conv.bias, bits=8, group_size=-1)
    layer = gptq.QuantizedConv2d(linear, **gptq.QuantizedConv2d.geometry(conv))
    with torch.no_grad():
        conv.weight.copy_(linear.dequantize().view_as(conv.weight))
        for x in (random(2, 5, 9, 11), random(5, 9, 11)):
            expected, y = conv(x), layer(x)
            assert y.shape == expected.shape
            # Both round sums of at most 60 products in float32: 60 * 2^-23 of the sum of their magnitudes.
            bound = 60 * 2.0**-23 * x.abs().max() * (weight.abs().sum(1).max() + 2 * 16 * result.scales.max() * 60)
            assert (y - expected).abs().max() <= bound
        program = torch.export.export(layer, (x,))
        assert torch.equal(program.module()(x), y)


def test_convolution_refuses_another_number_of_inputs():
    with pytest.raises(ValueError, match="linear must have 45 inputs, got 100"):
        gptq.QuantizedConv2d(quantized(4, 32)[0], 5, (3, 3))
