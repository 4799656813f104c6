"""draft_moe and draft_moe_star: both outputs, the sign, ties."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.moe.cases import FLOATS, assert_same_bits, judge, make_head
from tests.sim.simulator import runtime
from tranche.moe import draft_moe, draft_moe_star, reference
from tranche.testing import use_simulator


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("residual", [True, False])
def test_both_outputs(backend, dtype, residual):
    head = make_head(1, tokens=backend.pick(70, 20), dtype=dtype, residual=residual, device=backend.device)
    clear = head.far_from_ties()
    assert clear.float().mean() > 0.5
    got, want = head.run(contrast=True), head.reference(contrast=True)
    plain = head.reference(contrast=True, compute_dtype=dtype)
    for a, b, c in zip(got, want, plain, strict=True):
        judge(a[clear], b[clear], c[clear])
    assert_same_bits(head.run(), got[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_rows_agree(backend, dtype):
    """Row by row: the sign of the contrast is the reference's, and the error is within one rounding."""
    head = make_head(15, tokens=backend.pick(100_000, 200), hidden=64, dtype=dtype, device=backend.device)
    clear = head.far_from_ties()
    assert clear.float().mean() > 0.8
    for got, want in zip(head.run(contrast=True), head.reference(contrast=True), strict=True):
        got, want = got[clear].double(), want[clear]
        assert ((got * want).sum(-1) > 0).all()
        largest = want.abs().amax(-1)
        error = (got - want).abs().amax(-1)
        # fp32 keeps no wider sums: a few of its roundings
        roundings = 8 if dtype == torch.float32 else 1
        assert (error <= roundings * torch.finfo(dtype).eps * largest).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("variant", "experts"), [("jakiro", 2), ("topk", 5)])
def test_every_number_of_launches(backend, dtype, variant, experts):
    """Few tokens or many, the plan made on the way, ahead, or not at all: the same bits for the same rows."""
    tokens, top_k = (70, 2) if variant == "jakiro" else (1030 // 3, 3)
    head = make_head(
        16, tokens=tokens, hidden=16, experts=experts, dtype=dtype, variant=variant, top_k=top_k,
        device=backend.device, residual=True,
    )  # fmt: skip
    outputs = head.run(contrast=True)
    few = slice(0, 3)
    options = {**head.options, "residual": head.options["residual"][few]}
    part = draft_moe(head.x[few], *head.tensors()[1:], contrast=True, **options)
    for a, b in zip(part, outputs, strict=True):
        assert_same_bits(a, b[few])


def test_launches():
    """Two kernels where both experts are chosen, three where the gate must choose first."""

    def launches(head):
        before = runtime().counters().launches
        with use_simulator():
            head.run(contrast=True)
        return runtime().counters().launches - before

    assert launches(make_head(17, tokens=20)) == 2
    assert launches(make_head(17, tokens=20, experts=4, variant="topk")) == 3


@pytest.mark.parametrize("dtype", FLOATS)
def test_topk(backend, dtype):
    head = make_head(2, tokens=20, experts=6, dtype=dtype, variant="topk", top_k=3, device=backend.device)
    clear = head.far_from_ties(0.01)
    assert clear.any()
    plain = head.reference(contrast=True, compute_dtype=dtype)
    for a, b, c in zip(head.run(contrast=True), head.reference(contrast=True), plain, strict=True):
        judge(a[clear], b[clear], c[clear])


@pytest.mark.parametrize("dtype", FLOATS)
def test_star(backend, dtype):
    head = make_head(3, tokens=20, rows=2, inner=80, gated=False, dtype=dtype, device=backend.device)
    clear = head.far_from_ties(0.01)
    arguments = (head.x, head.router, head.w_up, head.w_down)
    plain = reference.draft_moe_star(*arguments, compute_dtype=dtype)
    for a, b, c in zip(head.star(), reference.draft_moe_star(*arguments), plain, strict=True):
        judge(a[clear], b[clear], c[clear])


def test_the_published_maths():
    """The formulas as the published layer writes them, expert by expert."""
    head = make_head(4, dtype=torch.float64, tokens=9)
    logits = F.linear(head.x, head.router)
    yields = [
        F.linear(F.silu(F.linear(head.x, head.w_gate[e])) * F.linear(head.x, head.w_up[e]), head.w_down[e])
        for e in range(2)
    ]
    a, b = logits[:, :2].softmax(-1), logits[:, 2:].softmax(-1)
    sign = torch.where(logits[:, 2] > logits[:, 3], 1.0, -1.0)[:, None]
    first, second = head.run(contrast=True)
    assert torch.allclose(first, a[:, :1] * yields[0] + a[:, 1:] * yields[1], atol=1e-12)
    assert torch.allclose(second, sign * (b[:, :1] * yields[0] - b[:, 1:] * yields[1]), atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sign_at_ties(backend, dtype):
    head = make_head(5, dtype=dtype, device=backend.device)
    head.router[3] = head.router[2]
    _, tied = head.run(contrast=True)
    # a tie gives -1: as if the second row's logit were larger
    _, want = head.reference(contrast=True)
    judge(tied, want, head.reference(contrast=True, compute_dtype=dtype)[1])
    if dtype == torch.float32:
        return
    # logits that differ in fp32 and not once rounded are a tie as well
    one = torch.zeros_like(head.x[:1])
    one[0, 0], one[0, 1] = 1, torch.finfo(dtype).eps / 8
    head.router[2:] = 0
    head.router[2:, 0] = 1
    head.router[2, 1] = 1
    rounded_tie = draft_moe(one, *head.tensors()[1:], contrast=True)[1]
    assert float(one.double()[0] @ head.router.double()[2]) > 1
    head.router[2, 1] = 0
    assert_same_bits(rounded_tie.sign(), draft_moe(one, *head.tensors()[1:], contrast=True)[1].sign())


def test_nan_logits_of_the_contrast(backend):
    head = make_head(6, device=backend.device)
    head.router[2] = torch.nan
    first, second = head.run(contrast=True)
    assert first.isfinite().all()
    assert second.isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_do_not_depend_on_their_neighbours(backend, dtype):
    tokens = backend.pick(80, 40)
    head = make_head(7, tokens=tokens, dtype=dtype, device=backend.device)
    outputs = head.run(contrast=True)
    for kept in (1, 10, 17, 33):
        part = draft_moe(head.x[:kept], *head.tensors()[1:], contrast=True)
        for a, b in zip(part, outputs, strict=True):
            assert_same_bits(a, b[:kept])


def test_no_tokens(backend):
    head = make_head(8, tokens=0, device=backend.device)
    first, second = head.run(contrast=True)
    assert first.shape == second.shape == (0, 48)


def test_bad_input(backend):
    head = make_head(9, device=backend.device)
    x, router, *weights = head.tensors()

    def expect(message, *tensors, **options):
        with pytest.raises(ValueError, match=message):
            draft_moe(*tensors, **options)

    expect(r"expected router\.size\(0\) == E \+ 2 \(4\), got 3", x, router[:3], *weights)
    expect("expected two experts, both chosen, got 2 experts, top_k 1", x, router, *weights, top_k=1)
    expect("expected variant in", x, router, *weights, variant="other")
    expect("Call draft_moe_star", x, router, *weights, variant="star")
    expect("expected top_k >= 2 with contrast", x, router, *weights, variant="topk", top_k=1, contrast=True)
    expect(r"expected residual\.size\(0\) == x\.size\(0\) \(5\), got 4", x, router, *weights, residual=x[:4])
    expect(
        "expected residual of dtype torch.float32, got torch.float64",
        x,
        router,
        *weights,
        residual=x.double(),
    )
    with pytest.raises(ValueError, match=r"expected router\.size\(0\) == 2 \(2\), got 4"):
        draft_moe_star(x, router, *weights[1:])


def test_opcheck(backend):
    head = make_head(10, residual=True, device=backend.device)
    options = {"contrast": True, "residual": head.options["residual"]}
    torch.library.opcheck(backend.ops().moe_draft.default, head.tensors(), options)


def test_compiles_in_one_graph(backend):
    head = make_head(11, device=backend.device)

    def step(*tensors):
        return draft_moe(*tensors, contrast=True)

    for a, b in zip(
        torch.compile(step, fullgraph=True)(*head.tensors()), head.run(contrast=True), strict=True
    ):
        assert_same_bits(a, b)
