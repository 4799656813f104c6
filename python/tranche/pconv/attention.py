"""PartialNet's partial attention convolutions (arXiv 2502.01303): cheap attention on what a partial convolution leaves.

Submodules, parameters and buffers have the published names, so that published checkpoints load.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tranche.pconv.modules import PartialConv
from tranche.pconv.ops import channel_stats, conv2d_slice

# iRPE's piecewise index (arXiv 2107.14222, equation 18): distances up to ALPHA have an entry each, farther ones share
# entries logarithmically, and all beyond GAMMA the last one.
ALPHA, BETA, GAMMA = 20, 40, 160


def distance_index(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Which entry of the bias table each pair of pixels takes: [HW, HW], int64, in [BETA, 2 * BETA].

    With d the Euclidean distance of the two pixels, rounded: BETA + d up to ALPHA, and beyond
    BETA + min(BETA, round(ALPHA + (BETA - ALPHA) * ln(d / ALPHA) / ln(GAMMA / ALPHA))).
    """
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    distance = (rows[:, None].square() + columns.square()).float().sqrt().round()
    far = ALPHA + torch.log(distance.clamp(min=ALPHA) / ALPHA) / math.log(GAMMA / ALPHA) * (BETA - ALPHA)
    entry = BETA + torch.where(distance <= ALPHA, distance, far.round().clamp(max=BETA)).long()
    apart_rows, apart_columns = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
    return entry[apart_rows[:, None, :, None], apart_columns[:, None, :]].flatten(2).flatten(0, 1)


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation of the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape, channels_last."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StyleGate(nn.Module):
    """A gate per image and channel: hardsigmoid(BN(W_m mean + W_s std)), W dense (SRM, arXiv 1903.10829)."""

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.cfc1 = nn.Conv2d(channels, channels, (1, 2), bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(channels, device=device, dtype=dtype)

    def forward(self, mean: Tensor, std: Tensor) -> Tensor:
        """[B, C'] each to [B, C'].

        Raises:
            ValueError: one image in training mode.
        """
        if self.bn.training and mean.size(0) == 1:
            raise ValueError(
                "tranche.PATChannel: expected x.size(0) >= 2 in training mode, got 1. Its batch norm sees one value "
                "per image and channel, and has no variance over one image; use a larger batch, or eval()."
            )
        return F.hardsigmoid(self.bn(self.cfc1(torch.stack([mean, std], dim=-1)[:, :, None]))).flatten(1)


def _require_untouched(module: PartialConv) -> None:
    if module.dim_untouched == 0:
        raise ValueError(
            f"tranche.{type(module).__name__}: expected n_div >= 2, got 1. Nothing is left to attend; use PartialConv."
        )


def _convolved(module: PartialConv, x: Tensor) -> Tensor:
    """The channels that the module convolves, [B, c, H, W]; of the others `torch.cat` makes the one copy."""
    conv: Any = module.partial_conv3
    return conv2d_slice(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class PATChannel(PartialConv):
    """PAT_ch: x[:, :c] is convolved, the rest is gated by its own statistics and normalised.

        y = cat(conv(x1), BN(g * x2)),   g = hardsigmoid(BN(W_m mean(x2) + W_s std(x2)))

    mean and unbiased std are over the pixels of an image and channel. Constructed as `PartialConv`.
    """

    def __init__(
        self,
        dim: int,
        n_div: int = 4,
        kernel_size: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, n_div, kernel_size, device=device, dtype=dtype)
        _require_untouched(self)
        self.attn = StyleGate(self.dim_untouched, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(self.dim_untouched, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] with at least two pixels to the same shape.

        Raises:
            ValueError: images of one pixel, which have no standard deviation; or B = 1 in training mode.
        """
        if x.size(2) * x.size(3) < 2:
            raise ValueError(
                f"tranche.PATChannel: expected images of at least 2 pixels, got {tuple(x.shape[2:])}: one pixel has no "
                "standard deviation. Use larger inputs, or fewer stages."
            )
        gate = self.attn(*channel_stats(x, self.dim_conv3))
        untouched = x[:, self.dim_conv3 :] * gate[:, :, None, None]
        return torch.cat([_convolved(self, x), self.norm(untouched)], dim=1)


class DistanceBias(nn.Module):
    """A learned table of biases per head and distance; with its zeros it is no bias."""

    def __init__(
        self, num_heads: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.lookup_table_bias = nn.Parameter(
            torch.zeros(num_heads, 2 * BETA + 1, device=device, dtype=dtype)
        )

    def forward(self, height: int, width: int) -> Tensor:
        """The additive mask [heads, HW, HW]."""
        return self.lookup_table_bias[:, distance_index(height, width, self.lookup_table_bias.device)]


class DistanceAttention(nn.Module):
    """Multi-head self-attention over the pixels with a bias by distance, which does not depend on the query.

    softmax(q k^T / sqrt(d) + table[round(distance)]) v, and a projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"tranche.PATSelf: expected a multiple of num_heads ({num_heads}) of untouched channels, got "
                f"{dim}. Choose another num_heads or n_div."
            )
        self.num_heads, self.attn_drop, self.proj_drop = num_heads, attn_drop, proj_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.rpe_k: nn.Module = DistanceBias(num_heads, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C', H, W] to the same shape, channels_last."""
        batch, channels, height, width = x.shape
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        heads = self.qkv(tokens).view(batch, height * width, 3, self.num_heads, channels // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        drop = self.attn_drop if self.training else 0.0
        mask = self.rpe_k(height, width).to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], dropout_p=drop)
        out = F.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), self.proj_drop, self.training)
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


class PATSelf(PartialConv):
    """PAT_sf: x[:, :c] is convolved, the rest attends to itself: y = cat(conv(x1), attention(LN(x2))).

    Args:
        dim, n_div, kernel_size: as `PartialConv` takes them.
        num_heads: heads of the attention; it divides dim - dim // n_div.
        attn_drop, proj_drop: dropout of the attention's weights and outputs, in training.
    """

    def __init__(
        self,
        dim: int,
        n_div: int = 4,
        kernel_size: int = 3,
        *,
        num_heads: int = 4,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, n_div, kernel_size, device=device, dtype=dtype)
        _require_untouched(self)
        self.attn = DistanceAttention(
            self.dim_untouched, num_heads, attn_drop, proj_drop, device=device, dtype=dtype
        )
        self.norm = LayerNorm2d(self.dim_untouched, eps=1e-6, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], of any H and W, to the same shape."""
        return torch.cat([_convolved(self, x), self.attn(self.norm(x[:, self.dim_conv3 :]))], dim=1)


class PATSpatial(nn.Module):
    """PAT_sp: one half of the channels is gated pixel by pixel, the other goes through a 1x1 convolution.

    a, b = split(x, [C - C // 2, C // 2]);   y = cat(BN(a * hardsigmoid(w_a . a)), W_c BN(b))
    """

    def __init__(
        self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        convolved, gated = dim // 2, dim - dim // 2
        self.conv = nn.Conv2d(convolved, convolved, 1, bias=False, device=device, dtype=dtype)
        self.conv_attn = nn.Conv2d(gated, 1, 1, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(gated, device=device, dtype=dtype)
        self.norm2 = nn.BatchNorm2d(convolved, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        gated, convolved = x.split([self.norm.num_features, self.norm2.num_features], dim=1)
        gated = self.norm(gated * F.hardsigmoid(self.conv_attn(gated)))
        return torch.cat([gated, self.conv(self.norm2(convolved))], dim=1)
