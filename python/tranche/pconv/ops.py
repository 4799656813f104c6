"""Typed functions of the family; each calls the raw op behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tranche import _library

Pair = int | tuple[int, int] | list[int]


def _pair(value: Pair) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value, value]


def partial_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    start: int = 0,
    packed: Tensor | None = None,
) -> Tensor:
    """Convolves the channels [start, start + c) and passes the others through (FasterNet's PConv, arXiv 2303.03667).

    With P = [start, start + c): y[:, P] = conv2d(x[:, P], weight, bias, ...) and y elsewhere equals x bit for bit.
    The usual 3 x 3 of the first c channels: `partial_conv2d(x, weight, padding=1)`, weight [c, c, 3, 3].

    Args:
        x: [B, C, H, W], any strides; float32, float16 or bfloat16 (float64 on the CPU). Sums are float32 (float64).
        weight: [c, c / groups, kh, kw] of the same dtype.
        bias: [c] of the same dtype.
        stride, padding, dilation, groups: as `torch.nn.functional.conv2d` takes them, padding with zeros; together
            they must keep H and W.
        start: the first channel of the slice. It and c are values, not constants: changing them compiles nothing anew.
        packed: what `conv2d_pack` made of weight and bias, which are then not read: the same bits sooner.

    Returns:
        [B, C, H, W] in the memory format of x. Differentiable, twice too.

    Raises:
        ValueError: a wrong shape, dtype, device or number, or arguments that would change H, W or the channels; packed
            made of other weights or for another processor.
    """
    geometry = _pair(stride), _pair(padding), _pair(dilation)
    return _library.call("partial_conv2d", x, weight, bias, *geometry, groups, start, packed)


def partial_conv2d_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    start: int = 0,
    packed: Tensor | None = None,
) -> None:
    """As `partial_conv2d`, on x itself: the other channels are neither read nor written.

    Every output is computed from the old x, whatever the order of the work.

    Raises:
        ValueError: as `partial_conv2d`; or elements of x share memory with one another, with weight, bias or packed.
        RuntimeError: a tensor requires grad: the backward pass needs the x that is overwritten.
    """
    geometry = _pair(stride), _pair(padding), _pair(dilation)
    _library.call_inplace("partial_conv2d_", x, weight, bias, *geometry, groups, start, packed)


def conv2d_slice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    start: int = 0,
    packed: Tensor | None = None,
) -> Tensor:
    """conv2d(x[:, start : start + c], weight, ...) without a copy of the slice.

    Args:
        x: [B, C, H, W], as for `partial_conv2d`.
        weight: [c_out, c / groups, kh, kw]: any c_out, any stride.
        packed: what `conv2d_pack` made of weight and bias, which are then not read: the same bits sooner.

    Returns:
        [B, c_out, H', W'], channels_last where x is (and is not contiguous at the same time). Differentiable.

    Raises:
        ValueError: a wrong shape, dtype, device or number; packed made of other weights or for another processor.
    """
    geometry = _pair(stride), _pair(padding), _pair(dilation)
    return _library.call("conv2d_slice", x, weight, bias, *geometry, groups, start, packed)


def conv2d_pack(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """The weights of a convolution in the order in which the CPU kernel reads them, which else every call sets up.

    They serve x of any size, padding and `start`, and hold for this processor's instruction set: keep the weights, and
    make this anew wherever they are loaded. It does not follow changes of weight and bias.

    Args:
        weight, bias, stride, dilation, groups: as for `conv2d_slice`, `partial_conv2d` and `partial_conv2d_`.

    Returns:
        [bytes] uint8, opaque, for the argument `packed`; on CUDA, where weights are read as they lie, without elements.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    return _library.ops().conv2d_pack(weight, bias, _pair(stride), _pair(dilation), groups)


def conv2d_slice_weight_grad(
    grad_y: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    start: int = 0,
) -> Tensor:
    """The gradient of the weight of `conv2d_slice(x, weight, ...)`, given that of its result.

    Pixels are cut into chunks at places that depend on the shapes alone; their sums are added in order. The same bits
    come out whatever the threads.

    Args:
        grad_y: [B, c_out, H', W'], of the size of that result, any strides.
        x: [B, C, H, W], as for `conv2d_slice`, of the dtype of grad_y.
        weight_size: [c_out, c / groups, kh, kw].
        stride, padding, dilation, groups, start: as for `conv2d_slice`.

    Returns:
        weight_size, of the dtype of x. Differentiable.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    geometry = _pair(stride), _pair(padding), _pair(dilation)
    return _library.call("conv2d_slice_weight_grad", grad_y, x, list(weight_size), *geometry, groups, start)


ACTIVATIONS = {"relu": 0, "gelu": 1}


def partial_mlp(
    x: Tensor,
    conv_weight: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    activation: str = "relu",
    gate: Tensor | None = None,
    spatial_weight: Tensor | None = None,
    spatial_bias: Tensor | None = None,
    residual: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    """A whole block of FasterNet (arXiv 2303.03667) or PartialNet, its normalisations folded in by the caller.

    With u = [conv3x3(x[:, :c]), gate * x[:, c:]] and h = activation(w1 u + b1) at each pixel, and o = w2 h whose first
    C - C // 2 channels are multiplied by hardsigmoid(spatial_weight . h + spatial_bias) if that is given:
    y = o + b2, plus x with `residual`.

    Args:
        x: [B, C, H, W], any strides; float32, float16 or bfloat16 (float64 on the CPU). Sums are float32 (float64).
        conv_weight: [c, c, 3, 3] of the first c channels, like all tensors of the dtype of x; padding is 1.
        w1: [M, C] or [M, C, 1, 1].
        b1: [M].
        w2: [C, M] or [C, M, 1, 1].
        b2: [C], added after the spatial gate.
        activation: "relu" or "gelu" (by erf).
        gate: [B, C - c], a factor of each untouched channel: PAT_ch.
        spatial_weight: [M]: PAT_sp.
        spatial_bias: [1].
        residual: whether x is added.
        packed: what `partial_mlp_pack` made of the first five weights, which are then not read: the same bits sooner.

    Returns:
        [B, C, H, W] in the memory format of x. bfloat16 rounds u and h to bfloat16 where the processor multiplies
        that, and so does CUDA. Differentiable, twice too, by torch's matmuls.

    Raises:
        ValueError: a wrong shape, dtype, device or activation; packed made of other weights or for another processor.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"tranche.partial_mlp: expected activation in {list(ACTIVATIONS)}, got {activation!r}. "
            "Other activations are not fused."
        )
    code = ACTIVATIONS[activation]
    gates = gate, spatial_weight, spatial_bias
    return _library.call("partial_mlp", x, conv_weight, w1, b1, w2, b2, code, *gates, residual, packed)


def partial_mlp_pack(conv_weight: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The weights of `partial_mlp` in the order in which its CPU kernel reads them: see `conv2d_pack`.

    Args:
        conv_weight, w1, b1, w2, b2: as for `partial_mlp`.

    Returns:
        [bytes] uint8, opaque, for the argument `packed`. On CUDA without elements.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    return _library.ops().partial_mlp_pack(conv_weight, w1, b1, w2, b2)


def channel_stats(x: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the pixels of each channel from `start` on, for PAT_ch's gate.

    Computed in float32 (float64) by merging the moments of fixed chunks (Chan, Golub and LeVeque): deterministic, and
    without the cancellation of E[x^2] - E[x]^2.

    Args:
        x: [B, C, H, W], any strides; float32, float16 or bfloat16 (float64 on the CPU).
        start: the first channel, 0..C.

    Returns:
        (mean, std), each [B, C - start] of the dtype of x. std is unbiased: NaN for images of one pixel.
        Differentiable, twice too.

    Raises:
        ValueError: a wrong shape, dtype or start.
    """
    return _library.call("channel_stats", x, start)


def channel_gate(x: Tensor, start: int, weight: Tensor, bias: Tensor) -> Tensor:
    """The gate of PAT_ch: hardsigmoid(weight [mean, std] + bias) of the channels from `start` on.

    mean and std are those of `channel_stats`, kept in float32 (float64).

    Args:
        x: [B, C, H, W], any strides; float32, float16 or bfloat16 (float64 on the CPU).
        start: the first channel, 0..C; n = C - start.
        weight: [n, 2 n] of the dtype of x: first the means' columns, then the deviations'.
        bias: [n].

    Returns:
        [B, n] of the dtype of x, for `gate` of `partial_mlp`; NaN for images of one pixel. Differentiable, twice too.

    Raises:
        ValueError: a wrong shape, dtype, device or start.
    """
    return _library.call("channel_gate", x, start, weight, bias)


def partial_attention(
    x: Tensor,
    start: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    bias: Tensor,
    num_heads: int,
    *,
    eps: float = 1e-6,
    qkv_packed: Tensor | None = None,
    proj_packed: Tensor | None = None,
) -> Tensor:
    """The channels from `start` on attend to those of the image's other pixels; the first ones pass through: PAT_sf.

    With n = C - start, x2 = x[:, start:] and normed its pixels less their mean, over sqrt(variance + eps):

        q, k, v = qkv_weight normed + qkv_bias, n channels each, of heads of d = n / num_heads
        y[:, start:] = x2 + proj_weight softmax(q k^T / sqrt(d) + bias) v + proj_bias

    and y[:, :start] equals x bit for bit. A LayerNorm's weight and bias belong into qkv_weight and qkv_bias.

    Args:
        x: [B, C, H, W], any strides; float32, float16 or bfloat16 (float64 on the CPU). Sums are float32 (float64).
        start: the first channel that is attended, 0..C - 1.
        qkv_weight: [3 n, n], without gaps and of the dtype of x, as all tensors are: that of a `torch.nn.Linear`.
        qkv_bias: [3 n].
        proj_weight: [n, n].
        proj_bias: [n].
        bias: [num_heads, H W, H W], for all images: query by key.
        num_heads: a divisor of n.
        eps: of the normalisation, 0..1e30.
        qkv_packed, proj_packed: what `conv2d_pack(weight[:, :, None, None], bias)` made of either layer, which are then
            not read: the same bits sooner.

    Returns:
        [B, C, H, W] in the memory format of x. Between its steps pixels have the dtype of x. Differentiable, twice too,
        by torch's matmuls.

    Raises:
        ValueError: a wrong shape, dtype, device or number; packed weights made of others or for another processor.
    """
    weights = qkv_weight, qkv_bias, proj_weight, proj_bias, bias
    return _library.call("partial_attention", x, start, *weights, num_heads, eps, qkv_packed, proj_packed)


_library.register_inplace("partial_conv2d_")


@_library.register_fake("partial_attention")
def _(
    x: Tensor,
    start: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    bias: Tensor,
    num_heads: int,
    eps: float = 1e-6,
    qkv_packed: Tensor | None = None,
    proj_packed: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(x)


@_library.register_fake("partial_mlp")
def _(
    x: Tensor,
    conv_weight: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    activation: int = 0,
    gate: Tensor | None = None,
    spatial_weight: Tensor | None = None,
    spatial_bias: Tensor | None = None,
    residual: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(x)


def _packed(like: Tensor) -> Tensor:
    """Of a size that the processor decides; without elements where weights are read as they lie."""
    if like.device.type != "cpu":
        return like.new_empty(0, dtype=torch.uint8)
    return like.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@_library.register_fake("partial_mlp_pack")
def _(conv_weight: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return _packed(b2)


@_library.register_fake("conv2d_pack")
def _(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    return _packed(weight)


@_library.register_fake("channel_stats")
def _(x: Tensor, start: int) -> tuple[Tensor, Tensor]:
    shape = (x.size(0), x.size(1) - start)
    return x.new_empty(shape), x.new_empty(shape)


@_library.register_fake("channel_gate")
def _(x: Tensor, start: int, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.size(0), x.size(1) - start)


@_library.register_fake("partial_conv2d")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    start: int = 0,
    packed: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(x)


@_library.register_fake("partial_conv2d_")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    start: int = 0,
    packed: Tensor | None = None,
) -> None:
    return None


@_library.register_fake("conv2d_slice")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    start: int = 0,
    packed: Tensor | None = None,
) -> Tensor:
    batch, _, height, width = x.shape
    c_out, _, kh, kw = weight.shape
    out_height = (height + 2 * padding[0] - (kh - 1) * dilation[0] - 1) // stride[0] + 1
    out_width = (width + 2 * padding[1] - (kw - 1) * dilation[1] - 1) // stride[1] + 1
    if not x.is_contiguous() and x.stride(1) == 1:
        return x.new_empty((batch, out_height, out_width, c_out)).permute(0, 3, 1, 2)
    return x.new_empty((batch, c_out, out_height, out_width))


@_library.register_fake("conv2d_slice_weight_grad")
def _(
    grad_y: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    start: int = 0,
) -> Tensor:
    return x.new_empty(weight_size)
