#!/usr/bin/env python3
"""Time gptq.linear_w4 beside the 4-bit and dense linears of other packages, all in one process.

    PYTHONPATH=ops/python PEER/bin/python scripts/bench_peers.py --json peers.json

Every contender multiplies by the same quantized weight (symmetric, 4 bit), or by what it stands for; each is called in
every round. Packages that are not installed are left out. PEER is a virtual environment with torch,
auto-round-lib, onnxruntime, onnx and gptqmodel.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gptq
import torch

BITS = 4
MIDDLE = 2 ** (BITS - 1)
LEAST_SECONDS = 2e-4  # of a contender in one round
REST_SECONDS = 5e-3  # until the threads of the one before, which each package has of its own, have stopped spinning
LARGEST_ERROR = 0.1  # relative; int8 has about 0.01
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
DENSE = {"f32": "torch f32", "bf16": "torch bf16"}


class Weight:
    """A random weight rounded to nearest, in the forms that the contenders take."""

    def __init__(self, k, n, group_size):
        self.k, self.n, self.group_size = k, n, group_size
        generator = torch.Generator().manual_seed(42)
        dense = 0.02 * torch.randn(n, k, generator=generator)
        result = gptq.quantize_weight(dense, None, group_size=group_size, mode="rtn", scale_search="minmax")
        self.codes = result.codes  # [n, k]
        self.scales = result.scales  # [groups, n]
        columns = torch.arange(k) // group_size
        self.values = (self.codes.double() - MIDDLE) * self.scales.t()[:, columns].double()


def ours(weight, compute):
    packed = gptq.pack_w4(weight.codes)
    return lambda x: gptq.linear_w4(x, packed, weight.scales, group_size=weight.group_size, compute=compute)


def dense(weight, dtype):
    values = weight.values.to(dtype)
    return lambda x: torch.nn.functional.linear(x, values)


def aten_int4(weight):
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 2)
    scales = weight.scales.to(torch.bfloat16)
    parameters = torch.stack([scales, torch.zeros_like(scales)], 2).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, weight.group_size, parameters)


def auto_round(weight, compute, dtype):
    import auto_round_kernel

    scales = weight.scales.float().contiguous()
    codes = (weight.codes.t().to(torch.int8) - MIDDLE).contiguous()
    settings = (weight.group_size, compute, "int4", "fp32", False)
    blob = auto_round_kernel.repack_quantized_weight(codes, scales, torch.empty(0, dtype=torch.int8), *settings)
    bias = torch.empty(0, dtype=dtype)
    return lambda x: auto_round_kernel.woqgemm(x, blob, bias, weight.n, weight.k, *settings)


def onnxruntime_nbits(weight, accuracy_level):
    import numpy
    import onnx
    import onnxruntime

    blocks = weight.k // weight.group_size
    pairs = weight.codes.reshape(weight.n, blocks, weight.group_size // 2, 2).numpy()
    packed = pairs[..., 0] | (pairs[..., 1] << 4)
    scales = weight.scales.t().float().contiguous().numpy()
    attributes = {"K": weight.k, "N": weight.n, "bits": BITS, "block_size": weight.group_size}
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", accuracy_level=accuracy_level, **attributes
    )
    constants = [
        onnx.numpy_helper.from_array(packed.astype(numpy.uint8), "b"),
        onnx.numpy_helper.from_array(scales.reshape(-1), "s"),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "linear",
        [onnx.helper.make_tensor_value_info("x", kind, ["m", weight.k])],
        [onnx.helper.make_tensor_value_info("y", kind, ["m", weight.n])],
        constants,
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would otherwise spin on after a call, and stall whoever comes next for milliseconds.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def call(x):
        y = torch.empty(x.shape[0], weight.n)
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, numpy.float32, tuple(x.shape), x.data_ptr())
        binding.bind_output("y", "cpu", 0, numpy.float32, tuple(y.shape), y.data_ptr())
        session.run_with_iobinding(binding)
        return y

    return call


def gptqmodel_bf16(weight):
    from gptqmodel.nn_modules.qlinear.torch_cpu_avx512 import TorchCpuAvx512Linear

    usable, error = TorchCpuAvx512Linear.validate_once()
    if not usable:
        raise RuntimeError(error)
    shifts = torch.arange(0, 32, BITS)
    words = weight.codes.t().long().reshape(weight.k // 8, 8, weight.n)
    qweight = (words << shifts[None, :, None]).sum(1)
    qweight = (qweight - ((qweight >> 31) << 32)).to(torch.int32)
    eights = sum(MIDDLE << int(shift) for shift in shifts)
    qzeros = torch.full((weight.scales.shape[0], weight.n // 8), eights - (1 << 32), dtype=torch.int64).to(torch.int32)
    order = torch.empty(0, dtype=torch.int32)
    packed, zeros = TorchCpuAvx512Linear.pack_gptq_int4_kernel(qweight, qzeros, order, weight.n, weight.k)
    scales = weight.scales.float().contiguous()
    kernel = TorchCpuAvx512Linear.gemm_int4_qzero_group_scaled_cpu_kernel
    return lambda x: kernel(x, packed, zeros, scales, weight.group_size, None)


# Name, dtype of the input, and what makes the call.
CONTENDERS = [
    ("linear_w4 exact", "f32", lambda w: ours(w, "exact")),
    ("linear_w4 int8", "f32", lambda w: ours(w, "int8")),
    ("torch f32", "f32", lambda w: dense(w, torch.float32)),
    ("auto-round-lib f32", "f32", lambda w: auto_round(w, "fp32", torch.float32)),
    ("auto-round-lib int8", "f32", lambda w: auto_round(w, "int8", torch.float32)),
    ("onnxruntime f32", "f32", lambda w: onnxruntime_nbits(w, 1)),
    ("onnxruntime int8", "f32", lambda w: onnxruntime_nbits(w, 4)),
    ("linear_w4 exact bf16", "bf16", lambda w: ours(w, "exact")),
    ("torch bf16", "bf16", lambda w: dense(w, torch.bfloat16)),
    ("ATen int4 bf16", "bf16", aten_int4),
    ("auto-round-lib bf16", "bf16", lambda w: auto_round(w, "bf16", torch.bfloat16)),
    ("gptqmodel bf16", "bf16", gptqmodel_bf16),
]


def relative_error(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


def probe(name):
    """Call one contender a few times."""
    weight = Weight(256, 512, 128)
    dtype, make = next((dtype, make) for contender, dtype, make in CONTENDERS if contender == name)
    call = make(weight)
    for m in (1, 7, 64) * 5:
        x = torch.randn(m, weight.k).to(DTYPES[dtype])
        error = relative_error(call(x), x.double() @ weight.values.t())
        if error > LARGEST_ERROR:
            raise SystemExit(f"wrong: relative error {error:.2g}")


def reason_to_leave_out(name):
    """Probe a contender in a process of its own, since some of them crash on some machines; None if it works."""
    command = [sys.executable, __file__, "--probe", name]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return None
    if result.returncode < 0:
        return f"crashes: {signal.Signals(-result.returncode).name}"
    return result.stderr.strip().splitlines()[-1]


def make_calls(weight, left_out):
    """Return (name, dtype, call) of every contender that works here."""
    return [(name, dtype, make(weight)) for name, dtype, make in CONTENDERS if name not in left_out]


def repeats_of(call, x):
    call(x)
    start = time.perf_counter()
    call(x)
    return max(1, round(LEAST_SECONDS / max(time.perf_counter() - start, 1e-9)))


def spread(values):
    ordered = sorted(values)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9)]
    return {"median": statistics.median(values), "p10": at[0], "p90": at[1]}


def measure(weight, calls, m, rounds):
    """Return the seconds, speedups and errors of all contenders for m rows."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, weight.k, generator=generator)
    inputs = {name: x.to(dtype) for name, dtype in DTYPES.items()}
    exact = {name: value[:16].double() @ weight.values.t() for name, value in inputs.items()}
    errors = {name: relative_error(call(inputs[dtype])[:16], exact[dtype]) for name, dtype, call in calls}
    repeats = {name: repeats_of(call, inputs[dtype]) for name, dtype, call in calls}
    seconds = {name: [] for name, _, _ in calls}
    # In another order each time: some packages' threads still disturb the one that comes next.
    order = random.Random(m)
    for _ in range(rounds):
        for name, dtype, call in order.sample(calls, len(calls)):
            value = inputs[dtype]
            time.sleep(REST_SECONDS)
            call(value)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call(value)
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {
        "k": weight.k,
        "n": weight.n,
        "m": m,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "speedup": {
            name: spread([peer / own for peer, own in zip(seconds[DENSE[dtype]], seconds[name], strict=True)])
            for name, dtype, _ in calls
        },
        "error": errors,
    }


def print_result(result):
    print(f"K {result['k']}  N {result['n']}  M {result['m']}")
    for name, seconds in result["seconds"].items():
        ratio, error = result["speedup"][name]["median"], result["error"][name]
        print(f"  {name:22} {1e6 * seconds['median']:10.1f} us   {ratio:6.2f}x dense   error {error:.1e}", flush=True)


def parse_shape(text):
    try:
        k, n = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be KxN, got {text!r}") from None
    return k, n


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default_shapes = [(768, 768), (768, 3072), (3072, 768), (4096, 4096)]
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=default_shapes, metavar="KxN")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256], metavar="M")
    parser.add_argument("--group-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all")
    parser.add_argument("--inputs", choices=[*DTYPES, "all"], default="all", help="dtype of the input (default: all)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.probe:
        probe(args.probe)
        return
    chosen = [name for name, dtype, _ in CONTENDERS if args.inputs in (dtype, "all")]
    reasons = {name: reason_to_leave_out(name) for name in chosen}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    without = {*left_out, *(name for name, _, _ in CONTENDERS if name not in chosen)}
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}", flush=True)
    results = []
    for k, n in args.shapes:
        weight = Weight(k, n, args.group_size)
        calls = make_calls(weight, without)
        for m in args.tokens:
            results.append(measure(weight, calls, m, args.rounds))
            print_result(results[-1])
    if args.json:
        report = {"threads": args.threads, "rounds": args.rounds, "group_size": args.group_size}
        args.json.write_text(json.dumps(report | {"left_out": left_out, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
