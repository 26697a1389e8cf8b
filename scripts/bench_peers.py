#!/usr/bin/env python3
"""Time gptq.linear_w4 beside the 4-bit and dense linears of other packages, all in one process.

    PYTHONPATH=ops/python PEER/bin/python scripts/bench_peers.py --json peers.json

Every contender multiplies by the same quantized weight (symmetric, 4 bit), or by what it stands for; each is called in
every round. Packages that are not installed are left out. PEER is a virtual environment with torch,
auto-round-lib, onnxruntime, onnx and gptqmodel.

With --device cuda a call is timed in a replayed CUDA graph that goes round enough copies of the weight to find none of
them in the L2 cache. What the device copies and multiplies at most is measured in the same rounds.
"""

import argparse
import importlib
import json
import math
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
LEAST_CUDA_SECONDS = 2e-3  # the same on a CUDA device
BEYOND_L2 = 3  # times the size of the L2 cache that the copies of a weight have together
COPY_BYTES = 2**30  # of the buffer that shows what the device copies
GEMM_SIDE = 8192  # of the product that shows what it multiplies
REST_SECONDS = 5e-3  # until the threads of the one before, which each package has of its own, have stopped spinning
LARGEST_ERROR = 0.1  # relative; int8 has about 0.01
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
DENSE = {"f32": "torch f32", "bf16": "torch bf16"}


class Weight:
    """A random weight rounded to nearest, in the forms that the contenders take."""

    def __init__(self, k, n, group_size, device="cpu"):
        self.k, self.n, self.group_size = k, n, group_size
        generator = torch.Generator().manual_seed(42)
        dense = 0.02 * torch.randn(n, k, generator=generator)
        result = gptq.quantize_weight(dense, None, group_size=group_size, mode="rtn", scale_search="minmax")
        self.codes = result.codes.to(device)  # [n, k]
        self.scales = result.scales.to(device)  # [groups, n]
        columns = torch.arange(k, device=device) // group_size
        self.values = (self.codes.double() - MIDDLE) * self.scales.t()[:, columns].double()


def ours(weight, compute):
    packed, scales = gptq.pack_w4(weight.codes), weight.scales.clone()
    return lambda x: gptq.linear_w4(x, packed, scales, group_size=weight.group_size, compute=compute)


def dense(weight, dtype):
    values = weight.values.to(dtype)
    return lambda x: torch.nn.functional.linear(x, values)


def aten_parameters(weight):
    scales = weight.scales.to(torch.bfloat16)
    return torch.stack([scales, torch.zeros_like(scales)], 2).contiguous()


def aten_int4_cuda(weight):
    pairs = (weight.codes[:, ::2] << BITS) | weight.codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    parameters = aten_parameters(weight)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, weight.group_size, parameters)


def aten_int4(weight):
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 2)
    parameters = aten_parameters(weight)
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


def gptq_words(weight):
    """Return the codes as a GPTQ checkpoint has them, int32 [k / 8, n]."""
    shifts = torch.arange(0, 32, BITS, device=weight.codes.device)
    words = weight.codes.t().long().reshape(weight.k // 8, 8, weight.n)
    qweight = (words << shifts[None, :, None]).sum(1)
    return (qweight - ((qweight >> 31) << 32)).to(torch.int32)


def gptqmodel_marlin(weight):
    module = importlib.import_module("gptqmodel.nn_modules.qlinear.marlin")
    kind = getattr(module, "MarlinLinear", None) or module.MarlinQuantLinear
    settings = {"bits": BITS, "group_size": weight.group_size, "desc_act": False, "sym": True}
    layer = kind(**settings, in_features=weight.k, out_features=weight.n).to(weight.codes.device)
    layer.qweight.data.copy_(gptq_words(weight))
    layer.g_idx.data.copy_(torch.arange(weight.k) // weight.group_size)
    layer.scales.data = weight.scales.to(torch.bfloat16)
    layer.post_init()
    return layer.eval()


def gptqmodel_bf16(weight):
    from gptqmodel.nn_modules.qlinear.torch_cpu_avx512 import TorchCpuAvx512Linear

    usable, error = TorchCpuAvx512Linear.validate_once()
    if not usable:
        raise RuntimeError(error)
    qweight = gptq_words(weight)
    eights = sum(MIDDLE << shift for shift in range(0, 32, BITS))
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
CUDA_CONTENDERS = [
    ("linear_w4 exact bf16", "bf16", lambda w: ours(w, "exact")),
    ("linear_w4 bf16", "bf16", lambda w: ours(w, "bf16")),
    ("linear_w4 int8", "bf16", lambda w: ours(w, "int8")),
    ("torch bf16", "bf16", lambda w: dense(w, torch.bfloat16)),
    ("ATen int4 bf16", "bf16", aten_int4_cuda),
    ("gptqmodel Marlin bf16", "bf16", gptqmodel_marlin),
    ("linear_w4 exact", "f32", lambda w: ours(w, "exact")),
    ("torch f32", "f32", lambda w: dense(w, torch.float32)),
]


def contenders_of(device):
    return CUDA_CONTENDERS if device == "cuda" else CONTENDERS


def relative_error(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


def probe(name, device="cpu"):
    """Call one contender a few times."""
    weight = Weight(256, 512, 128, device)
    dtype, make = next((dtype, make) for contender, dtype, make in contenders_of(device) if contender == name)
    call = make(weight)
    for m in (1, 7, 64) * 5:
        x = torch.randn(m, weight.k).to(device, DTYPES[dtype])
        error = relative_error(call(x), x.double() @ weight.values.t())
        if error > LARGEST_ERROR:
            raise SystemExit(f"wrong: relative error {error:.2g}")
    if device == "cuda":
        graph_of([call], x).replay()
        torch.cuda.synchronize()


def reason_to_leave_out(name, device="cpu"):
    """Probe a contender in a process of its own, since some of them crash on some machines; None if it works."""
    command = [sys.executable, __file__, "--device", device, "--probe", name]
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
    """Return what result_of makes of the seconds and errors of all contenders for m rows."""
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
    return result_of(weight, m, seconds, {name: dtype for name, dtype, _ in calls}, errors)


def result_of(weight, m, seconds, dtypes, errors):
    """Return the spread of the seconds, and of the speedups over the dense linear of the same input, round by round."""
    return {
        "k": weight.k,
        "n": weight.n,
        "m": m,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "speedup": {
            name: spread([peer / own for peer, own in zip(seconds[DENSE[dtype]], seconds[name], strict=True)])
            for name, dtype in dtypes.items()
        },
        "error": errors,
    }


def weight_bytes(weight, name, dtype):
    """Return what a contender reads of the weight in one call; of 4 bits, codes and 16-bit scales."""
    if name in DENSE.values():
        return weight.n * weight.k * DTYPES[dtype].itemsize
    return weight.n * weight.k * BITS // 8 + 2 * weight.scales.numel()


def graph_of(calls, x):
    """Return a CUDA graph that makes the calls one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a first call sets up cannot be captured
        for _ in range(2):
            calls[0](x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)
    return graph


def replay_seconds(graph, replays):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def ceiling_graphs():
    """Return a graph for each ceiling of the device, with the bytes that it reads and writes or the flops it does."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(GEMM_SIDE, GEMM_SIDE, device="cuda").bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    return {
        "copy_bytes_per_second": (graph_of([target.copy_], source), 2 * COPY_BYTES),
        "bf16_flops_per_second": (graph_of([lambda x: torch.mm(x, b, out=product)], a), 2 * GEMM_SIDE**3),
    }


def make_cuda_calls(weight, left_out, l2_bytes):
    """Return (name, dtype, calls) of every contender that works here, a call for each copy of the weight."""
    made = []
    for name, dtype, make in CUDA_CONTENDERS:
        if name not in left_out:
            copies = max(2, math.ceil(BEYOND_L2 * l2_bytes / weight_bytes(weight, name, dtype)))
            made.append((name, dtype, [make(weight) for _ in range(copies)]))
    return made


def measure_cuda(weight, calls, m, rounds, ceilings):
    """Return what measure does, with the ceilings of the device and the share of each that a contender reaches."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, weight.k, generator=generator)
    inputs = {name: x.to("cuda", dtype) for name, dtype in DTYPES.items()}
    exact = {name: value[:16].double() @ weight.values.t() for name, value in inputs.items()}
    errors = {name: relative_error(each[0](inputs[dtype])[:16], exact[dtype]) for name, dtype, each in calls}
    timed = [(name, graph_of(each, inputs[dtype]), len(each)) for name, dtype, each in calls]
    timed += [(name, graph, 1) for name, (graph, _) in ceilings.items()]
    replays = {}
    for name, graph, _ in timed:
        replay_seconds(graph, 1)
        replays[name] = max(1, math.ceil(LEAST_CUDA_SECONDS / replay_seconds(graph, 1)))
    seconds = {name: [] for name, _, _ in timed}
    order = random.Random(m)
    for _ in range(rounds):
        for name, graph, count in order.sample(timed, len(timed)):
            seconds[name].append(replay_seconds(graph, replays[name]) / (replays[name] * count))
    amounts = {name: amount for name, (_, amount) in ceilings.items()}
    return with_ceilings(weight, m, seconds, {name: dtype for name, dtype, _ in calls}, errors, amounts)


def with_ceilings(weight, m, seconds, dtypes, errors, amounts):
    """Return result_of, what the device reached in the same rounds, and what share of it each contender did."""
    ceilings = {name: spread([amount / value for value in seconds[name]]) for name, amount in amounts.items()}
    result = result_of(weight, m, {name: seconds[name] for name in dtypes}, dtypes, errors) | {"ceilings": ceilings}
    flops = 2 * m * weight.n * weight.k
    result["bandwidth_share"], result["flops_share"] = {}, {}
    for name, dtype in dtypes.items():
        moved = weight_bytes(weight, name, dtype) + m * (weight.k + weight.n) * DTYPES[dtype].itemsize
        median = result["seconds"][name]["median"]
        result["bandwidth_share"][name] = moved / median / ceilings["copy_bytes_per_second"]["median"]
        result["flops_share"][name] = flops / median / ceilings["bf16_flops_per_second"]["median"]
    return result


def print_result(result):
    print(f"K {result['k']}  N {result['n']}  M {result['m']}")
    for name, seconds in result["seconds"].items():
        ratio, error = result["speedup"][name]["median"], result["error"][name]
        line = f"  {name:22} {1e6 * seconds['median']:10.1f} us   {ratio:6.2f}x dense   error {error:.1e}"
        if "ceilings" in result:
            bandwidth, flops = (100 * result[f"{kind}_share"][name] for kind in ("bandwidth", "flops"))
            line += f"   {bandwidth:5.1f} % of copying   {flops:5.1f} % of bf16 GEMM"
        print(line, flush=True)


def parse_shape(text):
    try:
        k, n = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be KxN, got {text!r}") from None
    return k, n


DEFAULTS = {  # shapes and tokens
    "cpu": ([(768, 768), (768, 3072), (3072, 768), (4096, 4096)], [1, 4, 16, 64, 256]),
    "cuda": (
        [(768, 768), (768, 3072), (3072, 768), (4096, 4096), (4096, 14336), (14336, 4096)],
        [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096],
    ),
}
QUICK = {
    "cpu": ([(768, 768), (4096, 4096)], [1, 16]),
    "cuda": ([(4096, 4096), (4096, 14336)], [1, 16, 1024]),
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="KxN")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="M")
    parser.add_argument("--quick", action="store_true", help="few shapes, tokens and rounds")
    parser.add_argument("--group-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, help="default: 30, with --quick 5")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so long")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all")
    parser.add_argument("--inputs", choices=[*DTYPES, "all"], default="all", help="dtype of the input (default: all)")
    parser.add_argument("--json", type=Path, help="file to write the result to, anew after every M")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes, tokens = (QUICK if args.quick else DEFAULTS)[args.device]
    args.shapes, args.tokens = args.shapes or shapes, args.tokens or tokens
    args.rounds = args.rounds or (5 if args.quick else 30)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "bench_peers.py: --device cuda needs a CUDA device, torch sees none\n")
    return args


def find_left_out(args):
    """Return why contenders cannot run here, and the names of all that are not to."""
    contenders = contenders_of(args.device)
    chosen = [name for name, dtype, _ in contenders if args.inputs in (dtype, "all")]
    reasons = {name: reason_to_leave_out(name, args.device) for name in chosen}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}", flush=True)
    return left_out, {*left_out, *(name for name, _, _ in contenders if name not in chosen)}


def measurer(args):
    """Return what the report says of the machine, and a function that prepares a weight's measure(m)."""
    settings = {"device": args.device, "rounds": args.rounds, "group_size": args.group_size}
    if args.device == "cpu":

        def prepare(weight, without):
            calls = make_calls(weight, without)
            return lambda m: measure(weight, calls, m, args.rounds)

        return {**settings, "threads": args.threads}, prepare
    found = torch.cuda.get_device_properties(0)
    ceilings = ceiling_graphs()

    def prepare_cuda(weight, without):
        calls = make_cuda_calls(weight, without, found.L2_cache_size)
        return lambda m: measure_cuda(weight, calls, m, args.rounds, ceilings)

    machine = {"device_name": found.name, "l2_bytes": found.L2_cache_size, "torch": torch.__version__}
    return {**settings, **machine, "cuda": torch.version.cuda}, prepare_cuda


def main():
    start = time.monotonic()
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.probe:
        probe(args.probe, args.device)
        return
    left_out, without = find_left_out(args)
    settings, prepare = measurer(args)
    results = []
    for k, n in args.shapes:
        if time.monotonic() - start > 60 * args.minutes:
            print(f"out of time before K {k}  N {n}", flush=True)
            break
        measure_rows = prepare(Weight(k, n, args.group_size, args.device), without)
        for m in args.tokens:
            if time.monotonic() - start > 60 * args.minutes:
                print(f"out of time before K {k}  N {n}  M {m}", flush=True)
                break
            results.append(measure_rows(m))
            print_result(results[-1])
            if args.json:
                report = settings | {"left_out": left_out, "results": results}
                args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
