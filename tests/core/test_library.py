"""What the package says of itself, and how its libraries choose what to run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import tranche
from tranche import _library, testing
from tranche.__main__ import op_table


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_summary_names_every_op_and_backend():
    text = run_python("import runpy; runpy.run_module('tranche', run_name='__main__')", COLUMNS="200")
    for op in op_table():
        assert f"torch.ops.tranche.{op}" in text
    for words in ("CPU instruction set", "CUDA compiler", tranche.__version__, torch.__version__):
        assert words in text


def test_the_dispatcher_has_every_kernel():
    table = op_table()
    assert {"tree_ancestors", "tree_attention", "limit_read", "limit_math"} <= table.keys()
    for op, kernels in table.items():
        assert kernels["cpu"], op
        assert kernels["sim"], op
        assert kernels["cuda"] == _library.HAS_CUDA, op


def test_both_namespaces_have_the_same_schemas():
    for op in op_table():
        real = str(getattr(torch.ops.tranche, op).default._schema)
        simulated = str(getattr(torch.ops.tranche_sim, op).default._schema)
        assert simulated.replace("tranche_sim::", "tranche::") == real


ATTENTION = """
import hashlib, torch
from tests.tree.cases import make_case
from tranche import _host
out = [
    make_case(1, dtype=d, nodes=20, lengths=(70, 300), head_dim=80)
    for d in (torch.float32, torch.float16, torch.bfloat16)
]
ok = all(float((c.run().double() - c.reference()).abs().max()) < 0.03 for c in out)
print(_host.build_info()["isa"], ok)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "amx"])
def test_every_instruction_set_below_the_machines_own_works(isa):
    order = ["baseline", "avx2", "avx512", "amx"]
    best = run_python("from tranche import _host; print(_host.build_info()['isa'])")
    got, ok = run_python(ATTENTION, TRANCHE_ISA=isa).split()
    assert ok == "True"
    assert got == order[min(order.index(isa), order.index(best))]


def test_the_simulator_is_only_in_force_inside_its_context():
    assert _library.ops() is torch.ops.tranche
    with testing.use_simulator():
        assert _library.ops() is torch.ops.tranche_sim
        with testing.use_simulator(seed=3):
            assert _library.ops() is torch.ops.tranche_sim
        assert _library.ops() is torch.ops.tranche_sim
    assert _library.ops() is torch.ops.tranche
    with pytest.raises(ZeroDivisionError), testing.use_simulator():
        raise ZeroDivisionError
    assert _library.ops() is torch.ops.tranche
