"""The Python package: how it finds and checks its library, its wrappers, and the wheel."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

PROBE = """
import torch, gptq
codes = torch.arange(17 * 13, dtype=torch.int32).remainder(16).to(torch.uint8).reshape(17, 13)
assert torch.equal(gptq.unpack_w4(gptq.pack_w4(codes), 17, 13), codes)
print(gptq.__version__, gptq.__file__)
"""


def run_python(*arguments, package_path, **variables):
    """Run the interpreter outside the checkout's environment variables and return the finished process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GPTQ_", "PYTHON"))}
    environment.update(PYTHONPATH=str(package_path), **variables)
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


@pytest.fixture
def package_path(root):
    return root / "ops" / "python"


@pytest.fixture
def gptq(library_path, monkeypatch):
    monkeypatch.setenv("GPTQ_LIBRARY", str(library_path))
    import gptq

    return gptq


def last_line(process):
    return process.stderr.strip().splitlines()[-1]


def test_library_override_is_used(library_path, package_path, tmp_path):
    copy = tmp_path / "copy.so"
    shutil.copy2(library_path, copy)
    done = run_python("-c", PROBE, package_path=package_path, GPTQ_LIBRARY=str(copy))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "unknown"  # no record beside the copy
    done = run_python("-c", PROBE, package_path=package_path, GPTQ_LIBRARY=str(library_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == json.loads(library_path.with_suffix(".json").read_text())["version"]


def test_missing_library_is_an_import_error(package_path, tmp_path):
    missing = tmp_path / "libgptq.so"
    done = run_python("-c", "import gptq", package_path=package_path, GPTQ_LIBRARY=str(missing))
    assert done.returncode == 1
    assert last_line(done).startswith(f"ImportError: gptq: libgptq.so was not found: looked for {missing}")


def test_unloadable_library_is_an_import_error(package_path, tmp_path):
    broken = tmp_path / "libgptq.so"
    broken.write_bytes(b"not a library")
    done = run_python("-c", "import gptq", package_path=package_path, GPTQ_LIBRARY=str(broken))
    assert done.returncode == 1
    assert last_line(done).startswith(f"ImportError: gptq: {broken} does not load with torch {torch.__version__}: ")


def test_library_for_another_torch_is_refused_before_loading(package_path, tmp_path):
    library = tmp_path / "libgptq.so"
    library.write_bytes(b"not a library")
    library.with_suffix(".json").write_text(json.dumps({"version": "0.1.0", "torch": "1.13"}))
    done = run_python("-c", "import gptq", package_path=package_path, GPTQ_LIBRARY=str(library))
    assert done.returncode == 1
    assert f"{library} was built for torch 1.13, this is torch {torch.__version__}" in last_line(done)


def test_record_names_the_torch_in_use(library_path):
    record = json.loads(library_path.with_suffix(".json").read_text())
    assert record["torch"] == ".".join(torch.__version__.split(".")[:2])


def test_wrappers_reach_the_operators(gptq):
    generator = torch.Generator().manual_seed(0)
    n, k, group_size = 17, 70, 32
    n_groups = 3
    codes = torch.randint(16, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n_groups, n, generator=generator).add(0.5).half()
    zeros = torch.randint(16, (n_groups, n), generator=generator, dtype=torch.uint8)
    bias = torch.randn(n, generator=generator)
    x = torch.randn(3, k, generator=generator)

    packed = gptq.pack_w4(codes)
    assert packed.shape == (2, 9, 64)
    assert torch.equal(gptq.unpack_w4(packed, n, k), codes)

    group = torch.arange(k) // group_size
    expected = (codes.float() - zeros.float()[group].T) * scales.float()[group].T
    # A 5-bit difference times an 11-bit scale has at most 16 significant bits: exact in float32.
    weight = gptq.dequantize_w4(packed, scales, zeros, k, group_size)
    assert torch.equal(weight, expected)

    y = gptq.linear_w4(x, packed, scales, zeros, bias, group_size=group_size)
    reference = x.double() @ expected.double().T + bias.double()
    # Activations are split into 24 bits of their group's maximum and the sums rounded in float32: each of the k terms
    # is off by at most 2^-22 of the largest |x| times |w|.
    bound = 2.0**-22 * x.abs().max() * expected.abs().sum(1) + 2.0**-22 * reference.abs()
    assert ((y - reference).abs() <= bound).all()


def test_wrong_arguments_raise_runtime_errors(gptq):
    with pytest.raises(RuntimeError, match="pack_w4: codes"):
        gptq.pack_w4(torch.zeros(4, 4))


def test_layer_and_quantize_weight_agree(gptq):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 40, generator=generator)
    layer = gptq.GPTQLayer(weight)
    for shape in [(30, 40), (2, 25, 40)]:
        layer.add_batch(torch.randn(shape, generator=generator))
    assert layer.nsamples() == 80
    assert layer.hessian().shape == (40, 40)
    of_layer = layer.quantize(group_size=16)
    of_hessian = gptq.quantize_weight(weight, layer.hessian(), group_size=16)
    assert of_layer.codes.shape == (12, 40)
    assert of_layer.scales.shape == of_layer.zeros.shape == (3, 12)
    for a, b in zip(of_layer[:3], of_hessian[:3], strict=True):
        assert torch.equal(a, b)
    assert 0 < of_layer.report["loss"] < of_layer.report["rtn_loss"]

    packed = gptq.pack_w4(of_layer.codes)
    layer.quantize(group_size=16, write_back=True)
    assert torch.equal(weight, gptq.dequantize_w4(packed, of_layer.scales, of_layer.zeros, 40, 16))


def test_module_runs_the_driver(driver_path, package_path):
    done = run_python("-m", "gptq", "--help", package_path=package_path, GPTQ_DRIVER=str(driver_path))
    assert done.returncode == 0, done.stderr
    assert "quantize" in done.stdout
    done = run_python("-m", "gptq", "no-such-command", package_path=package_path, GPTQ_DRIVER=str(driver_path))
    assert done.returncode != 0


def test_missing_driver_is_one_line(package_path, tmp_path):
    done = run_python("-m", "gptq", package_path=package_path, GPTQ_DRIVER=str(tmp_path / "gptq"))
    assert done.returncode == 1
    assert "the driver was not found" in last_line(done)


def test_library_needs_no_particular_python(library_path):
    """The wheel is tagged py3-none: nothing in it may depend on the Python of the build."""
    described = subprocess.run(["readelf", "-dW", library_path], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", described)
    assert "libc10.so" in needed, described
    assert not [name for name in needed if "python" in name], described


def test_build_isolation_is_refused(root, tmp_path):
    """An isolated build environment has setuptools and no torch; another torch than the user's must not be taken."""
    (tmp_path / "setuptools").symlink_to(Path(setuptools.__file__).parent)
    (tmp_path / "_distutils_hack").symlink_to(Path(setuptools.__file__).parents[1] / "_distutils_hack")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-S", root / "setup.py", "--version"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        "found none: install torch, cmake and ninja there, then use `pip install --no-build-isolation .`" in done.stderr
    )
    assert "torch" not in (root / "pyproject.toml").read_text().partition("requires = ")[2].partition("\n")[0]


def test_wheel_works_outside_the_checkout(root, library_path, driver_path, tmp_path):
    build = library_path.parents[1]
    if driver_path.parents[1] != build:
        pytest.skip("library and driver come from different builds")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    command = [*pip, "wheel", str(root), "--no-build-isolation", "--no-deps", "-w", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "GPTQ_BUILD_DIR": str(build)})
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = [
        "__init__.py",
        "__main__.py",
        "_library.py",
        "calibration.py",
        "compressed_tensors.py",
        "dense_linear.py",
        "finished_stack.py",
        "huggingface.py",
        "placement.py",
        "quantize_model.py",
        "quantized_linear.py",
        "replay.py",
        "report.py",
        "streams.py",
        "targets.py",
        "trace.py",
        "py.typed",
        "lib/libgptq.so",
        "lib/libgptq.json",
        "bin/gptq",
    ]
    assert {name for name in names if name.startswith("gptq/")} == {f"gptq/{name}" for name in expected}

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    done = run_python("-c", PROBE, package_path=site)
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    done = run_python("-m", "gptq", "--help", package_path=site)
    assert done.returncode == 0, done.stderr
