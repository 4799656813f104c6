"""Without an optional package: one sentence that names it, who needs it, and what to run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tranche import _extras

ROOT = Path(__file__).parent.parent.parent
TRANSFORMERS = "needs transformers 5 or newer, which is not installed. Run pip install 'transformers>=5'."


def without(package: str, command: str, version: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python code where a package is not installed, or where it is an old one."""
    old = f"sys.modules['{package}'].__version__ = '{version}'"
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys, types\nsys.modules['{package}'] = "
            + ("None" if version is None else f"types.ModuleType('{package}'); {old}")
            + f"\n{command}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("package", "code", "message"),
    [
        ("transformers", "import tranche.decode", "tranche.decode " + TRANSFORMERS),
        ("transformers", "import tranche.tree.transformers", "tranche.tree.transformers " + TRANSFORMERS),
        (
            "transformers",
            "from tranche import byte_llama as b; b.build(b.Recipe())",
            "tranche.byte_llama " + TRANSFORMERS,
        ),
        (
            "sklearn",
            "from tranche.bits import train_demo as d; d.digits()",
            "tranche.bits train-demo needs scikit-learn, which is not installed. Run pip install scikit-learn.",
        ),
        (
            "matplotlib",
            "from tranche.decode.demo_plot import plot_accepted_lengths as p; p({}, 'none.png')",
            "tranche.decode demo --plot needs matplotlib, which is not installed. Run pip install matplotlib.",
        ),
        (
            "scipy",
            "from tranche import bits; bits.allocate_bits({'a': 1.0}, {'a': {8: 0.0}}, 8)",
            "tranche.bits.allocate_bits needs scipy, which is not installed. Run pip install scipy.",
        ),
        (
            "onnxscript",
            "import torch; from tranche import pconv; "
            "pconv.export_onnx(torch.nn.ReLU().eval(), torch.zeros(1, 1, 2, 2), 'none.onnx')",
            "tranche.pconv.export_onnx needs onnxscript, which is not installed. Run pip install onnxscript.",
        ),
    ],
)
def test_a_missing_package(package, code, message):
    told = without(package, code).stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"(tranche\._extras\.)?MissingExtra: " + re.escape(message), told)


def test_an_old_package():
    told = without("transformers", "import tranche.decode", "4.57.1").stderr
    assert "tranche.decode needs transformers 5 or newer, and 4.57.1 is installed. Run pip install" in told


@pytest.mark.parametrize(
    ("package", "command", "message"),
    [
        ("transformers", ["tranche.decode", "--help"], "tranche.decode " + TRANSFORMERS),
        ("transformers", ["tranche.bits", "lm-demo"], "tranche.byte_llama " + TRANSFORMERS),
        (
            "sklearn",
            ["tranche.bits", "train-demo"],
            "tranche.bits train-demo needs scikit-learn, which is not",
        ),
        (
            "matplotlib",
            ["tranche.bits", "train-demo", "--plot", "x.png"],
            "--plot needs matplotlib, which is not",
        ),
        (
            "sklearn",
            ["tranche.pconv", "train-demo"],
            "tranche.pconv train-demo needs scikit-learn, which is not",
        ),
        (
            "matplotlib",
            ["tranche.pconv", "train-demo", "--plot", "x.png"],
            "--plot needs matplotlib, which is not",
        ),
        (
            "matplotlib",
            ["tranche.decode", "demo", "--plot", "x.png"],
            "--plot needs matplotlib, which is not",
        ),
    ],
)
def test_a_command_without_a_package(package, command, message, tmp_path):
    """As `python -m` runs it: the package is imported while sys.argv[0] is still "-m"."""
    code = (
        f"import os, runpy\nos.environ['XDG_CACHE_HOME'] = {str(tmp_path)!r}\n"
        f"sys.argv = ['-m', *{command[1:]!r}]; sys.orig_argv = ['python', '-m', *{command!r}]\n"
        f"runpy.run_module({command[0]!r}, run_name='__main__', alter_sys=True)"
    )
    result = without(package, code)
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr


def test_the_extras_bring_what_is_asked_for():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lists = {requirement for names in extras.values() for requirement in names}
    assert {requirement.strip("'") for _, requirement in _extras._PACKAGES.values()} <= lists
    assert len({re.split(r"[<>=]", requirement)[0] for requirement in lists}) == len(lists)  # versions agree


def test_what_is_broken_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "scipy.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.delitem(sys.modules, "scipy", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        with _extras.needed("a test", "scipy"):
            raise AssertionError
