"""The error rule where plain torch is nearly exact: one visible key, and scores bent by a softcap."""

from __future__ import annotations

import pytest
import torch

from tests.tree.cases import assert_correct, make_case

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 0.5, 5.0, 50.0])
@pytest.mark.parametrize("options", [{}, {"scale": 1.0}, {"scale": -0.3}, {"exact": True}])
def test_one_visible_key(backend, dtype, softcap, options):
    # a root without committed tokens, and a window of one; many, for the rule compares the worst of all rows
    many = backend.pick(64, 32)
    for lengths, window in (((0,) * many, None), ((3, 40, 9, 33) * (many // 4), 1)):
        case = make_case(
            1, nodes=1, lengths=lengths, heads=(8, 2), dtype=dtype, softcap=softcap, window=window, **options
        )
        assert_correct(case.to(backend.device))


@pytest.mark.parametrize("value", [1.0, -3.0, 0.7])
def test_one_visible_key_gives_its_value_back(backend, value):
    case = make_case(
        3, nodes=1, lengths=(0, 0), heads=(4, 2), softcap=20.0, poison=False, device=backend.device
    )
    case.v.fill_(value)
    torch.testing.assert_close(case.run(), torch.full_like(case.q, value), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 2.0, 5.0, 30.0, 50.0])
def test_softcap_over_few_and_many_keys(backend, dtype, softcap):
    lengths = (1, 2, 9, 33) * backend.pick(8, 2)
    for scale in (0.01, None, 1.0):
        case = make_case(2, nodes=5, lengths=lengths, heads=(4, 2), dtype=dtype, softcap=softcap, scale=scale)
        assert_correct(case.to(backend.device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_beside_few_keys(backend, dtype):
    sinks = torch.tensor([0.7, -2.0, 3.0, 0.0])
    lengths = (0, 0, 1, 5) * backend.pick(8, 2)
    case = make_case(4, nodes=3, lengths=lengths, heads=(4, 2), dtype=dtype, sinks=sinks, softcap=30.0)
    assert_correct(case.to(backend.device))
