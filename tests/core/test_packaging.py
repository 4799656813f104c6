"""What is shipped: libraries that any torch >= 2.10 and any Python can load, and a source archive that is whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tranche import _library

ROOT = Path(__file__).parent.parent.parent
SHIPPED = [name for name in ("libtranche_cpu.so", "libtranche_cuda.so") if (_library.PACKAGE / name).exists()]


def run(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", SHIPPED)
def test_only_the_stable_abi_of_torch_is_needed(name):
    """A C++ symbol of torch changes with its version, and with the compiler's standard library; C symbols do not."""
    symbols = run("nm", "-D", "--undefined-only", "-C", str(_library.PACKAGE / name))
    unstable = [
        line for line in symbols.splitlines() if any(s in line for s in (" c10::", " at::", " torch::"))
    ]
    assert unstable == []
    assert "aoti_torch_library_impl" in symbols or "torch_library_impl" in symbols


@pytest.mark.parametrize("name", SHIPPED)
def test_no_python_is_linked(name):
    assert "libpython" not in run("readelf", "-d", str(_library.PACKAGE / name))
    symbols = run("nm", "-D", "--undefined-only", str(_library.PACKAGE / name))
    assert " Py" not in symbols and " _Py" not in symbols


def test_the_source_archive_has_all_that_the_build_reads(tmp_path):
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "CMakeLists.txt",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
    ):
        shutil.copy(ROOT / name, tmp_path)
    libraries = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    for folder in ("csrc", "third_party", "python"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=libraries)
    wanted = {
        path.relative_to(tmp_path).as_posix()
        for folder in ("csrc", "third_party", "python")
        for path in (tmp_path / folder).rglob("*")
        if path.is_file()
    }
    run(sys.executable, "setup.py", "-q", "sdist", cwd=tmp_path)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        got = {name.partition("/")[2] for name in tar.getnames()}
    assert wanted | {"setup.py", "CMakeLists.txt", "pyproject.toml"} <= got


def test_a_build_goes_on_with_another_ninja(tmp_path):
    """Every isolated build of pip has a ninja of its own, which is gone when the next one comes."""
    build = tmp_path / "project" / "build" / f"cmake-{sys.implementation.cache_tag}"
    build.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "project")
    (tmp_path / "project" / "python" / "tranche").mkdir(parents=True)
    # a project that only configures: what is asked of CMake is setup.py's
    (tmp_path / "project" / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(nothing LANGUAGES NONE)\n"
    )
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        ninja = tmp_path / folder / "ninja"
        ninja.symlink_to(Path(shutil.which("ninja") or "").resolve())
        environment = os.environ | {"PATH": f"{tmp_path / folder}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=tmp_path / "project", env=environment, capture_output=True, check=True,
        )  # fmt: skip
        ninja.unlink()
