"""Drafters that need no second model: the target itself, made cheaper, drafts for itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tranche import bits as switching
from tranche.decode import target
from tranche.decode.drafter import Context
from tranche.tree import Accepted, Tree, sample

_DEPTH = 12  # passes of the draft at most


class SelfDrafter:
    """A chain that the cheaper target decodes, each of its tokens with the runner-up beside it.

    The draft reads the keys and values of the committed text as the target wrote them and puts its own into the free
    slots behind, where the target's next pass overwrites them: no second cache. It draws its tokens with the seed,
    position and settings of the target, so that the two agree wherever their distributions nearly do, also when they
    sample.
    """

    def cheaper(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
        """A context in which the model is the draft; each kind of self-drafting has its own."""
        raise NotImplementedError

    def prepare(self, model: PreTrainedModel, batch: int, capacity: int, device: torch.device) -> None:
        """The tree of one node that each pass of the draft is."""
        self._single = Tree.chain(1, batch, device).parent
        parents = [-1, *(max(0, (node - 1) // 2 * 2 - 1) for node in range(1, 2 * _DEPTH + 1))]
        self._parents = torch.tensor([parents], dtype=torch.int32, device=device)

    def propose(self, context: Context) -> tuple[Tree, Tensor]:
        """Node 2j - 1 is the chain's token at depth j, node 2j its runner-up: the first n are what n nodes can hold."""
        nodes = min(context.tree_size, 2 * _DEPTH + 1)
        depth = nodes // 2
        token = context.root
        tokens = [token]
        cache, committed = context.cache, context.seqlens
        tree = Tree.from_parent(self._single, context.active.to(torch.int32))
        try:
            with self.cheaper(context.model):
                for j in range(depth):
                    cache.seqlens = committed + j
                    hidden = target.forward(context.model, cache, token[:, None], tree)
                    logits = target.logits_of(context.model, hidden)[:, 0]
                    best = logits.topk(min(2, logits.size(1)), dim=1).indices
                    token = sample(
                        logits,
                        temperature=context.temperature,
                        top_k=context.top_k,
                        top_p=context.top_p,
                        seed=context.seed,
                        position=committed.long() + j + 1,
                    )
                    tokens += [token, torch.where(best[:, 0] == token, best[:, -1], best[:, 0])]
        finally:
            cache.seqlens = committed
        drafted = torch.stack(tokens, 1)[:, :nodes]
        parent = self._parents[:, :nodes].repeat(drafted.size(0), 1)
        return Tree.from_parent(parent), drafted

    def observe(self, context: Context, accepted: Accepted) -> None:
        """Nothing: the draft's memory is the target's cache."""


class BitSwitchDrafter(SelfDrafter):
    """The same `tranche.bits` model at fewer bits drafts: one stored weight, no second copy (as CAS-Spec, QSpec)."""

    def __init__(self, bits: int = 4):
        """`bits` is the draft's precision, 2 to 8.

        Raises:
            ValueError: another number.
        """
        if bits not in range(2, 9):
            raise ValueError(
                f"tranche.BitSwitchDrafter: expected bits in [2, 8], got {bits}. Choose one of these."
            )
        self.bits = bits

    def prepare(self, model: PreTrainedModel, batch: int, capacity: int, device: torch.device) -> None:
        """Check that the model can switch.

        Raises:
            ValueError: no bit-switching module in it.
        """
        if not any(isinstance(module, switching.BitSwitchLinear) for module in model.modules()):
            raise ValueError(
                "tranche.BitSwitchDrafter: expected a model of tranche.bits.BitSwitchLinear modules, got one without. "
                "Convert it with tranche.bits.convert(model, skip=())."
            )
        super().prepare(model, batch, capacity, device)

    def cheaper(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
        """The model at fewer bits."""
        return switching.at_bits(model, self.bits)


class LayerSkipDrafter(SelfDrafter):
    """The target without some of its layers drafts (SWIFT, arXiv 2410.06916; Draft & Verify, arXiv 2309.08168)."""

    def __init__(self, skip: Sequence[int] | None = None):
        """`skip` are indices of layers to leave out; every second one, the first and last kept, when left out."""
        self.skip = None if skip is None else frozenset(skip)

    def prepare(self, model: PreTrainedModel, batch: int, capacity: int, device: torch.device) -> None:
        """Choose the layers.

        Raises:
            ValueError: an index that is no layer's, or no layer left.
        """
        super().prepare(model, batch, capacity, device)
        count = len(model.get_decoder().layers)
        skip = frozenset(range(1, max(2, count - 1), 2)) if self.skip is None else self.skip
        if not skip <= set(range(count)) or (skip and len(skip) >= count):
            raise ValueError(
                f"tranche.LayerSkipDrafter: expected skip among the layers 0 to {count - 1}, some left, got "
                f"{sorted(skip)}. Leave skip out for every second layer."
            )
        self._kept = nn.ModuleList(
            layer for i, layer in enumerate(model.get_decoder().layers) if i not in skip
        )

    @contextlib.contextmanager
    def cheaper(self, model: PreTrainedModel) -> Iterator[None]:
        """The model with the layers that are kept."""
        decoder = model.get_decoder()
        layers = decoder.layers
        decoder.layers = self._kept
        try:
            yield
        finally:
            decoder.layers = layers
