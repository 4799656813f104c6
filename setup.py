"""Drives CMake and Ninja; what is built, and why, is in CMakeLists.txt.

Environment:
  TRANCHE_CUDA=0|1       leave CUDA out, or insist on it (default: built wherever nvcc is found)
  TRANCHE_SIM=1          also build the simulator and the simulated kernels, for the tests
  TORCH_CUDA_ARCH_LIST   as for torch's own extensions, e.g. "8.0;9.0a+PTX" (default: sm_80, sm_90a and PTX)
  MAX_JOBS               parallel compilations (default: bounded by processors and memory)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
GIB_PER_JOB = 4  # what one nvcc process may take


def fail(sentence: str) -> None:
    """End the build with one sentence."""
    raise SystemExit(f"tranche: {sentence}")


def torch_root() -> Path:
    """Where pip put torch."""
    try:
        import torch
    except ImportError:
        fail(
            "torch is not installed in this environment; install it first, or build without --no-build-isolation."
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        fail(f"torch {torch.__version__} is too old for the stable ABI; install torch 2.10 or newer.")
    return Path(torch.__file__).parent


def jobs() -> int:
    """As many compilations as processors and memory allow."""
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    return max(1, min(os.cpu_count() or 1, gib // GIB_PER_JOB))


class CMakeBuild(build_ext):
    """Builds every library of the project with CMake and places it in the package."""

    def run(self) -> None:
        """Configure, build, install into the package."""
        torch = torch_root()
        for tool, package in (("cmake", "cmake"), ("ninja", "ninja")):
            if shutil.which(tool) is None:
                fail(f"{tool} was not found; install it with `pip install {package}`.")
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            fail("no C++ compiler was found; install g++ 11 or newer, or name one in CXX.")
        try:
            import pybind11
        except ImportError:
            fail("pybind11 is not installed; install it with `pip install pybind11`.")

        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        package = Path(self.get_ext_fullpath("tranche._host")).parent.resolve()
        cuda = os.environ.get("TRANCHE_CUDA", "auto")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            # pip's isolated builds each have a ninja of their own, and delete it
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTRANCHE_TORCH_ROOT={torch}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTRANCHE_CUDA={cuda}",
            f"-DTRANCHE_SIM={'ON' if os.environ.get('TRANCHE_SIM') == '1' else 'OFF'}",
            f"-DTRANCHE_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST', '')}",
            f"-DTRANCHE_VERSION={self.distribution.get_version()}",
        ]  # fmt: skip
        # a library that this build leaves out must not linger from an earlier one
        for stale in (*package.glob("lib*.so"), *package.glob("_host*.so")):
            stale.unlink()
        for command in (
            configure,
            ["cmake", "--build", str(build), "-j", str(jobs())],
            ["cmake", "--install", str(build)],
        ):
            if subprocess.run(command).returncode != 0:
                fail(
                    f"`{' '.join(command[:2])}` failed for the reason above; after a change of tools, `make clean`."
                )


setup(ext_modules=[Extension("tranche._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
