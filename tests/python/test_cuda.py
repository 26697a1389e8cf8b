"""What runs on a CUDA device; skipped where there is none."""

import gc
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

gptq = pytest.importorskip("gptq")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ROOT = Path(__file__).resolve().parents[2]
K, N = 96, 40


def layer_tensors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, K, generator=generator), torch.randn(300, K, generator=generator)


OPTIONS = [
    {},
    {"symmetric": False},
    {"bits": 2},
    {"bits": 3, "symmetric": False, "act_order": "off"},
    {"bits": 8, "scale_search": "minmax"},
    {"group_size": -1},
    {"group_size": 20},
    {"act_order": "dynamic"},
    {"refine_sweeps": 3, "row_guard": False},
    {"refine_sweeps": 0, "block_size": 7},
    {"per_tensor": True},
    {"compare": False},
    {"mode": "classic"},
    {"mode": "classic", "symmetric": False, "group_size": -1, "block_size": 20},
    {"mode": "classic", "act_order": "static"},
    {"mode": "classic", "act_order": "dynamic", "bits": 3},
    {"mode": "rtn", "symmetric": False},
    {"mode": "rtn", "scale_search": "weighted"},
]


def assert_same_report(found, expected, rel):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Losses of comparison are of bfloat16 products: good to three digits.
        digits = 1e-2 if "rtn" in name or "relative" in name else rel
        assert found[name] == pytest.approx(value, rel=digits, nan_ok=True), name


@pytest.mark.parametrize("options", OPTIONS)
def test_quantize_weight_gives_the_codes_of_the_cpu_in_float64(options):
    for n, k in ((N, K), (1, 1), (129, 300)):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(n, k, generator=generator, dtype=torch.float64)
        inputs = torch.randn(3 * k + 8, k, generator=generator, dtype=torch.float64)
        hessian = 2 / len(inputs) * inputs.t() @ inputs
        options = {"group_size": 32, **options}
        on_host = gptq.quantize_weight(weight, hessian, **options)
        on_device = gptq.quantize_weight(weight.cuda(), hessian.cuda(), **options)
        for name in ("codes", "scales", "zeros", "input_order"):
            expected, found = getattr(on_host, name), getattr(on_device, name)
            assert (found is None) == (expected is None)
            if expected is not None:
                assert found.is_cuda and found.is_contiguous()
                assert torch.equal(found.cpu(), expected), name
        assert_same_report(on_device.report, on_host.report, 1e-9)


@pytest.mark.parametrize("options", OPTIONS)
def test_quantize_weight_gives_the_loss_of_the_cpu_in_float32(options):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(500, 300, generator=generator)
    inputs = torch.randn(1000, 300, generator=generator)
    hessian = 2 / len(inputs) * inputs.t() @ inputs
    options = {"group_size": 48, **options}
    expected = gptq.quantize_weight(weight, hessian, **options).report
    found = gptq.quantize_weight(weight.cuda(), hessian.cuda(), **options).report
    # With 8 bits a step is a 16th, and that many more targets are within rounding of a tie.
    tolerance = 5e-4 if options.get("bits") == 8 else 1e-4
    # The CPU refines with gradients of bfloat16, whose rounding takes other codes across a tie.
    assert found["loss"] == pytest.approx(expected["loss"], rel=3e-3 if expected["refined"] else tolerance)
    assert found["sweep_loss"] == pytest.approx(expected["sweep_loss"], rel=tolerance)
    for name in ("refined", "damping", "damping_escalations", "float64", "dead_columns"):
        assert found[name] == expected[name]


def test_a_singular_hessian_is_rescued_as_on_the_cpu():
    weight, inputs = layer_tensors()
    inputs = inputs[:40].clone()
    inputs[:, 5] = 0
    inputs[:, 7] *= 1000
    hessian = (inputs.t() @ inputs / 20).double()
    for damping in (0.0, 0.01):
        expected = gptq.quantize_weight(weight.double(), hessian, damping=damping)
        found = gptq.quantize_weight(weight.double().cuda(), hessian.cuda(), damping=damping)
        assert_same_report(found.report, expected.report, 1e-6)
    indefinite = torch.eye(K)
    indefinite[0, 1] = indefinite[1, 0] = 100
    with pytest.raises(RuntimeError, match="no usable Cholesky factor"):
        gptq.quantize_weight(weight.cuda(), indefinite.cuda())
    with pytest.raises(RuntimeError, match="scales are float16"):
        gptq.quantize_weight(1e6 * weight.cuda(), hessian.float().cuda())


def test_quantize_weight_runs_on_the_current_stream():
    weight, inputs = layer_tensors()
    hessian = 2 / len(inputs) * inputs.t() @ inputs
    weight, hessian = weight.cuda(), hessian.cuda()
    expected = gptq.quantize_weight(weight, hessian, group_size=32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = weight + 0 * torch.linalg.inv(hessian.double()).sum()
        found = gptq.quantize_weight(late.float(), hessian, group_size=32)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("options", [{}, {"target_alpha": 0.5}, {"search_damping": True}, {"act_order": "dynamic"}])
def test_layer_gives_the_loss_of_the_cpu(options):
    weight, inputs = layer_tensors()
    layers = []
    for device in ("cpu", "cuda"):
        layer = gptq.GPTQLayer(weight.to(device), torch.zeros(N, device=device))
        for batch in inputs.to(device).split(70):
            layer.add_batch(batch, batch + 0.1 * batch.roll(1, 1))
        layers.append(layer)
    expected, found = (layer.quantize(group_size=32, bits=3, correct_bias=True, **options) for layer in layers)
    # The sums of the inputs themselves are those of another order.
    assert found.report["loss"] == pytest.approx(expected.report["loss"], rel=1e-3)
    assert found.bias_shift.is_cuda
    packed = torch.ops.gptq.pack_w4(found.codes)
    assert packed.is_cuda and torch.equal(packed.cpu(), torch.ops.gptq.pack_w4(found.codes.cpu()))


def test_layer_gathers_on_the_device_and_writes_back():
    weight, inputs = layer_tensors()
    bias = torch.zeros(N)
    float_inputs = inputs + 0.1 * inputs.roll(1, 1)
    mask = (torch.arange(300) % 3 > 0).float()
    host = gptq.GPTQLayer(weight.clone(), bias.clone())
    host.add_batch(inputs, float_inputs, mask)
    device_weight, device_bias = weight.cuda(), bias.cuda()
    device = gptq.GPTQLayer(device_weight, device_bias)
    device.add_batch(inputs.cuda(), float_inputs.cuda(), mask.cuda())
    assert device.hessian().is_cuda
    # Two float32 sums of 200 products in another order.
    torch.testing.assert_close(device.hessian().cpu(), host.hessian(), rtol=1e-5, atol=1e-5)
    result = device.quantize(group_size=32, correct_bias=True, write_back=True)
    expected = host.quantize(group_size=32, correct_bias=True)
    assert result.report["loss"] == pytest.approx(expected.report["loss"], rel=1e-3)
    assert not torch.equal(device_weight.cpu(), weight)
    assert device_bias.abs().sum() > 0


def test_tensors_of_another_device_are_refused():
    weight, inputs = layer_tensors()
    with pytest.raises(RuntimeError, match="hessian must be on the device of the weight, cuda:0, got cpu"):
        gptq.quantize_weight(weight.cuda(), torch.eye(K))
    with pytest.raises(RuntimeError, match="input must be on the device of the weight, cuda:0, got cpu"):
        gptq.GPTQLayer(weight.cuda()).add_batch(inputs)


def packed_weight(n, k, group_size, bits, zeros, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = (torch.randn(groups, n, generator=generator) * 0.02).half()
    zeros = torch.randint(0, 2**bits, (groups, n), generator=generator, dtype=torch.uint8) if zeros else None
    return getattr(torch.ops.gptq, f"pack_w{bits}")(codes), scales, zeros


def to_device(tensors):
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


# m, k, n, group size: what no tile divides, groups that begin inside atoms, more than one span, and a last span that no
# group begins in (1025 columns in groups of 1000).
SHAPES = [
    (1, 1, 1, -1),
    (3, 9, 17, 4),
    (2, 100, 37, 5),
    (7, 129, 65, 128),
    (9, 131, 97, 13),
    (3, 1025, 47, 1000),
    (17, 300, 129, -1),
    (33, 1030, 200, 64),
    (70, 2304, 67, 1000),
    (257, 520, 40, 129),
    (1, 4096, 4096, 128),
    (5, 14336, 4096, 128),
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_gives_the_bits_of_the_cpu(shape, dtype, bits):
    m, k, n, group_size = shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, k, generator=generator).to(dtype)
    if m > 6:
        x[1] *= 1e-30
        x[2, 0] = float("nan")
        x[3] = 0
    bias, order = torch.randn(n, generator=generator), torch.randperm(k, generator=generator).int()
    linear = getattr(torch.ops.gptq, f"linear_w{bits}")
    for zeros, extra, compute in (
        (True, (bias, order), "exact"),
        (False, (None, None), "bf16"),
        (True, (None, None), "int8"),
    ):
        weight = packed_weight(n, k, group_size, bits, zeros)
        expected = linear(x, *weight, *extra, group_size, compute)
        found = linear(x.cuda(), *to_device(weight), *to_device(extra), group_size, compute)
        assert found.is_cuda and found.dtype == dtype
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


# Around every number of tokens at which another kernel or tile takes over.
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 511, 512, 1000])
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_gives_the_bits_of_the_cpu_for_every_number_of_tokens(m, bits):
    linear = getattr(torch.ops.gptq, f"linear_w{bits}")
    x = torch.randn(m, 3100, generator=torch.Generator().manual_seed(4))
    weight = packed_weight(264, 3100, 128, bits, bits == 4)
    for dtype, compute in ((torch.float32, "exact"), (torch.bfloat16, "exact"), (torch.float16, "int8")):
        expected = linear(x.to(dtype), *weight, None, None, 128, compute)
        found = linear(x.to(dtype).cuda(), *to_device(weight), None, None, 128, compute)
        assert torch.equal(found.cpu(), expected), (dtype, compute)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_tokens_in_bf16_are_a_dense_product(dtype, bits):
    m, k, n = 512, 1003, 20000  # two parts of the weight
    linear = getattr(torch.ops.gptq, f"linear_w{bits}")
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(m, k, generator=generator).to(dtype)
    weight = packed_weight(n, k, 100, bits, True)
    extra = torch.randn(n, generator=generator), torch.randperm(k, generator=generator).int()
    arguments = (x.cuda(), *to_device(weight), *to_device(extra), 100)
    exact, dense = linear(*arguments, "exact").float(), linear(*arguments, "bf16").float()
    # Both round to 16 bits, the dense one its weights too: errors of random signs, against the size of a whole row.
    assert not torch.equal(dense, exact)
    unit = torch.finfo(dtype).eps
    assert ((dense - exact).norm(dim=1) < 2 * unit * exact.norm(dim=1)).all()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(linear(*arguments, "bf16").float(), exact)
    finally:
        torch.use_deterministic_algorithms(False)
    x[7, 5] = float("nan")
    rows = linear(x.cuda(), *arguments[1:], "bf16").isnan()
    assert rows[7].all() and rows.any(dim=1).sum() == 1


def test_linear_reads_strides_and_offsets():
    weight = packed_weight(65, 203, 50, 4, True)
    wide = torch.randn(12, 220, generator=torch.Generator().manual_seed(2))
    x = wide[::2, 5:208]
    expected = torch.ops.gptq.linear_w4(x, *weight, None, None, 50)
    shifted = torch.cat([weight[0].flatten()[:1], weight[0].flatten()]).cuda()[1:].view(weight[0].shape)
    found = torch.ops.gptq.linear_w4(wide.cuda()[::2, 5:208], shifted, *to_device(weight[1:]), None, None, 50)
    assert torch.equal(found.cpu(), expected)
    assert torch.ops.gptq.linear_w4(x[:0].cuda(), *to_device(weight), None, None, 50).shape == (0, 65)


def sleep_then_fill(x, value):
    """Work on the current stream that takes long enough for a kernel that does not wait for it to be seen."""
    torch.cuda._sleep(20_000_000)
    x.copy_(value)


# Of each kernel: few tokens, a tile over all of k, spans dealt out, and a dense product.
@pytest.mark.parametrize("m, n", [(1, 512), (8, 512), (16, 64), (64, 20000), (600, 512)])
def test_linear_runs_on_the_current_stream_and_in_a_graph(m, n):
    compute = "bf16" if m >= 512 else "exact"
    weight = to_device(packed_weight(n, 3072, 128, 4, False))
    values = torch.randn(m, 3072, device="cuda", dtype=torch.bfloat16)
    expected = torch.ops.gptq.linear_w4(values, *weight, None, None, 128, compute)
    x = torch.zeros_like(values)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # scratch of one product is scratch of the next
            sleep_then_fill(x, values)
            found = torch.ops.gptq.linear_w4(x, *weight, None, None, 128, compute)
            x.zero_()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = torch.ops.gptq.linear_w4(x, *weight, None, None, 128, compute)
        second = torch.ops.gptq.linear_w4(2 * x, *weight, None, None, 128, compute)
    x.copy_(values)
    graph.replay()
    assert torch.equal(first, expected) and torch.equal(second, 2 * expected)
    x.mul_(2)
    graph.replay()
    assert torch.equal(first, 2 * expected) and torch.equal(second, 4 * expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_quantized_module_moves_to_the_device(bits):
    generator = torch.Generator().manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(96, 40), torch.nn.ReLU(), torch.nn.Linear(40, 24))
    x = torch.randn(10, 96, generator=generator)
    gptq.quantize(model, [x], bits=bits, group_size=32, progress=False)
    expected = model(x)
    dequantized = model[0].dequantize()
    model.to("cuda")
    assert torch.equal(model(x.cuda()).cpu(), expected)
    assert torch.equal(model[0].dequantize().cpu(), dequantized)
    assert torch.equal(model[0].codes().cpu(), model.to("cpu")[0].codes())


def random_gpt2(**options):
    """Return a GPT-2 with random weights, its calibration set and ids to score it on."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 120, **options}
    settings = transformers.GPT2Config(initializer_range=0.1, bos_token_id=0, eos_token_id=0, **sizes)
    generator = torch.Generator().manual_seed(4)
    calibration = [torch.randint(120, (1, 48), generator=generator) for _ in range(8)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (
            transformers.GPT2LMHeadModel(settings).eval(),
            calibration,
            torch.randint(120, (8, 64), generator=generator),
        )


def perplexity_of(model, ids):
    ids = ids.to(next(model.parameters()).device)
    with torch.no_grad():
        return float(model(ids, labels=ids).loss.exp())


@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_a_model_is_quantized_on_the_device_as_on_the_cpu(home):
    expected, calibration, ids = random_gpt2()
    gptq.quantize(expected, calibration, group_size=32, progress=False)
    model = random_gpt2()[0].to(home)
    report = gptq.quantize(model, calibration, group_size=32, device="cuda", progress=False)
    assert len(report.layers) == 12
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {home}
    assert perplexity_of(model, ids) == pytest.approx(perplexity_of(expected, ids), rel=1e-3)
    assert perplexity_of(model.cuda(), ids) == pytest.approx(perplexity_of(expected, ids), rel=1e-3)


def test_the_device_holds_one_block_of_a_model():
    def peak(layers):
        model, _, ids = random_gpt2(n_layer=layers)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gptq.quantize(model, [ids[:1, :8]], group_size=32, device="cuda", progress=False)
        gc.collect()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before

    peak(2)  # what is set up once, and stays
    (shallow, left_by_shallow), (deep, left_by_deep) = peak(2), peak(22)
    assert left_by_shallow <= 0 and left_by_deep <= 0
    # The inputs of all layers of one call are kept too: 8 tokens of 7 widths a block.
    block, inputs = 4 * 12 * 128**2, 4 * 8 * 7 * 128
    assert deep - shallow < 2 * block + 20 * inputs


@pytest.fixture(scope="module")
def driver_runs(tmp_path_factory):
    """Quantize the demo model on both devices; return what the driver reported of each, by device."""
    driver = Path(os.environ.get("GPTQ_DRIVER", ROOT / "build" / "bin" / "gptq"))
    if not driver.is_file():
        pytest.skip(f"{driver} is not built")
    text = ROOT / "docs" / "studies.md"
    reports = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path_factory.mktemp(device)
        options = ["--calibration", text, "--samples", "16", "--sequence-length", "256", "--eval", text]
        command = [driver, "quantize", ROOT / "tests" / "data" / "demo_gpt2", "-o", folder / "model", *options]
        subprocess.run([*command, "--device", device, "--json", folder / "report.json"], check=True)
        command = [driver, "eval", folder / "model", "--text", text, "--device", device, "--json", folder / "eval.json"]
        subprocess.run(command, check=True)
        command = [driver, "generate", folder / "model", "--prompt", "The model", "--device", device]
        subprocess.run([*command, "--max-new-tokens", "8", "--json", folder / "generate.json"], check=True)
        reports[device] = [json.loads((folder / f"{name}.json").read_text()) for name in ("report", "eval", "generate")]
    return reports


def test_the_driver_quantizes_a_model_on_the_device_as_on_the_cpu(driver_runs):
    (host, host_eval, _), (device, device_eval, _) = driver_runs["cpu"], driver_runs["cuda"]
    assert device["device"] == "cuda:0" and device["device_peak_bytes"] > 0
    assert [layer["shape"] for layer in device["layers"]] == [layer["shape"] for layer in host["layers"]]
    for name in ("baseline", "rtn", "quantized"):
        assert device["perplexity"][name] == pytest.approx(host["perplexity"][name], rel=1e-3)
    assert device_eval["perplexity"]["baseline"] == pytest.approx(host_eval["perplexity"]["baseline"], rel=1e-3)


def test_the_driver_continues_a_prompt_with_a_model_on_the_device(driver_runs):
    assert len(driver_runs["cuda"][2]["tokens"]) == len(driver_runs["cpu"][2]["tokens"])
