"""Ops reached past autograd's kernels: what autograd must still see, it sees."""

from __future__ import annotations

import pytest
import torch

from tranche.pconv import conv2d_slice, partial_conv2d, partial_conv2d_
from tranche.tree import Tree, tree_attention


def _arguments():
    return torch.randn(1, 8, 5, 5), torch.randn(2, 2, 3, 3)


def test_gradients_flow_where_they_are_wanted():
    x, weight = _arguments()
    weight.requires_grad_()
    for op in (partial_conv2d, conv2d_slice):
        assert op(x, weight, padding=1).requires_grad
        with torch.no_grad():
            assert not op(x, weight, padding=1).requires_grad


def test_function_transforms_are_refused_by_torch_and_not_ignored():
    x, weight = _arguments()
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: partial_conv2d(x, weight, padding=1).square().sum())(x)


def test_a_write_in_place_is_a_new_version():
    x, weight = _arguments()
    scale = torch.ones(1, requires_grad=True)
    kept = scale * x  # saves x for backward
    version = x._version
    partial_conv2d_(x, weight, padding=1)
    assert x._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_a_write_to_out_is_a_new_version():
    tree = Tree.chain(3, 1)
    q, cache = torch.randn(1, 3, 2, 64), torch.randn(1, 8, 2, 64)
    out, lengths = torch.empty_like(q), torch.tensor([4], dtype=torch.int32)
    version = out._version
    tree_attention(q, cache, cache, lengths, tree, out=out)
    assert out._version == version + 1
    assert torch.equal(out, tree_attention(q, cache, cache, lengths, tree))


def test_a_write_in_place_in_inference_mode():
    with torch.inference_mode():
        x, weight = _arguments()
        expected = partial_conv2d(x, weight, padding=1)
        partial_conv2d_(x, weight, padding=1)
        assert torch.equal(x, expected)
