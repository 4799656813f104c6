"""merge_state: merging attention over a sharded cache."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.tree.cases import assert_same_bits, make_case
from tranche.tree import merge_state, reference, tree_attention

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
INF = torch.inf


def sides(dtype, device, shape=(2, 5, 3), head_dim=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outs = [torch.randn(*shape, head_dim, generator=generator).to(dtype).to(device) for _ in range(2)]
    lses = [(4 * torch.randn(shape, generator=generator)).to(device) for _ in range(2)]
    return outs[0], lses[0], outs[1], lses[1]


def assert_near(arguments):
    out, lse = merge_state(*arguments)
    dtype = arguments[0].dtype
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    expected, expected_lse = reference.merge_state(*arguments)
    plain, plain_lse = reference.merge_state(*arguments, compute_dtype=dtype)
    for got, theirs, want, eps in (
        (out, plain, expected, torch.finfo(dtype).eps),
        (lse, plain_lse.float(), expected_lse, torch.finfo(torch.float32).eps),
    ):
        if want.numel():
            yardstick = (theirs.double() - want).abs().max()
            assert (got.double() - want).abs().max() <= 2 * yardstick + eps * want.abs().max()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [1, 32, 33, 80, 128, 256])
def test_reference(backend, dtype, head_dim):
    assert_near(sides(dtype, backend.device, head_dim=head_dim))


def test_fp64_on_the_cpu():
    arguments = sides(torch.float64, "cpu")
    for got, want in zip(merge_state(*arguments), reference.merge_state(*arguments), strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=1e-6 if got.dtype == torch.float32 else 1e-13, atol=1e-7
        )
    torch.testing.assert_close(
        merge_state(*arguments)[0], reference.merge_state(*arguments)[0], rtol=1e-13, atol=1e-14
    )


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (1, 1, 1)])
def test_small_and_empty(backend, shape):
    arguments = sides(torch.float32, backend.device, shape)
    assert merge_state(*arguments)[0].shape == (*shape, 64)
    assert_near(arguments)


def test_many_rows(backend):
    assert_near(sides(torch.bfloat16, backend.device, backend.pick((4, 60, 32), (1, 9, 3))))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_side_that_saw_nothing_leaves_the_other_as_it_is(backend, dtype):
    out_a, lse_a, out_b, lse_b = sides(dtype, backend.device)
    out_b.view(torch.int32 if dtype == torch.float32 else torch.int16)[
        0, 0, 0, :3
    ] = -1  # NaN with bits of its own
    lse_a.fill_(-INF)
    out_a.fill_(torch.nan)
    for arguments in ((out_a, lse_a, out_b, lse_b), (out_b, lse_b, out_a, lse_a)):
        out, lse = merge_state(*arguments)
        assert_same_bits(out, out_b)
        assert_same_bits(lse, lse_b)
    out, lse = merge_state(out_a, lse_a, out_b, torch.full_like(lse_b, -INF))
    assert_same_bits(out, torch.zeros_like(out_b))
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_exchanging_the_sides_changes_no_bit(backend, dtype):
    specials = [-INF, INF, torch.nan, 0.0, 3.5, -200.0]
    out_a, lse_a, out_b, lse_b = sides(dtype, backend.device, (1, len(specials) ** 2, 2))
    for i, (a, b) in enumerate(itertools.product(specials, specials)):
        lse_a[0, i, 0], lse_b[0, i, 0] = a, b
    out_a[0, :, 0, 0], out_b[0, :, 0, 1] = torch.nan, INF
    forth, back = merge_state(out_a, lse_a, out_b, lse_b), merge_state(out_b, lse_b, out_a, lse_a)
    assert_same_bits(forth[0], back[0])
    assert_same_bits(forth[1], back[1])


def test_infinite_and_nan_logarithms(backend):
    out_a, lse_a, out_b, lse_b = sides(torch.float32, backend.device, (1, 3, 1))
    lse_a[0, :, 0] = torch.tensor([INF, torch.nan, 1.0])
    out, lse = merge_state(out_a, lse_a, out_b, lse_b)
    assert out[0, :2].isnan().all()
    assert out[0, 2].isfinite().all()
    assert lse[0, 0, 0] == INF
    assert lse[0, 1, 0].isnan()


def test_strides_change_no_bit(backend):
    out_a, lse_a, out_b, lse_b = sides(torch.bfloat16, backend.device)
    want = merge_state(out_a, lse_a, out_b, lse_b)
    turned = out_a.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(*out_b.shape[:3], 70, dtype=out_b.dtype, device=out_b.device)[..., 3:67]
    wide.copy_(out_b)
    got = merge_state(turned, lse_a, wide, lse_b)
    assert_same_bits(got[0], want[0])
    assert_same_bits(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_in_two_parts(backend, dtype):
    """Committed tokens in one part; the nodes, and whatever is left, in the other."""
    case = make_case(
        1, nodes=9, lengths=(40, 40), n_nodes=(9, 4), dtype=dtype, head_dim=32, device=backend.device
    )
    cut = 24
    scores = (
        torch.einsum("bnhd,bshd->bnhs", case.q.double(), case.k[:, :cut].double().repeat_interleave(2, 2))
        * 32**-0.5
    )
    values = case.v[:, :cut].double().repeat_interleave(2, 2)
    far = torch.einsum("bnhs,bshd->bnhd", scores.softmax(-1), values).to(dtype), scores.logsumexp(-1).float()
    near = tree_attention(
        case.q, case.k[:, cut:], case.v[:, cut:], case.seqlens - cut, case.tree, return_lse=True
    )
    used = torch.arange(9, device=backend.device) < case.tree.n_nodes[:, None]
    want, want_lse = case.reference(return_lse=True)
    out, lse = merge_state(*far, *near)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out[used].double(), want[used], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse[used].double(), want_lse[used], rtol=0, atol=1e-5)


def test_gradients(backend):
    if backend.name == "cpu":
        out_a, lse_a, out_b, lse_b = sides(torch.float64, "cpu", (1, 3, 2), 4)
        lse_a[0, 0, 0] = lse_b[0, 0, 1] = -INF
        inputs = (out_a.requires_grad_(), out_b.requires_grad_())
        assert torch.autograd.gradcheck(lambda a, b: merge_state(a, lse_a, b, lse_b)[0], inputs)
    arguments = [t.requires_grad_() for t in sides(torch.float32, backend.device)]
    wide = [t.detach().double().requires_grad_() for t in arguments]
    results, expected = merge_state(*arguments), reference.merge_state(*wide)
    directions = [torch.randn_like(t) for t in results]
    got = torch.autograd.grad(results, arguments, directions)
    want = torch.autograd.grad(expected, wide, [t.double() for t in directions])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_opcheck_and_compile(backend):
    arguments = sides(torch.bfloat16, backend.device)
    torch.library.opcheck(backend.ops().tree_merge_state.default, arguments)
    compiled = torch.compile(merge_state, fullgraph=True)
    for got, want in zip(compiled(*arguments), merge_state(*arguments), strict=True):
        assert_same_bits(got, want)


def test_bad_arguments(backend):
    out_a, lse_a, out_b, lse_b = sides(torch.float32, backend.device)

    def expect(message, *arguments):
        with pytest.raises(ValueError, match=r"tranche\.tree_merge_state: expected " + message):
            merge_state(*arguments)

    expect(r"out_a of shape \[B, N, Hq, D\]", out_a[0], lse_a, out_b, lse_b)
    expect(
        "out_a of dtype torch.float32 or torch.float16 or torch.bfloat16", out_a.int(), lse_a, out_b, lse_b
    )
    expect("out_b of dtype torch.float32, got torch.float16", out_a, lse_a, out_b.half(), lse_b)
    expect(r"out_b\.size\(1\) == out_a\.size\(1\) \(5\), got 4", out_a, lse_a, out_b[:, :4], lse_b)
    expect(r"lse_a of shape \[B, N, Hq\] = \[2, 5, 3\]", out_a, lse_a[:1], out_b, lse_b)
    expect("lse_b of dtype torch.float32, got torch.float64", out_a, lse_a, out_b, lse_b.double())
    expect(
        r"out_a\.stride\(-1\) == 1", out_a.transpose(2, 3).contiguous().transpose(2, 3), lse_a, out_b, lse_b
    )
