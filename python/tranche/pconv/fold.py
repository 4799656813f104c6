"""PartialNet for inference: batch norms and gates folded into the weights, a block one call of `partial_mlp`.

With h the hidden pixels, s and t the scale and shift of a batch norm in evaluation:

    BN1(W1 cat(v, s x2 g + t)) = s1 W1 cat(v, s g x2) + (s1 W1b t + t1)          v = conv(x1), g per image and channel
    cat(BN(a q), W_c BN2(b)) = cat(q s W2a h, W_c s2 W2b h) + cat(t, W_c t2)      q = hardsigmoid(w_a W2a h) per pixel

All of it is computed in float64 and rounded once.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tranche.pconv.attention import PATChannel, PATSelf, PATSpatial, StyleGate
from tranche.pconv.dynamic import DPConv
from tranche.pconv.modules import PartialConv
from tranche.pconv.ops import (
    channel_gate,
    conv2d_pack,
    conv2d_slice,
    partial_attention,
    partial_conv2d,
    partial_mlp,
    partial_mlp_pack,
)
from tranche.pconv.packed import KeepsPacked
from tranche.pconv.partialnet import PartialBlock, PartialNet, PatchEmbed, PatchMerging


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation, float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _kept(value: Tensor, like: Tensor) -> Tensor:
    """Its own copy without gaps, in the dtype of `like`."""
    return value.to(like.dtype).clone(memory_format=torch.contiguous_format)


def _buffers(module: nn.Module, *names: str) -> tuple[Any, ...]:
    """Buffers from where a module keeps them: as attributes each takes half a microsecond, ten a small layer's time."""
    kept = module._buffers
    return tuple([kept[name] for name in names])


class FoldedConv(KeepsPacked):
    """A convolution of the first channels, one `conv2d_slice`; in channels_last."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, c_out, H', W']."""
        weight, bias = _buffers(self, "weight", "bias")
        packed = self.packed(conv2d_pack, weight, bias, stride=self.stride)
        x = x.contiguous(memory_format=torch.channels_last)
        return conv2d_slice(x, weight, bias, self.stride, self.padding, packed=packed)


class FoldedLinear(FoldedConv):
    """A linear layer on the same kernel, its rows images of one pixel: few rows lose less than in torch's products."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight[:, :, None, None], bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n] or [B, n, 1, 1] to [B, m]."""
        if torch.compiler.is_compiling():  # a graph is to say what this is
            return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)
        return super().forward(x if x.dim() == 4 else x[:, :, None, None]).flatten(1)


def _conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> FoldedConv:
    """A convolution with bias that is the two together."""
    scale, shift = _affine(norm)
    weight = conv.weight.double() * scale[:, None, None, None]
    bias = shift if conv.bias is None else shift + scale * conv.bias.double()
    return FoldedConv(_kept(weight, conv.weight), _kept(bias, conv.weight), conv.stride[0])


def _linear(layer: nn.Module) -> nn.Module:
    """A linear layer, or a 1x1 convolution of one pixel, as such; any other module as it is."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return layer
    weight, bias = layer.weight.detach().flatten(1), layer.bias
    return FoldedLinear(_kept(weight, weight), None if bias is None else _kept(bias.detach(), weight))


class FoldedGate(nn.Module):
    """The gate of PAT_ch, one `channel_gate` of the untouched channels."""

    weight: Tensor
    bias: Tensor

    def __init__(self, gate: StyleGate, start: int) -> None:
        super().__init__()
        scale, shift = _affine(gate.bn)
        dense = gate.cfc1.weight
        both = dense.double().flatten(1, 2).movedim(2, 1).flatten(1) * scale[:, None]
        self.register_buffer("weight", _kept(both, dense))
        self.register_buffer("bias", _kept(shift, dense))
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C - start]."""
        return channel_gate(x, self.start, *_buffers(self, "weight", "bias"))


class FoldedBlock(KeepsPacked):
    """A block in evaluation: y = x + mlp(cat(conv(x1), g * x2)), one call of `partial_mlp`.

    Its tensors are buffers: a folded model is for inference.
    """

    conv_weight: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    spatial_weight: Tensor | None

    def __init__(self, block: PartialBlock) -> None:
        super().__init__()
        mixing: Any = block.spatial_mixing
        mlp: list[Any] = list(block.mlp)
        like = mlp[0].weight
        self.activation = "gelu" if isinstance(mlp[2], nn.GELU) else "relu"

        scale, shift = _affine(mlp[1])
        w1 = mlp[0].weight.double().flatten(1)
        b1 = torch.zeros_like(shift)
        self.gate: FoldedGate | None = None
        if isinstance(mixing, PATChannel):
            self.gate = FoldedGate(mixing.attn, mixing.dim_conv3)
            untouched_scale, untouched_shift = _affine(mixing.norm)
            b1 = w1[:, mixing.dim_conv3 :] @ untouched_shift
            w1 = torch.cat([w1[:, : mixing.dim_conv3], w1[:, mixing.dim_conv3 :] * untouched_scale], dim=1)
        w1, b1 = scale[:, None] * w1, scale * b1 + shift

        w2 = mlp[3].weight.double().flatten(1)
        b2, spatial = w2.new_zeros(w2.size(0)), None
        if len(mlp) == 5:
            w2, b2, spatial = _spatial(mlp[4], w2)

        self.register_buffer("conv_weight", _kept(self._conv_weight(mixing), like))
        for name, value in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
            self.register_buffer(name, _kept(value, like))
        self.register_buffer("spatial_weight", None if spatial is None else _kept(spatial, like))

    def _conv_weight(self, mixing: nn.Module) -> Tensor:
        if isinstance(mixing, DPConv):
            mixing = mixing.freeze()
        assert isinstance(mixing, PartialConv)
        return mixing.partial_conv3.weight

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        *weights, spatial_weight = _buffers(self, "conv_weight", "w1", "b1", "w2", "b2", "spatial_weight")
        gate = self.gate
        return partial_mlp(
            x,
            *weights,
            activation=self.activation,
            gate=None if gate is None else gate(x),
            spatial_weight=spatial_weight,
            packed=self.packed(partial_mlp_pack, *weights),
        )


def _spatial(module: PATSpatial, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second 1x1 convolution with PAT_sp: its weight and bias, and the row of the gate, before its shift."""
    first = module.norm.num_features
    gated_scale, gated_shift = _affine(module.norm)
    convolved_scale, convolved_shift = _affine(module.norm2)
    dense = module.conv.weight.double().flatten(1)
    weight = torch.cat([gated_scale[:, None] * w2[:first], dense @ (convolved_scale[:, None] * w2[first:])])
    return (
        weight,
        torch.cat([gated_shift, dense @ convolved_shift]),
        module.conv_attn.weight.double().flatten() @ w2[:first],
    )


class KeptBias(nn.Module):
    """The mask of `DistanceBias` for images of the size seen last, kept; while tracing it is computed and not kept."""

    mask: Tensor

    def __init__(self, bias: nn.Module) -> None:
        super().__init__()
        self.bias, self.size = bias, (0, 0)
        self.register_buffer("mask", bias(0, 0), persistent=False)

    def forward(self, height: int, width: int) -> Tensor:
        """[heads, HW, HW]."""
        if torch.compiler.is_compiling():
            return self.bias(height, width)
        if (height, width) != self.size:
            with torch.inference_mode(False), torch.no_grad():
                self.mask, self.size = self.bias(height, width), (height, width)
        return self.mask

    def _load_from_state_dict(self, *args: Any) -> None:
        self.size = (0, 0)
        super()._load_from_state_dict(*args)


def _pack_self(
    conv_weight: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        conv2d_pack(conv_weight),
        conv2d_pack(qkv_weight[:, :, None, None], qkv_bias),
        conv2d_pack(proj_weight[:, :, None, None], proj_bias),
    )


class FoldedSelf(KeepsPacked):
    """PAT_sf and its residual: z = x + cat(conv(x1), attention(LN(x2))), a `partial_conv2d` and a `partial_attention`.

    The residual of x1 is in the convolution's weight; the norm's weight and bias are in those of q, k and v.
    """

    conv_weight: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor

    def __init__(self, mixing: PATSelf) -> None:
        super().__init__()
        attention, norm, like = mixing.attn, mixing.norm, mixing.partial_conv3.weight
        weight = like.double().clone()
        self.padding = weight.size(-1) // 2
        eye = torch.eye(weight.size(0), dtype=weight.dtype, device=weight.device)
        weight[:, :, self.padding, self.padding] += eye
        qkv = attention.qkv.weight.double()
        qkv_bias = qkv @ norm.bias.double()
        if attention.qkv.bias is not None:
            qkv_bias = qkv_bias + attention.qkv.bias.double()
        self.register_buffer("conv_weight", _kept(weight, like))
        self.register_buffer("qkv_weight", _kept(qkv * norm.weight.double(), like))
        self.register_buffer("qkv_bias", _kept(qkv_bias, like))
        self.register_buffer("proj_weight", _kept(attention.proj.weight, like))
        self.register_buffer("proj_bias", _kept(attention.proj.bias, like))
        self.start, self.num_heads, self.eps = mixing.dim_conv3, attention.num_heads, norm.eps
        self.rpe_k = KeptBias(attention.rpe_k)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        conv_weight, qkv_weight, qkv_bias, proj_weight, proj_bias = _buffers(
            self, "conv_weight", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias"
        )
        weights = qkv_weight, qkv_bias, proj_weight, proj_bias
        packed = self.packed(_pack_self, conv_weight, *weights)
        conv, qkv, proj = (None, None, None) if packed is None else packed
        z = partial_conv2d(x, conv_weight, padding=self.padding, packed=conv)
        mask = self.rpe_k(x.size(2), x.size(3))
        return partial_attention(
            z, self.start, *weights, mask, self.num_heads, eps=self.eps, qkv_packed=qkv, proj_packed=proj
        )


class FoldedSelfBlock(FoldedBlock):
    """A block with PAT_sf: z = x + cat(conv(x1), attention(LN(x2))), y = z + mlp(z).

    The second residual is of z, which `partial_mlp` gives for a convolution of one channel that changes nothing.
    """

    def __init__(self, block: PartialBlock) -> None:
        super().__init__(block)
        assert isinstance(block.spatial_mixing, PATSelf)
        self.mixing = FoldedSelf(block.spatial_mixing)

    def _conv_weight(self, mixing: nn.Module) -> Tensor:
        assert isinstance(mixing, PATSelf)
        unchanged = torch.zeros_like(mixing.partial_conv3.weight[:1, :1])
        unchanged[:, :, unchanged.size(2) // 2, unchanged.size(3) // 2] = 1
        return unchanged

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        return super().forward(self.mixing(x))


# Where the first stage's activations are more, it and others take a batch in pieces of half as much, or one image.
WHOLE_BYTES = 16 << 20


class FoldedNet(PartialNet):
    """A `PartialNet` of folded parts. On the CPU the stages whose activations are large take a batch in pieces.

    Those stay in the last cache, and the allocator uses their memory again: large ones it gives back to the system, and
    gets page by page as zeros. The other stages take the batch whole, and read their weights once. `stages` itself is
    then not called, only its parts are.
    """

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to the last stage's [B, num_features, H', W']."""
        if torch.compiler.is_compiling() or not x.is_cpu or x.dim() != 4:
            return super().forward_features(x)
        self._check_input(x)
        plane = x.numel() // self.in_chans * x.element_size()
        sizes = [plane * stage["num_chs"] // stage["reduction"] ** 2 for stage in self.feature_info]
        if sizes[0] <= WHOLE_BYTES:
            return super().forward_features(x)
        first = 2 * sum(2 * size > WHOLE_BYTES for size in sizes)  # a stage each, and what reduces its result
        pieces = x.chunk(-(-2 * sizes[0] // WHOLE_BYTES))
        early, late = self.stages[:first], self.stages[first:]
        return late(torch.cat([early(self.patch_embed(piece)) for piece in pieces]))


def _folded(module: nn.Module) -> nn.Module | None:
    if isinstance(module, PartialBlock):
        return (FoldedSelfBlock if isinstance(module.spatial_mixing, PATSelf) else FoldedBlock)(module)
    if isinstance(module, PatchEmbed):
        return _conv_norm(module.proj, module.norm)
    if isinstance(module, PatchMerging):
        return _conv_norm(module.reduction, module.norm)
    return None


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """A new model for inference: what `model` computes in evaluation, with one `partial_mlp` for each `PartialBlock`.

    Batch norms and both gates are folded into weights, exactly but for rounding; no tensor is shared with `model`, and
    none requires grad. DPConv modules are folded at the ratio found. The result runs in channels_last and keeps the
    methods of the model; it is not for training, and its state dict has other keys.

    Args:
        model: a `PartialNet`, or any module that holds `PartialBlock`s.

    Raises:
        ValueError: a batch norm without running statistics.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is None:
            raise ValueError(
                f"tranche.pconv.fold: expected batch norms with running statistics, got {name} without. Build it with "
                "track_running_stats=True."
            )
    folded = copy.deepcopy(model).eval()
    whole = _folded(folded)
    if whole is not None:
        return whole.eval().requires_grad_(False)
    for path, module in list(folded.named_modules()):
        replacement = _folded(module)
        if replacement is not None:
            folded.set_submodule(path, replacement)
    if type(folded) is PartialNet:  # a class of its own may do something else
        folded.__class__ = FoldedNet
        if not folded.features_only:
            folded.avgpool_pre_head[1] = _linear(folded.avgpool_pre_head[1])
            folded.head = _linear(folded.head)
    return folded.eval().requires_grad_(False)
