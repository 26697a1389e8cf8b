"""The benchmark scripts that compare with Python: what they compare with is right, and they run."""

import json

import pytest
import torch

pytest.importorskip("gptq")
import bench_peers  # noqa: E402
import bench_quantize  # noqa: E402


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
