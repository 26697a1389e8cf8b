"""The packed operators as Python sees them: opcheck, shapes on the meta device, autograd, the level override."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

LIBRARY = os.environ.get(
    "GPTQ_LIBRARY", str(pathlib.Path(__file__).resolve().parents[2] / "build" / "lib" / "libgptq.so")
)
torch.ops.load_library(LIBRARY)
ops = torch.ops.gptq


def operator(name, bits):
    return getattr(ops, f"{name}_w{bits}")


def weight(n, k, group_size, zeros=True, bits=4):
    groups = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = (torch.randn(groups, n) * 0.02).half()
    return codes, scales, torch.randint(0, 2**bits, (groups, n), dtype=torch.uint8) if zeros else None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n,k", [(1, 1), (17, 9), (48, 64)])
def test_opcheck_pack_and_unpack(n, k, bits):
    codes, _, _ = weight(n, k, -1, bits=bits)
    pack = operator("pack", bits)
    torch.library.opcheck(pack, (codes,))
    torch.library.opcheck(operator("unpack", bits), (pack(codes), n, k))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 32, -1, 40])
@pytest.mark.parametrize("zeros", [True, False])
def test_opcheck_dequantize(group_size, zeros, bits):
    codes, scales, zero = weight(17, 96, group_size or 32, zeros, bits)
    packed = operator("pack", bits)(codes)
    torch.library.opcheck(operator("dequantize", bits), (packed, scales, zero, 96, group_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [32, -1, 40])
@pytest.mark.parametrize("shape,bits", [((96,), 4), ((3, 96), 4), ((2, 3, 96), 4), ((2, 3, 96), 8)])
def test_opcheck_linear(dtype, group_size, shape, bits):
    codes, scales, zeros = weight(17, 96, group_size, bits=bits)
    order = torch.randperm(96, dtype=torch.int32)
    packed, linear = operator("pack", bits)(codes), operator("linear", bits)
    x = torch.randn(shape, dtype=dtype)
    torch.library.opcheck(linear, (x, packed, scales, zeros, torch.randn(17), order, group_size, "exact"))
    torch.library.opcheck(linear, (x, packed, scales, None, None, None, group_size, "int8"))


def test_opcheck_with_an_input_that_requires_grad():
    codes, scales, zeros = weight(17, 96, 32)
    x = torch.randn(3, 96, requires_grad=True)
    # Backward is not implemented, so only what does not need it is checked.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.linear_w4, (x, ops.pack_w4(codes), scales, zeros, None, None, 32), test_utils=utilities)


def test_backward_says_that_there_is_none():
    codes, scales, zeros = weight(17, 96, 32)
    x = torch.randn(3, 96, requires_grad=True)
    y = ops.linear_w4(x, ops.pack_w4(codes), scales, zeros, None, None, 32)
    with pytest.raises(RuntimeError, match="derivative for gptq::linear_w4 is not implemented"):
        y.sum().backward()


def test_meta_device_gives_shapes_and_the_same_errors():
    codes, scales, zeros = (t.to("meta") for t in weight(17, 100, 32))
    packed = ops.pack_w4(codes)
    assert packed.shape == (2, 13, 64) and packed.dtype == torch.uint8
    assert ops.unpack_w4(packed, 17, 100).shape == (17, 100)
    assert ops.dequantize_w4(packed, scales, zeros, 100, 32).shape == (17, 100)
    x = torch.empty(2, 3, 100, dtype=torch.bfloat16, device="meta")
    y = ops.linear_w4(x, packed, scales, zeros, None, None, 32)
    assert y.shape == (2, 3, 17) and y.dtype == torch.bfloat16 and y.device.type == "meta"
    with pytest.raises(RuntimeError, match=r"scales must be \[n_groups, N\] = \[2, 17\], got \[4, 17\]"):
        ops.linear_w4(x, packed, scales, zeros, None, None, 64)


def test_export_with_a_dynamic_batch():
    codes, scales, zeros = weight(17, 96, 32)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("packed", ops.pack_w4(codes))
            self.register_buffer("scales", scales)
            self.register_buffer("zeros", zeros)

        def forward(self, x):
            return ops.linear_w4(x, self.packed, self.scales, self.zeros, None, None, 32)

    layer = Layer()
    program = torch.export.export(layer, (torch.randn(3, 96),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for m in (1, 2, 11):
        x = torch.randn(m, 96)
        assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_close_to_dense(bits):
    codes, scales, zeros = weight(50, 300, 128, bits=bits)
    packed = operator("pack", bits)(codes)
    w = operator("dequantize", bits)(packed, scales, zeros, 300, 128).double()
    x = torch.randn(5, 300)
    y = operator("linear", bits)(x, packed, scales, zeros, None, None, 128)
    # 1e-6 of the sum of magnitudes: 3 digits keep 2^-23 of a group's maximum, and 7 roundings of 2^-24 follow.
    assert ((y - x.double() @ w.T).abs() <= 1e-6 * (x.double().abs() @ w.abs().T + 1)).all()


PROBE = """
import hashlib, itertools, sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.gptq
torch.manual_seed(0)
sums = hashlib.sha256()
for n, k, group_size in ((1, 7, 32), (35, 300, 128), (67, 513, 64)):
    groups = -(-k // group_size)
    scales = (torch.randn(groups, n) * 0.02).half()
    for bits, pack, linear in ((4, ops.pack_w4, ops.linear_w4), (8, ops.pack_w8, ops.linear_w8)):
        packed = pack(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8))
        zeros = torch.randint(0, 2**bits, (groups, n), dtype=torch.uint8)
        for m, zero in itertools.product((1, 2, 5, 17, 33), (zeros, None)):
            x = torch.randn(m, k)
            for dtype, compute in itertools.product((torch.float32, torch.bfloat16), ("exact", "bf16", "int8")):
                y = linear(x.to(dtype), packed, scales, zero, None, None, group_size, compute=compute)
                assert y.float().isfinite().all()
                sums.update(y.view(torch.uint8).numpy().tobytes())
print(sums.hexdigest())
"""


def probe(level):
    environment = dict(os.environ)
    environment.pop("GPTQ_CPU_ISA", None)
    if level is not None:
        environment["GPTQ_CPU_ISA"] = level
    return subprocess.run(
        [sys.executable, "-c", PROBE, LIBRARY], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def scalar_bits():
    result = probe("scalar")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("level", [None, "avx2", "avxvnni", "avx512vnni", "amx"])
def test_level_gives_the_bits_of_scalar(level, scalar_bits):
    result = probe(level)
    if f"got {level}" in result.stderr:
        pytest.skip(f"this processor lacks {level}")
    assert result.returncode == 0, result.stderr
    assert result.stdout == scalar_bits


def test_unknown_level_throws_and_lists_the_levels():
    result = probe("sse9")
    assert result.returncode != 0
    assert "GPTQ_CPU_ISA must be one of " in result.stderr
    assert "scalar), got sse9" in result.stderr
