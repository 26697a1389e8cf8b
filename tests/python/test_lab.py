"""The studies of `gptq lab` at small sizes, and their plots: what they find holds, and the toy agrees with numpy."""

import json
import re
import subprocess
import sys

import numpy as np
import plot_lab
import pytest
import torch
from safetensors.numpy import load_file

SMALL = {
    "toy": "--sample-counts 16,256 --fresh-samples 512",
    "group-size": "--rows 64 --columns 192 --group-sizes 32,64,100,-1 --inputs correlated --samples 500",
    "calibration": "--rows 32 --columns 64 --group-size 32 --sample-counts 10,100,1000 --draws 3",
    "bits": "--rows 64 --columns 128 --group-size 32 --samples 1000 --outlier-columns 2",
}


@pytest.fixture(scope="module")
def lab(driver_path):
    """Return a function that runs a study and gives the finished process."""

    def run(*arguments):
        return subprocess.run(
            [driver_path, "lab", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
        )

    return run


@pytest.fixture(scope="module")
def folders(lab, tmp_path_factory):
    """Run every study once; return their folders by name."""
    root = tmp_path_factory.mktemp("lab")
    for study, options in SMALL.items():
        process = lab(study, "-o", root / study, *options.split())
        assert process.returncode == 0, process.stderr
    return {study: root / study for study in SMALL}


@pytest.fixture(scope="module")
def results(folders):
    return {study: json.loads((folder / "results.json").read_text()) for study, folder in folders.items()}


@pytest.fixture(scope="module")
def run_plot_lab(root):
    """Return a function that runs the script and gives the finished process."""

    def run(*arguments):
        command = [sys.executable, root / "scripts" / "plot_lab.py", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.fixture(scope="module")
def page(folders, run_plot_lab, tmp_path_factory):
    """Draw every study and the page; return the page's path."""
    out = tmp_path_factory.mktemp("page") / "compare.html"
    process = run_plot_lab("--compare", *folders.values(), "-o", out)
    assert process.returncode == 0, process.stderr
    return out


def method(results, name, inputs="normal"):
    (run,) = [run for run in results["toy"]["runs"] if run["inputs"] == inputs]
    return run["methods"][name]


def published_gptq(weight, hessian, scale):
    """GPTQ as published, in float64: U = chol(H⁻¹), one column after another."""
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    weight, quantized = weight.copy(), np.empty_like(weight)
    for k in range(weight.shape[1]):
        quantized[:, k] = np.clip(np.round(weight[:, k] / scale[:, k]), -8, 7) * scale[:, k]
        error = (weight[:, k] - quantized[:, k]) / upper[k, k]
        weight[:, k:] -= np.outer(error, upper[k, k:])
    return quantized


def test_manifests_say_how_the_results_came_about(folders, results):
    for study, folder in folders.items():
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["study"] == results[study]["study"] == study
        assert manifest["command"].startswith(f"gptq lab {study} -o ")
        assert manifest["seed"] == manifest["settings"]["seed"] == 42
        assert manifest["settings"] == results[study]["settings"]
        assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
        assert manifest["host"]["cores"] >= 1 and manifest["threads"] >= 1
        assert 0 < manifest["seconds"] < 30


def test_toy_gains_what_it_should(results):
    for inputs in ("normal", "cauchy"):
        for name in ("gptq", "gptq_act_order", "library"):
            assert method(results, name, inputs)["ratio"] < 0.7, (inputs, name)
        assert method(results, "rtn", inputs)["ratio"] == 1
    assert results["toy"]["settings"] | {"sample_counts": [], "fresh_samples": 0} == {
        **{"seed": 42, "rows": 768, "columns": 768, "std": 0.02, "samples": 128, "group_size": 64, "bits": 4},
        **{
            "damping": 0.01,
            "dampings": [0.0001, 0.001, 0.01, 0.1, 1.0],
            "mode": "default",
            "sample_counts": [],
            "fresh_samples": 0,
        },
    }


def test_toy_losses_are_those_of_its_rows(results):
    for run in results["toy"]["runs"]:
        for values in run["methods"].values():
            assert len(values["row_loss"]) == 768
            assert sum(values["row_loss"]) == pytest.approx(values["loss"], rel=1e-12)
    gptq, rtn = method(results, "gptq"), method(results, "rtn")
    worse = sum(a > b for a, b in zip(gptq["row_loss"], rtn["row_loss"], strict=True))
    assert gptq["worse_rows"] == worse


def test_toy_is_published_gptq_on_the_stated_grid(folders, results):
    layers = load_file(folders["toy"] / "layers.safetensors")
    generator = torch.Generator().manual_seed(42)
    weight = (0.02 * torch.randn(768, 768, generator=generator)).double().numpy()
    inputs = torch.randn(768, 128, generator=generator).double().numpy()
    assert np.array_equal(layers["weight"], weight)
    hessian = inputs @ inputs.T / 128
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(768)
    scale = (np.abs(weight.reshape(768, 12, 64)).max(axis=2) / 7).astype(np.float16).astype(float).repeat(64, axis=1)
    rounded = np.clip(np.round(weight / scale), -8, 7) * scale
    for name, values in (("rtn", rounded), ("gptq", published_gptq(weight, hessian, scale))):
        # A value in the middle between two codes, or a scale between two float16 numbers, may go either way.
        assert np.mean(layers[f"normal.{name}"] != values) < 1e-4
        error = weight - layers[f"normal.{name}"]
        assert np.sum((error @ hessian) * error) == pytest.approx(method(results, name)["loss"], rel=1e-9)
    changed = np.sum(layers["normal.gptq"] != layers["normal.rtn"])
    assert changed == method(results, "gptq")["changed"]
    assert changed / weight.size == method(results, "gptq")["changed_share"]


def test_toy_goes_back_to_rounding_as_damping_grows(results):
    for run in results["toy"]["runs"]:
        weights_move = [point["gptq_act_order"]["ratio_mse"] for point in run["dampings"]]
        assert weights_move == sorted(weights_move, reverse=True)
        (same,) = [point for point in run["dampings"] if point["damping"] == 0.01]
        for name in ("gptq", "gptq_act_order"):
            assert same[name]["ratio_undamped"] == run["methods"][name]["ratio_undamped"]


def test_toy_gains_less_the_more_independent_inputs_it_sees(results):
    few, many = results["toy"]["samples"]
    assert few["ratio"] < many["ratio"] < 1
    assert few["ratio_fresh"] > 1 and many["ratio_fresh"] > 1


def test_effective_bits_count_scales_and_zeros(results, lab, tmp_path):
    groups = {row["group_size"]: row for row in results["group-size"]["groups"]}
    # 192 columns: the last group of 100 is short.
    for group_size, groups_per_row in ((32, 6), (64, 3), (100, 2), (-1, 1)):
        bits = groups[group_size]["effective_bits"]
        assert bits == pytest.approx(4 + groups_per_row * (16 + 4) / 192)
        assert groups[group_size]["compression_32"] == pytest.approx(32 / bits)
        assert groups[group_size]["compression_16"] == pytest.approx(16 / bits)
    for row in results["bits"]["cases"][0]["rows"]:  # symmetric
        overhead = {"tensor": 16 / (64 * 128), "row": 16 / 128, "group": 16 / 32}[row["granularity"]]
        assert row["effective_bits"] == pytest.approx(row["bits"] + overhead)
    options = ["--rows", "16", "--columns", "64", "--group-sizes", "64", "--grid", "symmetric", "--samples", "8"]
    assert lab("group-size", "-o", tmp_path / "symmetric", *options).returncode == 0
    (row,) = json.loads((tmp_path / "symmetric" / "results.json").read_text())["groups"]
    assert row["effective_bits"] == 4.25


def test_gptq_beats_rounding_on_correlated_inputs(results):
    for row in results["group-size"]["groups"]:
        assert row["gptq"]["loss"] < 0.7 * row["rtn"]["loss"]
        assert row["gptq"]["heldout_loss"] < row["rtn"]["heldout_loss"]
        assert row["gptq"]["mse"] > row["rtn"]["mse"]
    errors = [row["rtn"]["mse"] for row in results["group-size"]["groups"]]
    assert errors == sorted(errors)


def test_calibration_spreads_and_what_mismatch_costs(results):
    cases = {case["case"]: case for case in results["calibration"]["cases"]}
    assert list(cases) == ["independent", "matched", "mismatched"]
    for case in cases.values():
        assert [point["samples"] for point in case["points"]] == [10, 100, 1000]
        for point in case["points"]:
            for key in ("mse", "heldout_loss"):
                draws, spread = point["draws"][key], point[key]
                assert len(set(draws)) == 3
                assert spread["mean"] == pytest.approx(np.mean(draws))
                assert spread["std"] == pytest.approx(np.std(draws, ddof=1))
                assert (spread["min"], spread["max"]) == (min(draws), max(draws))
    matched, mismatched = (cases[name]["points"][-1]["heldout_loss"] for name in ("matched", "mismatched"))
    assert matched["max"] < mismatched["min"]
    assert matched["max"] < cases["matched"]["rtn"]["heldout_loss"]
    assert cases["matched"]["rtn"] == cases["mismatched"]["rtn"]


def test_more_bits_lose_less(results):
    for case in results["bits"]["cases"]:
        for granularity in ("tensor", "row", "group"):
            rows = [row for row in case["rows"] if row["granularity"] == granularity]
            assert [row["bits"] for row in rows] == [2, 3, 4, 8]
            for name in ("rtn", "gptq"):
                losses = [row[name]["loss"] for row in rows]
                assert losses == sorted(losses, reverse=True)
                assert len(set(losses)) == 4
            assert all(row["gptq"]["loss"] < row["rtn"]["loss"] for row in rows)
    none, weight, _ = results["bits"]["cases"]
    per_tensor = [case["rows"][6]["rtn"]["relative_error"] for case in (none, weight)]
    assert none["rows"][6]["bits"] == 4 and per_tensor[1] > 2 * per_tensor[0]


def test_the_seed_decides_the_results(lab, folders, tmp_path):
    for study in ("group-size", "calibration", "bits"):
        options = [*SMALL[study].split(), "--threads", 1]
        for name, seed in (("a", 7), ("b", 7), ("c", 8)):
            assert lab(study, "-o", tmp_path / name, *options, "--seed", seed).returncode == 0
        a, b, c = ((tmp_path / name / "results.json").read_bytes() for name in "abc")
        assert a == b
        assert a != c


def test_an_earlier_run_is_replaced_and_nothing_else(lab, tmp_path):
    tiny = ["--rows", "8", "--columns", "16", "--group-sizes", "8", "--samples", "4"]
    out = tmp_path / "out"
    assert lab("group-size", "-o", out, *tiny).returncode == 0
    (out / "error.png").write_bytes(b"stale")
    assert lab("group-size", "-o", f"{out}/", *tiny).returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "results.json"]
    (out / "notes.txt").write_text("do not lose")
    process = lab("group-size", "-o", out, *tiny)
    assert process.returncode == 1
    assert re.fullmatch(r"gptq: .*out: .*holds notes\.txt\n", process.stderr)
    assert (out / "notes.txt").read_text() == "do not lose"
    (out / "manifest.json").unlink()
    assert "manifest.json" in lab("group-size", "-o", out, *tiny).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (["toy", "--bits", "9"], "--bits"),
        (["toy", "--samples", "0"], "--samples"),
        (["toy", "--std", "1e9"], "float16"),
        (["toy", "--group-size", "0"], "--group-size"),
        (["toy", "--damping", "-1"], "--damping"),
        (["toy", "--seed", "-1"], "--seed"),
        (["group-size", "--group-sizes", "8,0"], "--group-sizes"),
        (["group-size", "--inputs", "magic"], "--inputs"),
        (["group-size", "--mode", "rtn"], "--mode"),
        (["group-size", "--grid", "hexagonal"], "--grid"),
        (["calibration", "--draws", "0"], "--draws"),
        (["calibration", "--shared", "1.5"], "--shared"),
        (["bits", "--outlier-columns", "2000"], "--outlier-columns"),
        (["bits", "--bits", "4,1"], "--bits"),
        (["bits", "--colour", "blue"], "--colour"),
        (["magic"], "magic|subcommand"),
        ([], "subcommand"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_flags_are_refused(lab, tmp_path, arguments, saying):
    process = lab(*arguments, *(["-o", tmp_path / "out"] if arguments else []))
    assert process.returncode == 1
    assert re.fullmatch(rf"gptq: .*({saying}).*\n", process.stderr), process.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_at_once(lab, tmp_path):
    process = lab("group-size", "-o", tmp_path / "missing" / "out")
    assert process.returncode == 1
    assert re.fullmatch(r"gptq: .*missing.*\n", process.stderr)
    assert lab("toy").returncode == 1


def test_plots_are_drawn(page, folders):
    names = {"toy": {"loss_curve", "samples"}, "group-size": {"error", "compression"}}
    names |= {"calibration": {"calibration"}, "bits": {"bits"}}
    for study, folder in folders.items():
        plots = list(folder.glob("*.png"))
        assert {plot.stem for plot in plots} == names[study]
        for plot in plots:
            data = plot.read_bytes()
            assert data.startswith(b"\x89PNG\r\n") and 5_000 < len(data) < 100_000


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', text)
    assert "<script" not in text and "http" not in text and "url(" not in text
    assert text.count("<img ") == 6 and text.count("<article>") == 4
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_the_page_escapes_what_it_shows(folders, run_plot_lab, tmp_path):
    folder = tmp_path / "<b>&"
    folder.mkdir()
    for name in ("results.json", "manifest.json"):
        text = (folders["bits"] / name).read_text()
        (folder / name).write_text(text.replace("AMD", "<script>").replace("gptq lab", "gptq <i>lab"))
    assert run_plot_lab("--compare", folder, folder, "-o", tmp_path / "page.html").returncode == 0
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text and "<i>" not in text and "<b>" not in text
    assert "gptq &lt;i&gt;lab" in text and "&lt;b&gt;&amp;" in text


def test_tables_of_a_markdown_page_are_brought_up_to_date(folders, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- group-size: groups -->\nold\n<!-- end -->\nafter\n")
    plot_lab.update_markdown(page, [plot_lab.Run(folders["group-size"])])
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == (
        ["| group size", "| ---", "| 32", "| 64", "| 100", "| row"]
    )
    page.write_text("<!-- toy: magic -->\n<!-- end -->\n")
    with pytest.raises(plot_lab.LabError, match="no table toy: magic"):
        plot_lab.update_markdown(page, [plot_lab.Run(folders["toy"])])


def test_folders_that_are_no_results_are_refused(run_plot_lab, tmp_path):
    process = run_plot_lab(tmp_path)
    assert process.returncode == 1
    assert re.fullmatch(r"plot_lab\.py: .*results\.json: No such file or directory\n", process.stderr)
    for text in ("{", "[]", '{"study": "magic"}', '{"study": "bits"}'):
        (tmp_path / "results.json").write_text(text)
        (tmp_path / "manifest.json").write_text("{}")
        with pytest.raises(plot_lab.LabError, match="is not the output of a study"):
            plot_lab.Run(tmp_path)
