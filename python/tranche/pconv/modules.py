"""Modules of the family, with the attributes and state_dict keys of the published ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tranche.pconv.ops import partial_conv2d


class PartialConv(nn.Module):
    """FasterNet's partial convolution: a k x k convolution, without bias, of the first dim // n_div channels.

    Attributes and parameters are named as in FasterNet and timm (`dim_conv3`, `dim_untouched`,
    `partial_conv3.weight`), so that their checkpoints load.

    Args:
        dim: channels C of the input [B, C, H, W].
        n_div: one in n_div channels is convolved.
        kernel_size: odd; height and width stay.
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
        super().__init__()
        if not 1 <= n_div <= dim:
            raise ValueError(
                f"tranche.PartialConv: expected n_div in [1, dim] = [1, {dim}], got {n_div}. Use fewer parts."
            )
        if kernel_size % 2 == 0:
            raise ValueError(
                f"tranche.PartialConv: expected an odd kernel_size, got {kernel_size}. "
                "An even kernel changes the image's size."
            )
        self.dim_conv3 = dim // n_div
        self.dim_untouched = dim - self.dim_conv3
        self.partial_conv3 = nn.Conv2d(
            self.dim_conv3,
            self.dim_conv3,
            kernel_size,
            1,
            kernel_size // 2,
            bias=False,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape and memory format.

        Raises:
            ValueError: other channels than `dim`, or another dtype or device than the weight's.
        """
        channels = self.dim_conv3 + self.dim_untouched
        if x.dim() == 4 and x.size(1) != channels:
            raise ValueError(
                f"tranche.PartialConv: expected x of {channels} channels, got {x.size(1)}. "
                f"Make it with dim={x.size(1)}."
            )
        conv: Any = self.partial_conv3
        return partial_conv2d(
            x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )


def _is_split_cat(module: nn.Module) -> bool:
    """Whether this is FasterNet's or timm's Partial_conv3: known by its attributes, whatever its class's name.

    PartialNet's has the same attributes, and attention besides: it is another thing.
    """
    conv: Any = getattr(module, "partial_conv3", None)
    if isinstance(module, PartialConv) or type(conv) is not nn.Conv2d or isinstance(conv.padding, str):
        return False
    sizes = (getattr(module, "dim_conv3", None), getattr(module, "dim_untouched", None))
    keeps_size = conv.stride == (1, 1) and all(
        2 * p == d * (k - 1) for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    )
    return (
        all(isinstance(size, int) for size in sizes)
        and conv.in_channels == conv.out_channels == sizes[0]
        and conv.padding_mode == "zeros"
        and list(module.children()) == [conv]
        and keeps_size
    )


def replace_partial_convs(model: nn.Module) -> int:
    """Swap every split-cat (or slicing) partial convolution of FasterNet's code or of timm for `PartialConv`, in place.

    The parameters are kept, the same objects: optimizers, state_dict keys and tied weights stay as they are. Hooks on
    a swapped module are not carried over.

    Returns:
        How many were swapped.
    """
    swapped = 0
    child: Any
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not _is_split_cat(child):
                continue
            ours = PartialConv(child.dim_conv3 + child.dim_untouched, device="meta")
            ours.dim_conv3, ours.dim_untouched = child.dim_conv3, child.dim_untouched
            ours.partial_conv3 = child.partial_conv3
            ours.train(child.training)
            setattr(parent, name, ours)
            swapped += 1
    return swapped
