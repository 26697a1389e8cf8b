"""Builds the wheel: calls CMake against the environment's torch and packs the library and the driver.

GPTQ_BUILD_DIR names the build folder, default build/; one that is built already is reused.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path(os.environ.get("GPTQ_BUILD_DIR", ROOT / "build")).resolve()

torch = importlib.util.find_spec("torch")
if torch is None:
    sys.exit(
        "libgptq is built against the torch of the environment and found none: "
        "install torch, cmake and ninja there, then use `pip install --no-build-isolation .`"
    )
TORCH_DIR = torch.submodule_search_locations[0]
TORCH_VERSION = ".".join(importlib.metadata.version("torch").split(".")[:2])
VERSION = re.search(r"project\(gptq VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))[1]


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


def cached(name: str) -> str | None:
    """Return a variable of the build folder's CMake cache."""
    cache = BUILD / "CMakeCache.txt"
    found = re.search(rf"^{name}:\w+=(.*)$", cache.read_text(encoding="utf-8"), re.M) if cache.exists() else None
    return found and found[1]


def configure() -> None:
    """Configure with the driver; where its packages are missing, without."""
    command = ["cmake", "-S", ROOT, "-B", BUILD, f"-DGPTQ_TORCH_DIR={TORCH_DIR}", "-DCMAKE_UNITY_BUILD=ON"]
    configured_for = cached("GPTQ_TORCH_DIR")
    if configured_for is not None and any((BUILD / name).exists() for name in ("build.ninja", "Makefile")):
        if os.path.realpath(configured_for) != os.path.realpath(TORCH_DIR):
            run(*command)
        return
    command += ["-DGPTQ_BUILD_TESTS=OFF", *(["-G", "Ninja"] if shutil.which("ninja") else [])]
    try:
        run(*command)
    except subprocess.CalledProcessError:
        print("libgptq: the driver cannot be configured here (see above); building the library alone", file=sys.stderr)
        run(*command, "-DGPTQ_BUILD_DRIVER=OFF")


class CMakeBuild(build_ext):
    def run(self) -> None:
        if shutil.which("cmake") is None:
            sys.exit("libgptq is built with CMake 3.24 or newer and found none: `pip install cmake ninja`")
        configure()
        driver = cached("GPTQ_BUILD_DRIVER") == "ON"
        run("cmake", "--build", BUILD, "--target", "gptq", *(["gptq_driver"] if driver else []))
        if self.inplace or getattr(self, "editable_mode", False):
            return  # the package in a checkout finds build/
        staging = ROOT / "build" / "python" / "install"
        shutil.rmtree(staging, ignore_errors=True)
        run("cmake", "--install", BUILD, "--prefix", staging)
        package = Path(self.build_lib) / "gptq"
        for folder, names in {"lib": ["libgptq.so", "libgptq.json"], "bin": ["gptq"] if driver else []}.items():
            for name in names:
                found = next(staging.rglob(name if folder == "lib" else f"bin/{name}"))
                (package / folder).mkdir(parents=True, exist_ok=True)
                shutil.copy2(found, package / folder / name)


class AbiFreeWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    version=VERSION,
    install_requires=[f"torch=={TORCH_VERSION}.*", "psutil", "tqdm"],
    ext_modules=[Extension("gptq.libgptq", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AbiFreeWheel},
    # setuptools' own build folder would otherwise be build/, CMake's.
    options={"build": {"build_base": "build/python"}},
)
