"""Where the tests find what was built: GPTQ_LIBRARY and GPTQ_DRIVER, or the checkout's build folder."""

import os
from pathlib import Path

import pytest

# Threads that spin while they wait slow each other down manyfold on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parents[2]


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
