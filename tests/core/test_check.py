"""`python -m tranche --check` on installs that work and installs that do not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tranche
from tranche import __main__, _library, check

RUN = "import runpy, sys; sys.argv = ['-m', '--check']; runpy.run_module('tranche', run_name='__main__')"


def run_check(package_root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN],
        env={"PYTHONPATH": str(package_root), "COLUMNS": "200", "PATH": ""},
        cwd=package_root,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path):
    """The Python files of the package, without its libraries."""
    shutil.copytree(_library.PACKAGE, tmp_path / "tranche", ignore=shutil.ignore_patterns("*.so"))
    metadata = tmp_path / "tranche-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tranche\nVersion: 0.1.0\n")
    return tmp_path


def test_this_install_is_sound():
    assert [finding for finding in check.findings() if finding.remedy] == []


def test_missing_libraries(copy):
    result = run_check(copy)
    assert result.returncode == 1
    assert "not built" in result.stderr and "pip install" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_library_that_does_not_load(copy):
    (copy / "tranche/libtranche_cpu.so").write_bytes(b"not a library")
    result = run_check(copy)
    assert result.returncode == 1
    assert "libtranche_cpu.so does not load" in result.stderr and "--force-reinstall" in result.stderr


def test_a_torch_that_is_too_old(copy):
    (copy / "torch.py").write_text("__version__ = '2.4.1'\n")
    result = run_check(copy)
    assert result.returncode == 1
    assert "2.10 or newer, found 2.4.1" in result.stderr


def test_a_checkout_that_is_not_installed(copy):
    shutil.rmtree(copy / "tranche-0.1.0.dist-info")
    (copy / "torch.py").write_text("__version__ = '2.13.0'\n")
    # without site-packages nothing else can answer for the name
    result = subprocess.run(
        [sys.executable, "-S", "-c", RUN], cwd=copy, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "is not installed. Run `pip install .`" in result.stderr


def test_no_torch(copy):
    (copy / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    result = run_check(copy)
    assert result.returncode == 1
    assert "pip install torch" in result.stderr


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("80 90a-real", (8, 0), True),
        ("80 90a-real", (8, 6), True),
        ("80 90a-real", (9, 0), True),
        ("80 90a-real", (12, 0), True),  # by the PTX of sm_80
        ("80 90a-real", (7, 5), False),
        ("80-real", (8, 9), True),
        ("80-real", (9, 0), False),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),
        ("90a-real", (8, 0), False),
    ],
)
def test_which_code_runs_where(architectures, capability, expected):
    assert check.runs_on(architectures, capability) == expected


def test_cuda_without_kernels(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "HAS_CUDA", False)
    (finding,) = [finding for finding in check.findings() if finding.remedy]
    assert "TRANCHE_CUDA=1" in finding.remedy


@pytest.mark.parametrize(
    ("capability", "remedy"), [((7, 5), "Ampere"), ((9, 0), 'TORCH_CUDA_ARCH_LIST="9.0"')]
)
def test_a_gpu_without_matching_kernels(monkeypatch, capability, remedy):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "HAS_CUDA", True)
    monkeypatch.setattr(check, "_built_architectures", lambda: "80-real")
    monkeypatch.setattr(check, "_ops", lambda: iter(()))
    for name, value in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_capability", capability),
        ("get_device_name", "a GPU"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    found = list(check._cuda())
    assert remedy in found[0].remedy


def test_an_op_that_fails(monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.ops.tranche, "tree_ancestors", broken)
    (finding,) = [finding for finding in check.findings() if finding.remedy]
    assert "no kernel image" in finding.seen


def test_the_version(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tranche", "--version"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert not ended.value.code
    assert capsys.readouterr().out == f"tranche {tranche.__version__}\n"
