"""route against the reference, ties, and logits that are not numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.moe.cases import FLOATS, assert_same_bits
from tranche.moe import reference, route


def make(seed, tokens, experts, hidden, dtype, device):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype).to(device)
    weight = (torch.randn(experts, hidden, generator=generator) * hidden**-0.5).to(dtype).to(device)
    return x, weight


def check(x, weight, top_k, **options):
    weights, ids = route(x, weight, top_k, **options)
    want, want_ids = reference.route(x, weight, top_k, **options)
    # a choice may differ where scores nearly tie; then compare what was chosen
    unclear = (ids != want_ids).any(-1)
    assert unclear.float().mean() < 0.1
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    tolerance = 1e-5 * options.get("scale", 1.0) * (10 if options.get("score") == "relu_rms" else 1)
    assert torch.allclose(weights[~unclear].double(), want[~unclear], atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "relu_rms"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_scores(backend, dtype, score, renormalize):
    x, weight = make(1, 7, 12, 50, dtype, backend.device)
    check(x, weight, 3, score=score, renormalize=renormalize, scale=2.5)
    if score == "relu_rms":
        gain = torch.rand(12, device=backend.device)
        check(x, weight, 3, score=score, renormalize=renormalize, rms_weight=gain, eps=1e-3)


def test_fp64():
    x, weight = make(2, 9, 20, 70, torch.float64, "cpu")
    weights, ids = route(x, weight, 4, score="sigmoid")
    want, want_ids = reference.route(x, weight, 4, score="sigmoid")
    assert weights.dtype == torch.float64
    assert torch.equal(ids, want_ids)
    assert torch.allclose(weights, want, atol=1e-14)


@pytest.mark.parametrize("groups", [(8, 3), (4, 1), (32, 9)])
def test_groups_and_bias(backend, groups):
    x, weight = make(3, 9, 32, 64, torch.float32, backend.device)
    bias = torch.randn(32, device=backend.device) * 0.1
    options = {"groups": groups[0], "top_groups": groups[1], "score": "sigmoid"}
    check(x, weight, 6, bias=bias, **options)
    weights, ids = route(x, weight, 6, bias=bias, **options)
    size = 32 // groups[0]
    assert all(len(set((row // size).tolist())) <= groups[1] for row in ids)
    scores = torch.sigmoid(x @ weight.T).gather(1, ids.long())  # without the bias
    assert torch.allclose(weights, scores / scores.sum(-1, keepdim=True), atol=1e-5)


def test_many_experts(backend):
    experts, top_k = backend.pick((1024, 1024), (200, 40))
    x, weight = make(4, 2, experts, 16, torch.float32, backend.device)
    _, ids = route(x, weight, top_k)
    if top_k == experts:
        assert torch.equal(ids.sort(-1).values, torch.arange(experts).expand(2, -1).int().to(ids.device))
    check(x, weight, backend.pick(8, 4))


def test_ties_go_to_the_lower_id(backend):
    x = torch.ones(3, 16, device=backend.device)
    weight = torch.ones(6, 16, device=backend.device)
    weight[4] = 2
    _, ids = route(x, weight, 4)
    assert ids.tolist() == [[4, 0, 1, 2]] * 3
    _, ids = route(x, weight, 2, groups=3, top_groups=2)
    assert ids.tolist() == [[4, 0]] * 3


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "relu_rms"])
def test_logits_that_are_not_numbers(backend, score):
    x = torch.ones(1, 1, device=backend.device)
    cases = [
        ([torch.nan, 1.0, torch.nan, 2.0], [3, 1, 0, 2]),
        ([torch.inf, 1.0, torch.inf, -torch.inf], [0, 2, 1, 3]),
        ([torch.nan] * 4, [0, 1, 2, 3]),
        ([-torch.inf] * 4, [0, 1, 2, 3]),
        ([-torch.inf, torch.nan, -torch.inf, 1.0], [3, 0, 2, 1]),
    ]
    for logits, order in cases:
        weight = torch.tensor(logits, device=backend.device)[:, None]
        for renormalize in (True, False):
            weights, ids = route(x, weight, 4, score=score, renormalize=renormalize)
            want, want_ids = reference.route(x, weight, 4, score=score, renormalize=renormalize)
            assert torch.equal(ids, want_ids)
            assert weights.isfinite().all()
            if score != "relu_rms":  # the square of the largest number is infinite in fp32
                assert torch.allclose(weights.double(), want, atol=1e-6)
            if score == "softmax":
                assert ids.tolist() == [order]


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_do_not_depend_on_their_neighbours(backend, dtype):
    x, weight = make(5, 40, 20, 100, dtype, backend.device)
    weights, ids = route(x, weight, 4)
    for kept in (1, 7, 17):
        some, some_ids = route(x[:kept], weight, 4)
        assert_same_bits(some, weights[:kept])
        assert torch.equal(some_ids, ids[:kept])
    wide = torch.zeros(40, 103, dtype=dtype, device=backend.device)
    wide[:, 1:101] = x
    assert_same_bits(route(wide[:, 1:101], weight, 4)[0], weights)


def test_no_tokens(backend):
    x, weight = make(6, 0, 4, 8, torch.float32, backend.device)
    weights, ids = route(x, weight, 2)
    assert weights.shape == ids.shape == (0, 2)


def test_bad_input(backend):
    x, weight = make(7, 3, 6, 8, torch.float32, backend.device)
    for message, options in [
        (r"expected score in \('softmax', 'sigmoid', 'relu_rms'\), got 'tanh'", {"score": "tanh"}),
        (r"expected top_k in \[1, 6\], got 7", {"top_k": 7}),
        ("expected groups that divide the 6 experts, got 4", {"groups": 4}),
        (r"expected top_k <= 2, the experts in the kept groups, got 3", {"groups": 3, "top_k": 3}),
        (r"expected top_groups in \[1, 3\], got 4", {"groups": 3, "top_groups": 4}),
        ("expected a finite scale, got nan", {"scale": float("nan")}),
        (
            "expected no rms_weight but with score relu_rms",
            {"rms_weight": torch.ones(6, device=backend.device)},
        ),
        (r"expected bias of shape \[E\] = \[6\], got \[5\]", {"bias": torch.ones(5, device=backend.device)}),
    ]:
        with pytest.raises(ValueError, match=message):
            route(x, weight, **{"top_k": 2, **options})
    with pytest.raises(ValueError, match=r"expected weight\.size\(1\) == x\.size\(1\) \(8\), got 7"):
        route(x, weight[:, :7], 2)


def test_opcheck(backend):
    x, weight = make(8, 3, 6, 8, torch.float32, backend.device)
    torch.library.opcheck(backend.ops().moe_route.default, (x, weight, 2))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31), tokens=st.integers(1, 40), experts=st.integers(1, 70), hidden=st.integers(1, 80),
    score=st.sampled_from(["softmax", "sigmoid"]), data=st.data(),
)  # fmt: skip
def test_any_case_on_the_cpu(seed, tokens, experts, hidden, score, data):
    x, weight = make(seed, tokens, experts, hidden, torch.float32, "cpu")
    top_k = data.draw(st.integers(1, experts))
    weights, ids = route(x, weight, top_k, score=score)
    want, _ = reference.route(x, weight, top_k, score=score)
    assert ((ids >= 0) & (ids < experts)).all()
    assert torch.allclose(weights.double(), want, atol=1e-5)
