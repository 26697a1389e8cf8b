"""The benchmark scripts that compare with Python: what they compare with is right, and they run."""

import json
import subprocess

import pytest
import torch

pytest.importorskip("gptq")
import bench_peers  # noqa: E402
import bench_quantize  # noqa: E402
import plot_speed  # noqa: E402


def test_the_published_loop_quantizes_well():
    weight, hessian = bench_quantize.random_layer(24, 160)
    values, losses = bench_quantize.published(weight, hessian, bits=4, group_size=32, damping=0.01)
    scale, zero = bench_quantize.symmetric_grid(weight.reshape(24 * 5, 32), 4)
    code = torch.clamp(torch.round(weight.reshape(24 * 5, 32) / scale) + zero, 0, 15)
    nearest = (scale * (code - zero)).reshape(24, 160)

    def loss(of):
        error = (weight - of).double()
        return float((error @ hessian.double() * error).sum())

    assert loss(values) < 0.8 * loss(nearest)
    assert len(values[0, :32].unique()) <= 16
    assert losses > 0


def test_bench_quantize_runs(tmp_path, monkeypatch, capsys):
    path = tmp_path / "quantize.json"
    arguments = ["bench_quantize.py", "--shapes", "16x40", "--rounds", "2", "--group-size", "16", "--json", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    bench_quantize.main()
    (result,) = json.loads(path.read_text())["shapes"]
    assert result["shape"] == [16, 40]
    assert set(result["speedup"]) == set(result["seconds"]) - {"published"}
    assert "16 x 40" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["linear_w4 exact", "linear_w4 int8", "torch f32", "ATen int4 bf16"])
def test_contenders_multiply_by_the_same_weight(name):
    bench_peers.probe(name)


def test_a_contender_that_cannot_run_is_left_out_with_a_reason(root, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(root / "ops" / "python"))
    assert bench_peers.reason_to_leave_out("torch f32") is None
    assert bench_peers.reason_to_leave_out("no such contender")


def test_ratios_are_to_the_dense_linear_of_the_same_input():
    weight = bench_peers.Weight(64, 48, 32)
    names = ["linear_w4 exact", "linear_w4 exact bf16", "torch f32", "torch bf16"]
    left_out = {name for name, _, _ in bench_peers.CONTENDERS} - set(names)
    result = bench_peers.measure(weight, bench_peers.make_calls(weight, left_out), 3, rounds=3)
    assert set(result["speedup"]) == set(names)
    assert result["speedup"]["torch f32"]["median"] == result["speedup"]["torch bf16"]["median"] == 1
    assert result["error"]["linear_w4 exact"] < 1e-6


def test_what_a_cuda_run_measured_is_put_together():
    weight = bench_peers.Weight(64, 48, 32)
    dtypes = {"linear_w4 bf16": "bf16", "torch bf16": "bf16", "linear_w4 exact": "f32", "torch f32": "f32"}
    seconds = {"linear_w4 bf16": [1e-6, 2e-6, 1e-6], "torch bf16": [4e-6, 4e-6, 4e-6]}
    seconds |= {"linear_w4 exact": [2e-6] * 3, "torch f32": [3e-6] * 3, "copy": [1e-3] * 3, "gemm": [2e-3] * 3}
    amounts = {"copy_bytes_per_second": 2e9, "bf16_flops_per_second": 4e9}
    seconds |= {"copy_bytes_per_second": seconds.pop("copy"), "bf16_flops_per_second": seconds.pop("gemm")}
    result = bench_peers.with_ceilings(weight, 3, seconds, dtypes, dict.fromkeys(dtypes, 1e-3), amounts)
    assert result["ceilings"]["copy_bytes_per_second"]["median"] == pytest.approx(2e12)
    assert result["ceilings"]["bf16_flops_per_second"]["median"] == pytest.approx(2e12)
    assert result["speedup"]["linear_w4 bf16"] == {"median": 4, "p10": 2, "p90": 4}
    # Two groups of 48 scales, codes of 4 bits, and 3 rows of input and output.
    moved = 64 * 48 / 2 + 2 * 2 * 48 + 3 * (64 + 48) * 2
    assert result["bandwidth_share"]["linear_w4 bf16"] == pytest.approx(moved / 1e-6 / 2e12)
    dense = 64 * 48 * 2 + 3 * (64 + 48) * 2
    assert result["bandwidth_share"]["torch bf16"] == pytest.approx(dense / 4e-6 / 2e12)
    assert result["flops_share"]["linear_w4 exact"] == pytest.approx(2 * 3 * 64 * 48 / 2e-6 / 2e12)
    assert set(json.loads(json.dumps(result))["seconds"]) == set(dtypes)


def test_a_cuda_run_prints_its_ceilings(capsys):
    weight = bench_peers.Weight(64, 48, 32)
    seconds = dict.fromkeys(["torch bf16", "copy_bytes_per_second", "bf16_flops_per_second"], [1e-6])
    amounts = dict.fromkeys(["copy_bytes_per_second", "bf16_flops_per_second"], 1.0)
    bench_peers.print_result(
        bench_peers.with_ceilings(weight, 1, seconds, {"torch bf16": "bf16"}, {"torch bf16": 2e-3}, amounts)
    )
    assert "% of copying" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", [bench_peers, bench_quantize])
def test_without_a_cuda_device_there_is_one_line(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", "--device", "cuda"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"{script.__name__}.py: --device cuda needs a CUDA device, torch sees none\n"


def test_a_run_ends_in_time_and_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    path = tmp_path / "peers.json"
    monkeypatch.setattr(
        bench_peers, "reason_to_leave_out", lambda name, device: None if "torch" in name else "not here"
    )
    arguments = ["bench_peers.py", "--shapes", "64x48", "--group-size", "32", "--rounds", "2", "--json", str(path)]
    monkeypatch.setattr("sys.argv", [*arguments, "--tokens", "1", "3", "--threads", str(torch.get_num_threads())])
    bench_peers.main()
    report = json.loads(path.read_text())
    assert report["device"] == "cpu" and report["left_out"]["ATen int4 bf16"] == "not here"
    assert [result["m"] for result in report["results"]] == [1, 3]
    monkeypatch.setattr("sys.argv", [*arguments, "--minutes", "0"])
    bench_peers.main()
    assert "out of time before K 64  N 48" in capsys.readouterr().out


def test_plot_speed_draws_and_tabulates(driver_path, tmp_path, monkeypatch, capsys):
    linear, peers = tmp_path / "linear.json", tmp_path / "peers.json"
    arguments = ["--shapes", "64x48,96x48", "--tokens", "1,5", "--group-size", "32", "--rounds", "2", "--json", linear]
    subprocess.run([str(part) for part in (driver_path, "bench", "linear", *arguments)], check=True)
    weight = bench_peers.Weight(64, 48, 32)
    left_out = {name for name, _, _ in bench_peers.CONTENDERS if not name.startswith(("linear_w4", "torch"))}
    results = [bench_peers.measure(weight, bench_peers.make_calls(weight, left_out), m, rounds=2) for m in (1, 5)]
    peers.write_text(json.dumps({"left_out": {"nobody": "is not here"}, "results": results}))
    capsys.readouterr()
    paths = ["--linear", f"avx9={linear}", "--dram", str(linear), "--peers", str(peers)]
    monkeypatch.setattr("sys.argv", ["plot_speed.py", str(tmp_path / "plots"), *paths])
    plot_speed.main()
    for name in ("levels", "bandwidth", "peers"):
        assert (tmp_path / "plots" / f"speed_{name}.png").stat().st_size > 5000
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(("| 64 × 48 | 1 |", "| 96 × 48 | 5 |"))]) == 4
    assert "left out: nobody: is not here" in lines
    microseconds = 1e6 * results[0]["seconds"]["linear_w4 exact"]["median"]
    assert any(line.startswith(f"| 64 × 48 | 1 | {microseconds:.0f} |") for line in lines)
