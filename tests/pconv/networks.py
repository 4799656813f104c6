"""What the tests of PartialNet share: the published keys and shapes, and statistics that hide nothing."""

from __future__ import annotations

import torch
from torch import nn

from tranche.pconv.attention import DistanceBias

# name: width, blocks of each stage, PAT_sp, millions of parameters, billions of multiply-adds, both without attention
PUBLISHED = {
    "t0": (32, (1, 2, 8, 2), False, 3.486, 0.233, 3.028, 0.216),
    "t1": (48, (1, 2, 8, 2), True, 6.145, 0.540, 4.959, 0.481),
    "t2": (64, (2, 2, 6, 4), False, 12.270, 1.033, 9.410, 0.909),
    "s": (96, (2, 2, 9, 4), False, 28.013, 2.705, 21.088, 2.432),
    "m": (128, (2, 3, 16, 4), False, 59.179, 6.673, 44.727, 6.191),
    "l": (160, (2, 3, 20, 4), False, 100.641, 11.882, 76.221, 11.131),
}


def _norm(channels: int, running: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"weight": (channels,), "bias": (channels,)}
    if running:
        shapes |= {"running_mean": (channels,), "running_var": (channels,), "num_batches_tracked": ()}
    return shapes


def _under(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _block(width: int, last: bool, spatial: bool) -> dict[str, tuple[int, ...]]:
    convolved, rest, half = width // 4, width - width // 4, width // 2
    shapes: dict[str, tuple[int, ...]] = {"spatial_mixing.partial_conv3.weight": (convolved, convolved, 3, 3)}
    if last:
        shapes |= {
            "spatial_mixing.attn.qkv.weight": (3 * rest, rest),
            "spatial_mixing.attn.proj.weight": (rest, rest),
            "spatial_mixing.attn.proj.bias": (rest,),
            "spatial_mixing.attn.rpe_k.lookup_table_bias": (4, 81),
        }
    else:
        shapes["spatial_mixing.attn.cfc1.weight"] = (rest, rest, 1, 2)
        shapes |= _under("spatial_mixing.attn.bn", _norm(rest))
    shapes |= _under("spatial_mixing.norm", _norm(rest, running=not last))
    shapes["mlp.0.weight"] = (2 * width, width, 1, 1)
    shapes |= _under("mlp.1", _norm(2 * width))
    shapes["mlp.3.weight"] = (width, 2 * width, 1, 1)
    if spatial:
        shapes["mlp.4.conv.weight"] = (half, half, 1, 1)
        shapes["mlp.4.conv_attn.weight"] = (1, half, 1, 1)
        shapes |= _under("mlp.4.norm", _norm(half)) | _under("mlp.4.norm2", _norm(half))
    return shapes


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The keys of a published checkpoint in their order, with the shapes of their values."""
    width, depths, spatial = PUBLISHED[name][:3]
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (width, 3, 4, 4)}
    shapes |= _under("patch_embed.norm", _norm(width))
    for i, depth in enumerate(depths):
        if i:
            shapes[f"stages.{2 * i - 1}.reduction.weight"] = (width << i, width << (i - 1), 2, 2)
            shapes |= _under(f"stages.{2 * i - 1}.norm", _norm(width << i))
        for j in range(depth):
            shapes |= _under(f"stages.{2 * i}.blocks.{j}", _block(width << i, i == 3, spatial))
    shapes["avgpool_pre_head.1.weight"] = (1280, 8 * width, 1, 1)
    return shapes | {"head.weight": (1000, 1280), "head.bias": (1000,)}


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Statistics, weights and tables such that every term of every fold counts."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, DistanceBias):
            module.lookup_table_bias.normal_()
    return model
