"""PartialNet (arXiv 2502.01303), T0 to L, with the published parameters' names and shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tranche.pconv.attention import PATChannel, PATSelf, PATSpatial
from tranche.pconv.dynamic import DPConv
from tranche.pconv.modules import PartialConv

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": lambda: nn.ReLU(inplace=True), "gelu": nn.GELU}


class DropPath(nn.Module):
    """Stochastic depth: in training, an image's branch is dropped with this probability, and else scaled up."""

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] to the same shape."""
        if not self.training or self.probability == 0.0:
            return x
        keep = 1 - self.probability
        kept = x.new_empty((x.size(0),) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * kept / keep


class PartialBlock(nn.Module):
    """y = x + mlp(mixing(x)); with mixing "self" y = z + mlp(z) of z = x + mixing(x).

    mlp is a 1x1 convolution to mlp_ratio times the width, batch norm, activation, a 1x1 convolution back, and PAT_sp
    where `spatial` asks for it.

    Args:
        dim: channels.
        mixing: "channel" for `PATChannel`, "self" for `PATSelf`, "plain" for `PartialConv`, "dynamic" for `DPConv`.
        n_div: one in n_div channels is convolved; without meaning for "dynamic". With 1, which leaves nothing to
            attend, "channel" is "plain".
        activation: "relu" or "gelu".
        drop_path: probability of dropping the mlp of an image in training.
        attention: further arguments of `PATSelf`.
    """

    def __init__(
        self,
        dim: int,
        mixing: str = "channel",
        *,
        n_div: int = 4,
        mlp_ratio: float = 2.0,
        activation: str = "relu",
        spatial: bool = False,
        drop_path: float = 0.0,
        attention: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.spatial_mixing: nn.Module
        if mixing == "channel" and n_div > 1:
            self.spatial_mixing = PATChannel(dim, n_div, **factory)
        elif mixing == "self":
            self.spatial_mixing = PATSelf(dim, n_div, **(attention or {}), **factory)
        elif mixing in ("plain", "channel"):
            self.spatial_mixing = PartialConv(dim, n_div, **factory)
        elif mixing == "dynamic":
            self.spatial_mixing = DPConv(dim, **factory)
        else:
            raise ValueError(
                f"tranche.PartialBlock: expected mixing in ('channel', 'self', 'plain', 'dynamic'), got {mixing!r}."
            )
        hidden = int(dim * mlp_ratio)
        layers = [
            nn.Conv2d(dim, hidden, 1, bias=False, **factory),
            nn.BatchNorm2d(hidden, **factory),
            ACTIVATIONS[activation](),
            nn.Conv2d(hidden, dim, 1, bias=False, **factory),
        ]
        self.mlp = nn.Sequential(*layers, *([PATSpatial(dim, **factory)] if spatial else []))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        mixed = self.spatial_mixing(x)
        if isinstance(self.spatial_mixing, PATSelf):
            x = mixed = x + mixed
        return x + self.drop_path(self.mlp(mixed))


class PatchEmbed(nn.Module):
    """Patches of the image to pixels of the first stage: a convolution and batch norm."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, bias=False, **factory)
        self.norm = nn.BatchNorm2d(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to [B, dim, H // patch_size, W // patch_size]."""
        return self.norm(self.proj(x))


class PatchMerging(nn.Module):
    """Between stages: half the height and width, twice the channels."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 2, 2, bias=False, **factory)
        self.norm = nn.BatchNorm2d(2 * dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] to [B, 2 * dim, H // 2, W // 2]."""
        return self.norm(self.reduction(x))


class Stage(nn.Module):
    """Blocks of one width."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        return self.blocks(x)


def _per_block(n_div: int | Sequence[int], depths: Sequence[int]) -> list[int]:
    if isinstance(n_div, int):
        return [n_div] * sum(depths)
    if len(n_div) != sum(depths):
        raise ValueError(
            f"tranche.PartialNet: expected n_div for each of the {sum(depths)} blocks, got {len(n_div)}. Or give one."
        )
    return list(n_div)


class PartialNet(nn.Module):
    """A classifier, or with `features_only` a backbone, of partial attention convolutions.

    Stages of `PartialBlock` at strides patch_size, 2 * patch_size, ... with widths embed_dim, 2 * embed_dim, ...; all
    but the last mix by PAT_ch, the last by PAT_sf. Then global average pooling, a 1x1 convolution to `feature_dim`, the
    activation and a linear layer.

    Args:
        in_chans: channels of the images.
        num_classes: of the classifier; 0 for none, the output then being the [B, feature_dim] before it.
        embed_dim: width of the first stage.
        depths: blocks of each stage.
        n_div: one in n_div channels is convolved; one number, or one for each block (as a search found them).
        mlp_ratio: hidden width of a block over its width.
        patch_size: side of the patches, and their stride.
        feature_dim: width before the classifier.
        activation: "relu" or "gelu".
        spatial_attention: PAT_sp in every block.
        attention: False leaves out all attention: plain partial convolutions, as in FasterNet.
        search: DPConv in every block; widths must be powers of two.
        drop_path_rate: stochastic depth of the last block, rising linearly from none in the first.
        num_heads, attn_drop, proj_drop: of PAT_sf.
        features_only: return the outputs of stages, without a head.
        out_indices: which stages; all when left out.

    Raises:
        ValueError: arguments that do not fit together, by name.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 32,
        depths: Sequence[int] = (1, 2, 8, 2),
        *,
        n_div: int | Sequence[int] = 4,
        mlp_ratio: float = 2.0,
        patch_size: int = 4,
        feature_dim: int = 1280,
        activation: str = "relu",
        spatial_attention: bool = False,
        attention: bool = True,
        search: bool = False,
        drop_path_rate: float = 0.0,
        num_heads: int = 4,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"tranche.PartialNet: expected activation in {tuple(ACTIVATIONS)}, got {activation!r}."
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.activation, self.in_chans = num_classes, activation, in_chans
        self.patch_size, self.depths = patch_size, tuple(depths)
        self.features_only = features_only
        last = len(depths) - 1
        ratios = iter(_per_block(n_div, depths))
        drops = (drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, **factory)
        stages: list[nn.Module] = []
        self.feature_info: list[dict[str, Any]] = []
        for i, depth in enumerate(depths):
            mixing = "dynamic" if search else "plain" if not attention else "self" if i == last else "channel"
            width = embed_dim << i
            blocks = [
                PartialBlock(
                    width,
                    mixing,
                    n_div=next(ratios),
                    mlp_ratio=mlp_ratio,
                    activation=activation,
                    spatial=spatial_attention and attention,
                    drop_path=next(drops),
                    attention={"num_heads": num_heads, "attn_drop": attn_drop, "proj_drop": proj_drop},
                    **factory,
                )
                for _ in range(depth)
            ]
            self.feature_info.append(
                {"num_chs": width, "reduction": patch_size << i, "module": f"stages.{2 * i}"}
            )
            stages.append(Stage(blocks))
            if i < last:
                stages.append(PatchMerging(width, **factory))
        self.stages = nn.Sequential(*stages)
        self.num_features = embed_dim << last
        self.head_hidden_size = feature_dim
        self.out_indices = self._checked_indices(out_indices)
        if not features_only:
            self.avgpool_pre_head = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(self.num_features, feature_dim, 1, bias=False, **factory),
                ACTIVATIONS[activation](),
            )
            self.head: nn.Module = nn.Identity()
            self.reset_classifier(num_classes)
        self.apply(_initialise)

    def _checked_indices(self, indices: Sequence[int] | None) -> tuple[int, ...]:
        count = len(self.depths)
        chosen = (
            tuple(range(count))
            if indices is None
            else tuple(i % count if -count <= i < count else i for i in indices)
        )
        if any(not 0 <= i < count for i in chosen):
            raise ValueError(
                f"tranche.PartialNet: expected out_indices in [0, {count - 1}], got {tuple(indices or ())}."
            )
        return chosen

    def get_classifier(self) -> nn.Module:
        """The linear layer of the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear layer for this many classes, on the model's device and in its dtype; 0 for none.

        Raises:
            ValueError: a `global_pool` other than "avg" (which timm passes), or a model without a head.
        """
        if self.features_only:
            raise ValueError("tranche.PartialNet: expected a model with a head, got features_only=True.")
        if global_pool not in (None, "avg"):
            raise ValueError(f"tranche.PartialNet: expected global_pool 'avg', got {global_pool!r}.")
        self.num_classes = num_classes
        like = next(
            itertools.chain(self.patch_embed.parameters(), self.patch_embed.buffers())
        )  # folded or not
        self.head = (
            nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )
        _initialise(self.head)

    def _check_input(self, x: Tensor) -> None:
        least = self.patch_size << (len(self.depths) - 1)
        if x.dim() != 4 or x.size(1) != self.in_chans or min(x.shape[2:]) < least:
            raise ValueError(
                f"tranche.PartialNet: expected x of shape [B, {self.in_chans}, H >= {least}, W >= {least}], got "
                f"{tuple(x.shape)}. Resize the images, or build with a smaller patch_size or fewer depths."
            )

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to the last stage's [B, num_features, H', W'].

        Raises:
            ValueError: a wrong shape, or an image smaller than one pixel of the last stage.
        """
        self._check_input(x)
        return self.stages(self.patch_embed(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last stage's output to [B, num_classes], or to [B, feature_dim] before the classifier."""
        x = self.avgpool_pre_head(x).flatten(1)
        return x if pre_logits else self.head(x)

    def _outputs(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        x, outputs = self.patch_embed(x), []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            outputs.append(x) if i % 2 == 0 else None
        return [outputs[i] for i in self.out_indices]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """[B, in_chans, H, W], of any H and W, to [B, num_classes]; with `features_only` to the stages' outputs."""
        return self._outputs(x) if self.features_only else self.forward_head(self.forward_features(x))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _variant(
    num_classes: int,
    in_chans: int,
    given: dict[str, Any],
    embed_dim: int,
    depths: tuple[int, ...],
    activation: str,
    drop_path_rate: float,
    spatial_attention: bool = False,
) -> PartialNet:
    published: dict[str, Any] = {
        "embed_dim": embed_dim,
        "depths": depths,
        "activation": activation,
        "drop_path_rate": drop_path_rate,
        "spatial_attention": spatial_attention,
    }
    return PartialNet(in_chans, num_classes, **(published | given))


def partialnet_t0(num_classes: int = 1000, in_chans: int = 3, **kw: Any) -> PartialNet:
    """PartialNet-T0; `kw` as `PartialNet` takes them."""
    return _variant(num_classes, in_chans, kw, 32, (1, 2, 8, 2), "gelu", 0.0)


def partialnet_t1(num_classes: int = 1000, in_chans: int = 3, **kw: Any) -> PartialNet:
    """PartialNet-T1; `kw` as `PartialNet` takes them."""
    return _variant(num_classes, in_chans, kw, 48, (1, 2, 8, 2), "gelu", 0.02, spatial_attention=True)


def partialnet_t2(num_classes: int = 1000, in_chans: int = 3, **kw: Any) -> PartialNet:
    """PartialNet-T2; `kw` as `PartialNet` takes them."""
    return _variant(num_classes, in_chans, kw, 64, (2, 2, 6, 4), "relu", 0.05)


def partialnet_s(num_classes: int = 1000, in_chans: int = 3, **kw: Any) -> PartialNet:
    """PartialNet-S; `kw` as `PartialNet` takes them."""
    return _variant(num_classes, in_chans, kw, 96, (2, 2, 9, 4), "relu", 0.1)


def partialnet_m(num_classes: int = 1000, in_chans: int = 3, **kw: Any) -> PartialNet:
    """PartialNet-M; `kw` as `PartialNet` takes them."""
    return _variant(num_classes, in_chans, kw, 128, (2, 3, 16, 4), "relu", 0.2)


def partialnet_l(num_classes: int = 1000, in_chans: int = 3, **kw: Any) -> PartialNet:
    """PartialNet-L; `kw` as `PartialNet` takes them."""
    return _variant(num_classes, in_chans, kw, 160, (2, 3, 20, 4), "relu", 0.3)
