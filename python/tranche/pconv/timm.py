"""PartialNet in timm: `import tranche.pconv.timm`, then `timm.create_model("partialnet_t0")`.

The import is made for you where timm was imported before tranche.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model

from tranche.pconv import partialnet
from tranche.pconv.partialnet import PartialNet


def _build(name: str, pretrained: bool, kw: dict[str, Any]) -> PartialNet:
    if pretrained:
        raise ValueError(
            f"{name}: expected pretrained=False, got True. No weights are shipped; load a checkpoint."
        )
    for timms_own in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kw.pop(timms_own, None)
    return getattr(partialnet, name)(**kw)


@register_model
def partialnet_t0(pretrained: bool = False, **kw: Any) -> PartialNet:
    """PartialNet-T0."""
    return _build("partialnet_t0", pretrained, kw)


@register_model
def partialnet_t1(pretrained: bool = False, **kw: Any) -> PartialNet:
    """PartialNet-T1."""
    return _build("partialnet_t1", pretrained, kw)


@register_model
def partialnet_t2(pretrained: bool = False, **kw: Any) -> PartialNet:
    """PartialNet-T2."""
    return _build("partialnet_t2", pretrained, kw)


@register_model
def partialnet_s(pretrained: bool = False, **kw: Any) -> PartialNet:
    """PartialNet-S."""
    return _build("partialnet_s", pretrained, kw)


@register_model
def partialnet_m(pretrained: bool = False, **kw: Any) -> PartialNet:
    """PartialNet-M."""
    return _build("partialnet_m", pretrained, kw)


@register_model
def partialnet_l(pretrained: bool = False, **kw: Any) -> PartialNet:
    """PartialNet-L."""
    return _build("partialnet_l", pretrained, kw)
