"""The three attentions of PartialNet against their equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.pconv.networks import randomise
from tranche.pconv import PartialBlock, PartialConv, PATChannel, PATSelf, PATSpatial
from tranche.pconv.attention import distance_index


def test_distance_index():
    index = distance_index(7, 5)
    assert index.shape == (35, 35) and torch.equal(index, index.T)
    for (i, j), (k, m) in [((0, 0), (0, 0)), ((0, 0), (6, 4)), ((2, 1), (5, 0)), ((6, 0), (0, 1))]:
        assert index[i * 5 + j, k * 5 + m] == 40 + round(math.hypot(i - k, j - m))


def test_distance_index_far_away():
    """Past 20 logarithmically, and from 160 on one entry; a line of pixels has every distance."""
    row = distance_index(1, 300)[0]
    assert row[:21].tolist() == list(range(40, 61))
    for distance in (21, 25, 40, 80, 159):
        want = 20 + 20 * math.log(distance / 20) / math.log(8)
        assert row[distance] == 40 + round(want)
    assert (row[160:] == 80).all() and (row.diff() >= 0).all()


def test_channel_attention(backend):
    module = randomise(PATChannel(20, 4)).to(backend.device).eval()
    x = torch.randn(3, 20, 5, 6, device=backend.device)
    rest = x[:, 5:]
    weight, bn = module.attn.cfc1.weight[:, :, 0], module.attn.bn

    def normed(z, norm):
        shape = (1, -1) + (1,) * (z.dim() - 2)
        scaled = (z - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
        return scaled * norm.weight.view(shape) + norm.bias.view(shape)

    z = rest.mean((2, 3)) @ weight[..., 0].T + rest.flatten(2).std(2) @ weight[..., 1].T
    gate = (normed(z, bn) / 6 + 0.5).clamp(0, 1)
    want = torch.cat(
        [
            F.conv2d(x[:, :5], module.partial_conv3.weight, padding=1),
            normed(rest * gate[:, :, None, None], module.norm),
        ],
        dim=1,
    )
    torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5)


def test_self_attention(backend):
    module = randomise(PATSelf(16, 4)).to(backend.device).eval()
    x = torch.randn(2, 16, 3, 4, device=backend.device)
    rest = module.norm(x[:, 4:]).flatten(2).transpose(1, 2)
    q, k, v = module.attn.qkv(rest).view(2, 12, 3, 4, 3).permute(2, 0, 3, 1, 4)
    bias = module.attn.rpe_k.lookup_table_bias[:, distance_index(3, 4, x.device)]
    mixed = (q @ k.transpose(2, 3) * 3**-0.5 + bias).softmax(-1) @ v
    want = module.attn.proj(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).view(2, 12, 3, 4)
    torch.testing.assert_close(module(x)[:, 4:], want, rtol=1e-4, atol=1e-5)
    assert bias.abs().max() > 1


def test_the_bias_table_has_a_gradient():
    module = PATSelf(16, 4)
    module(torch.randn(2, 16, 3, 4)).square().sum().backward()
    gradient = module.attn.rpe_k.lookup_table_bias.grad
    assert gradient[:, 40:44].abs().min() > 0 and not gradient[:, :40].any() and not gradient[:, 45:].any()


def test_dropout_is_for_training_only():
    module = PATSelf(16, 4, attn_drop=0.5, proj_drop=0.5)
    x = torch.randn(2, 16, 3, 4)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("dim", [8, 9])
def test_spatial_attention(dim):
    module = randomise(PATSpatial(dim)).eval()
    x = torch.randn(2, dim, 4, 3)
    first = dim - dim // 2
    a, b = x[:, :first], x[:, first:]
    score = torch.einsum("c,bchw->bhw", module.conv_attn.weight.flatten(), a)
    want = torch.cat(
        [module.norm(a * F.hardsigmoid(score)[:, None]), F.conv2d(module.norm2(b), module.conv.weight)], dim=1
    )
    torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5)


def test_residuals():
    x = torch.randn(2, 16, 4, 4)
    for mixing in ("channel", "self", "plain"):
        block = randomise(PartialBlock(16, mixing)).eval()
        mixed = block.spatial_mixing(x)
        want = x + mixed + block.mlp(x + mixed) if mixing == "self" else x + block.mlp(mixed)
        torch.testing.assert_close(block(x), want)


def test_one_pixel_has_no_deviation():
    with pytest.raises(ValueError, match="at least 2 pixels"):
        PATChannel(8).eval()(torch.randn(2, 8, 1, 1))


def test_something_must_be_left_to_attend():
    for kind in (PATChannel, PATSelf):
        with pytest.raises(ValueError, match=f"{kind.__name__}: expected n_div >= 2"):
            kind(8, 1)
    assert type(PartialBlock(8, "channel", n_div=1).spatial_mixing) is PartialConv
