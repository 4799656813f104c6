"""`JakiroDrafter`: a trained head draws a dynamic tree, its last two levels from one pass (arXiv 2502.06282)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tranche.decode import target
from tranche.decode.drafter import Context
from tranche.decode.head import JakiroHead
from tranche.decode.head_cache import HeadCache
from tranche.tree import Accepted, CandidatePool, Level, Tree, expand_beam

_MAX_BEAM = 128  # what expand_beam takes
_MAX_CANDIDATES = 8192  # and what select_tree does


class JakiroDrafter:
    """Grows levels of candidates by beam search over the head's passes, and keeps the best nodes of all of them.

    The first pass takes what the target committed and gives the first level; every further one takes a beam and gives
    the level below. The last pass gives two levels: its contrastive output says what follows each beam node *two*
    tokens on, so it is the level below every child of that node, whichever token the child is.
    """

    def __init__(self, head: JakiroHead, *, passes: int = 5, beam: int = 10, contrast: bool = True):
        """A drafter by this head.

        Args:
            head: trained for the target; see `train_head`.
            passes: of the head for a tree; the published heads draft with 5.
            beam: nodes of a level that are continued, and candidates of each; 10 in the published heads.
            contrast: whether the last pass gives a level more. A plain head has none to give.

        Raises:
            ValueError: a number out of range.
        """
        self.head = head
        self.passes = passes
        self.beam = beam
        self.contrast = contrast and head.contrastive
        candidates = beam + (passes - 1 + self.contrast) * beam**2
        if passes < 1 or not 1 <= beam <= _MAX_BEAM or candidates > _MAX_CANDIDATES:
            raise ValueError(
                f"tranche.JakiroDrafter: expected passes >= 1 and beam in [1, {_MAX_BEAM}] that make at most "
                f"{_MAX_CANDIDATES} candidates, got {passes} and {beam}, which make {candidates}. 5 and 10 are good "
                "numbers."
            )

    def prepare(self, model: PreTrainedModel, batch: int, capacity: int, device: torch.device) -> None:
        """Allocate the head's own cache.

        Raises:
            ValueError: a head for a target of other sizes.
        """
        self.head.check_fits(model)
        self.head.eval()
        self._cache = HeadCache(self.head, batch, capacity + self.beam * self.passes)

    def observe(self, context: Context, accepted: Accepted) -> None:
        """Keep the target's features of what was committed, for the next tree's first pass."""
        self._cache.append(context.hidden, context.following, context.committed)

    @torch.no_grad()
    def propose(self, context: Context) -> tuple[Tree, Tensor]:
        """The dynamic tree, its nodes numbered by falling score."""
        nodes = context.tree_size
        root = context.root
        beam = min(self.beam, target.vocabulary(context.model))
        # a level more than there are nodes below the root could not show
        passes = max(1, min(self.passes, nodes - 1))
        # what the target draws from is its distribution at this temperature
        warmth = torch.where(context.temperature > 0, context.temperature, 1.0)[:, None, None]

        def logprobs(features: Tensor) -> Tensor:
            logits = target.logits_of(context.model, features.to(context.model.dtype))
            return (logits.float() / warmth).log_softmax(-1)

        pool = CandidatePool()
        feature, second = self._cache.advance(contrast=self.contrast and passes == 1)
        feature, second = feature[:, None], None if second is None else second[:, None]
        level = expand_beam(logprobs(feature), feature.new_zeros(len(root), 1, dtype=torch.float32), beam)
        pool.add(level)
        for done in range(1, passes):
            before = _of_parents(feature, level)
            feature, second = self._cache.grow(
                level.tokens, before, level.parent_beam, contrast=self.contrast and done == passes - 1
            )
            level = expand_beam(logprobs(feature), level.scores, beam)
            pool.add(level)
        if second is not None:
            pool.add(expand_beam(_of_parents(logprobs(second), level), level.scores, beam))
        return _by_score(pool, root, nodes)


def _of_parents(rows: Tensor, level: Level) -> Tensor:
    """The row [B, k, ...] of the beam that each node of the level's new beam continues.

    A pass's outputs stand in the order of the beam that went into it, and the new beam in another: its node r is a
    child of the old beam's node parent_beam[r].
    """
    index = level.parent_beam.long()[:, :, None].expand(-1, -1, rows.size(2))
    return rows.gather(1, index).contiguous()


def _by_score(pool: CandidatePool, root: Tensor, nodes: int) -> tuple[Tree, Tensor]:
    """`pool.select`, its nodes renumbered by falling score, so that the first n are the best tree of n nodes."""
    tree, tokens, index = pool.select(root, nodes)
    scores = pool.scores.nan_to_num(nan=-torch.inf)
    key = scores.gather(1, index.clamp(min=0).long())
    column = torch.arange(tokens.size(1), device=tokens.device)
    key = torch.where(column < tree.n_nodes[:, None], key, -torch.inf)
    key[:, 0] = torch.inf
    # a child's score is at most its parent's and its number greater: a stable sort keeps parents first
    order = key.sort(dim=1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(1, order, column.expand_as(order))
    parent = tree.parent.gather(1, order)
    parent = torch.where(parent < 0, -1, place.gather(1, parent.clamp(min=0).long())).to(torch.int32)
    return Tree.from_parent(parent, tree.n_nodes), tokens.gather(1, order)
