"""tree_attention with out=: the same bits, written where the caller says."""

from __future__ import annotations

import pytest
import torch

from tests.tree.cases import assert_same_bits, make_case
from tranche.tree import Tree, tree_attention

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("page_size", [None, 16])
def test_the_same_bits(backend, dtype, page_size):
    case = make_case(
        1, nodes=9, lengths=(70, 5), n_nodes=(9, 4), dtype=dtype, page_size=page_size, device=backend.device
    )
    want, want_lse = case.run(return_lse=True)
    out = torch.full_like(want, torch.nan)
    assert case.run(out=out) is out
    assert_same_bits(out, want)
    out.fill_(torch.nan)
    result, lse = case.run(return_lse=True, out=out)
    assert result is out
    assert_same_bits(out, want)
    assert_same_bits(lse, want_lse)


def test_fp64_on_the_cpu():
    case = make_case(2, dtype=torch.float64)
    out = torch.full_like(case.q, torch.nan)
    case.run(out=out)
    assert_same_bits(out, case.run())


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_strides(backend, dtype):
    case = make_case(3, nodes=9, lengths=(70, 5), n_nodes=(9, 4), dtype=dtype, device=backend.device)
    want = case.run()
    turned = torch.full((2, 4, 9, 64), torch.nan, dtype=dtype, device=backend.device).transpose(1, 2)
    assert_same_bits(case.run(out=turned), want)
    frame = torch.full((2, 9, 4, 70), 7.0, dtype=dtype, device=backend.device)
    case.run(out=frame[..., 3:67])
    assert_same_bits(frame[..., 3:67], want)
    assert (frame[..., :3] == 7).all()
    assert (frame[..., 67:] == 7).all()


@pytest.mark.parametrize(("batch", "nodes"), [(0, 4), (2, 0)])
def test_empty(backend, batch, nodes):
    case = make_case(4, lengths=(12,) * batch, nodes=nodes, device=backend.device)
    out = torch.empty_like(case.q)
    assert case.run(out=out) is out


def test_bad_out(backend):
    case = make_case(5, nodes=4, lengths=(20, 3), device=backend.device)

    def expect(message, out):
        with pytest.raises(ValueError, match=r"tranche\.tree_attention: expected " + message):
            case.run(out=out)

    good = torch.empty_like(case.q)
    expect("out of dtype torch.float32, got torch.float16. Convert", good.half())
    expect(r"out of shape \[B, N, Hq, D\], got \[4, 4, 64\]", good[0])
    expect(r"out\.size\(1\) == q\.size\(1\) \(4\), got 3\. Allocate it with torch\.empty_like", good[:, :3])
    expect(r"out\.stride\(-1\) == 1, got 4", good.transpose(2, 3).contiguous().transpose(2, 3))
    expect("out whose rows lie apart, got stride 0 in dimension 0", good[:1].expand(2, 4, 4, 64))


def test_versions_go_up(backend):
    case = make_case(6, lengths=(20, 3), device=backend.device)
    out = torch.empty_like(case.q)
    before = out._version
    case.run(out=out)
    assert out._version == before + 1
    with torch.inference_mode():
        inside = torch.empty_like(case.q)
        case.run(out=inside)
        assert_same_bits(inside, out)


def test_an_overwritten_tensor_cannot_be_differentiated_through(backend):
    case = make_case(7, lengths=(20, 3), device=backend.device)
    weight = torch.ones_like(case.q, requires_grad=True)
    out = torch.ones_like(case.q)
    loss = (weight * out).sum()
    case.run(out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_gradients(backend):
    case = make_case(8, lengths=(20, 3), device=backend.device)
    out = torch.empty_like(case.q)
    case.q.requires_grad_()
    with pytest.raises(RuntimeError, match=r"expected tensors that do not require grad, got q that does"):
        case.run(out=out)
    with torch.no_grad():
        want = case.run()
        case.run(out=out)
    assert_same_bits(out, want)
    case.q.requires_grad_(False)
    with pytest.raises(RuntimeError, match="got out"):
        case.run(out=torch.empty_like(case.q).requires_grad_())


def test_opcheck(backend):
    case = make_case(9, lengths=(30, 3), page_size=16, device=backend.device)
    arguments = (
        case.q,
        case.k,
        case.v,
        case.seqlens,
        case.tree.ancestors,
        case.tree.depth,
        case.tree.n_nodes,
    )
    op = backend.ops().tree_attention_out.default
    options = {
        "block_table": case.options["block_table"],
        "return_lse": True,
        "out": torch.empty_like(case.q),
    }
    torch.library.opcheck(op, arguments, options)


def test_compiles_in_one_graph(backend):
    case = make_case(10, lengths=(30, 3), device=backend.device)

    def step(q, k, v, seqlens, parents, out):
        result, lse = tree_attention(q, k, v, seqlens, Tree.from_parent(parents), return_lse=True, out=out)
        return result + 1, lse

    arguments = (case.q, case.k, case.v, case.seqlens, case.tree.parent)
    out = torch.full_like(case.q, torch.nan)
    shifted, lse = torch.compile(step, fullgraph=True)(*arguments, out)
    want, want_lse = case.run(return_lse=True)
    assert_same_bits(out, want)
    assert_same_bits(shifted, want + 1)
    assert_same_bits(lse, want_lse)
