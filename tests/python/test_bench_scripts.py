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
