"""README says what runs where, and it is true."""

from __future__ import annotations

import pytest
import torch

from tests.op_calls import CALLS
from tools import support_table
from tranche import _library
from tranche.__main__ import op_table


def test_every_op_has_a_call():
    assert CALLS.keys() == op_table().keys()


def test_the_table_of_readme_is_what_runs():
    text = support_table.README.read_text()
    written = support_table.BLOCK.search(text)
    assert written is not None
    assert written[0] == written[1] + support_table.table() + written[2], "run python -m tools.support_table"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CALLS)
def test_the_gpu_takes_what_the_simulator_takes(name):
    assert _library.HAS_CUDA
    call = CALLS[name]
    for dtype in call.dtypes or (torch.float32,):
        real = support_table.supported(torch.ops.tranche, "cuda", call, dtype)
        assert real == support_table.supported(torch.ops.tranche_sim, "cpu", call, dtype), dtype
