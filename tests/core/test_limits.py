"""The machine's limits: that the loops do what they say they do."""

from __future__ import annotations

import pytest
import torch

from tranche.limits import limit_math, limit_read


@pytest.mark.parametrize("words", [0, 8, 64, 1000, 65536])
def test_every_word_is_read_once(backend, words):
    buffer = torch.randint(-(2**62), 2**62, (words,), device=backend.device)
    total = 0
    for word in buffer.tolist():
        total ^= word
    checksum = 0
    for part in limit_read(buffer).tolist():
        checksum ^= part
    assert checksum == total


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_operations_grow_with_iterations(backend, kind):
    like = torch.empty(0, device=backend.device)
    one, ten = (limit_math(like, kind, n)[:, 0].sum() for n in (1, 10))
    assert one > 0
    assert ten == 10 * one


def test_bad_input():
    like = torch.empty(0)
    with pytest.raises(ValueError, match="expected kind in"):
        limit_math(like, "fp64", 1)
    with pytest.raises(ValueError, match="expected iterations > 0, got 0"):
        limit_math(like, "fp32", 0)
    with pytest.raises(ValueError, match=r"buffer\.size\(0\) a multiple of 8, got 7"):
        limit_read(torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected buffer of dtype torch\.int64, got torch\.int32"):
        limit_read(torch.zeros(8, dtype=torch.int32))
    with pytest.raises(ValueError, match="expected a 64-byte aligned buffer"):
        limit_read(torch.zeros(17, dtype=torch.int64)[1:9])


def test_opcheck(backend):
    buffer = torch.ones(64, dtype=torch.int64, device=backend.device)
    torch.library.opcheck(backend.ops().limit_read.default, (buffer,))
    torch.library.opcheck(
        backend.ops().limit_math.default, (buffer, 0, 1), test_utils=("test_schema", "test_faketensor")
    )
