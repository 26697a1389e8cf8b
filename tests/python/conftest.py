"""What tests share. They find what was built by GPTQ_LIBRARY and GPTQ_DRIVER, or in the checkout's build folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Threads that spin while they wait slow each other down manyfold on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parents[2]


FORMAT_CELL = "format cell"


def pytest_addoption(parser):
    parser.addoption(
        "--format-matrix",
        metavar="FILE",
        help="write what was shown of formats, for scripts/format_matrix.py",
    )


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--format-matrix")
    if path:
        passed = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
        cells = [value for report in passed for name, value in report.user_properties if name == FORMAT_CELL]
        Path(path).write_text(json.dumps(cells, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.fixture
def shown(record_property):
    """Return a function that notes what a test has shown of a checkpoint format: one cell of docs/formats.md.

    result is what the reader made of the model; it counts if the test passes.
    """

    def note(form, writer, options, reader, result):
        cell = {"format": form, "writer": writer, "options": options, "reader": reader, "result": result}
        record_property(FORMAT_CELL, cell)

    return note


def built(variable, default):
    path = Path(os.environ.get(variable, ROOT / default))
    assert path.is_file(), f"{path} does not exist: build it (scripts/test.sh does) or set {variable}"
    return path


@pytest.fixture(scope="session")
def root():
    """Return the root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def library_path():
    """Return the path of libgptq.so."""
    return built("GPTQ_LIBRARY", "build/lib/libgptq.so")


@pytest.fixture(scope="session")
def driver_path():
    """Return the path of the driver."""
    return built("GPTQ_DRIVER", "build/bin/gptq")


@pytest.fixture(scope="session")
def demo_model(root):
    """Return the folder of the demo model."""
    return root / "tests" / "data" / "demo_gpt2"


@pytest.fixture(scope="session")
def text(root, tmp_path_factory):
    """Gather the text of this Python; return the paths of a calibration and of a short held-out text."""
    folder = tmp_path_factory.mktemp("text")
    subprocess.run([sys.executable, root / "scripts" / "gather_text.py", folder], check=True, capture_output=True)
    heldout = folder / "short.txt"
    heldout.write_bytes((folder / "heldout.txt").read_bytes()[:60_000])
    return folder / "train.txt", heldout


@pytest.fixture(scope="session")
def gptq(driver_path):
    """Return a function that runs the driver and gives the finished process."""

    def run(*arguments, **options):
        return subprocess.run(
            [driver_path, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False, **options
        )

    return run


@pytest.fixture(scope="session")
def run_driver(gptq):
    """Return what gptq does, for tests where that name is the package's."""
    return gptq


@pytest.fixture(scope="module")
def perplexity(request, gptq, text, tmp_path_factory):
    """Return a function that gives the perplexity of the short text by `gptq eval`, with the module's SCORING."""
    report = tmp_path_factory.mktemp("eval") / "eval.json"

    def score(folder):
        result = gptq("eval", folder, "--text", text[1], *request.module.SCORING, "--json", report)
        assert result.returncode == 0, result.stderr
        return json.loads(report.read_text())["perplexity"]["baseline"]

    return score


def refused(process, *, saying):
    """Check that the driver ended with one error, the last line on stderr, that holds the text."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 1, process
    assert [line for line in lines if not line.startswith("quantizing ")] == lines[-1:], process.stderr
    assert lines[-1].startswith("gptq: ")
    assert re.search(saying, lines[-1]), lines[-1]
