"""Growing a draft tree: levels of candidates by beam search, and the choice of the tree from all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tranche import _library
from tranche.tree.structure import Tree


class Candidates(NamedTuple):
    """The k best children of each of K beams, best first.

    Attributes:
        scores: float32 [B, K, k]; cumulative log-probabilities.
        tokens: int64 [B, K, k].
    """

    scores: Tensor
    tokens: Tensor


class Level(NamedTuple):
    """One level of growth: the new beam, best first, and all candidates that it was chosen from.

    Attributes:
        scores: float32 [B, k]; cumulative log-probabilities of the new beam.
        parent_beam: int32 [B, k]; which of the K beams each continues.
        tokens: int64 [B, k].
        candidates: the K x k candidates of the level.
    """

    scores: Tensor
    parent_beam: Tensor
    tokens: Tensor
    candidates: Candidates


def expand_beam(logprobs: Tensor, beam_scores: Tensor, k: int) -> Level:
    """One level of growth: the k best children of every beam, and the k best of those.

    A child's score is its beam's score plus its token's log-probability, added in float32. Ties go to the lower token
    id within a beam, and to the lower position in [K * k] among all candidates. NaN counts as -inf. One launch on CUDA,
    besides the zeroing of B counters.

    Args:
        logprobs: [B, K, V] of the token after each beam; float32, float16 or bfloat16 (float64 on the CPU), last
            dimension contiguous. K in [1, 128], V <= 2**20. K = 1 is the first level, from the root.
        beam_scores: float32 [B, K], cumulative log-probability of each beam (float64 beside float64 logprobs).
        k: the width of the new beam, at most 128 and V.

    Returns:
        `Level`. Scores have the dtype of beam_scores.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or number.

    EAGLE-2 (arXiv 2406.16858, section 4.1), Jakiro (arXiv 2502.06282).
    """
    scores, parent_beam, tokens, candidate_scores, candidate_tokens = _library.ops().tree_expand_beam(
        logprobs, beam_scores, k
    )
    return Level(scores, parent_beam, tokens, Candidates(candidate_scores, candidate_tokens))


@_library.register_fake("tree_expand_beam")
def _(logprobs: Tensor, beam_scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, beams, _ = logprobs.shape
    score_dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    return (
        logprobs.new_empty((batch, k), dtype=score_dtype),
        logprobs.new_empty((batch, k), dtype=torch.int32),
        logprobs.new_empty((batch, k), dtype=torch.int64),
        logprobs.new_empty((batch, beams, k), dtype=score_dtype),
        logprobs.new_empty((batch, beams, k), dtype=torch.int64),
    )


def select_tree(
    scores: Tensor, parents: Tensor, tokens: Tensor, root_tokens: Tensor, n_nodes: int
) -> tuple[Tree, Tensor, Tensor]:
    """The dynamic tree of EAGLE-2 and Jakiro: the root and the best n_nodes - 1 of all levels' candidates.

    A candidate's key is the least score on its path, min(score, key of its parent), NaN counting as -inf; the greatest
    (key, lower index) are kept. The kept set is therefore closed under ancestors whatever the scores are. Nodes are
    numbered in order of candidate index, which is topological. One launch on CUDA.

    Args:
        scores: float32 [B, C], cumulative log-probabilities (float64 on the CPU); C <= 8192.
        parents: int32 [B, C], the parent candidate, always an earlier one; -1 for a child of the root.
        tokens: int64 [B, C].
        root_tokens: int64 [B].
        n_nodes: N, nodes of a tree, the root included, in [1, 1024].

    Returns:
        tree: trees of N nodes at most; of C + 1 nodes when there are too few candidates.
        node_tokens: int64 [B, N]; 0 past the tree's nodes.
        index: int32 [B, N], each node's candidate; -1 for the root and past the tree's nodes.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or number.
        IndexError: a parent that is no earlier candidate (CPU; on CUDA such a candidate hangs under the root).

    EAGLE-2 (arXiv 2406.16858, section 4.2).
    """
    parent, counts, depth, ancestors, node_tokens, index = _library.ops().tree_select(
        scores, parents, tokens, root_tokens, n_nodes
    )
    return Tree(parent, counts, depth, ancestors), node_tokens, index


@_library.register_fake("tree_select")
def _(
    scores: Tensor, parents: Tensor, tokens: Tensor, root_tokens: Tensor, n_nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = scores.size(0)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return scores.new_empty(shape, dtype=dtype)

    return (
        empty(batch, n_nodes),
        empty(batch),
        empty(batch, n_nodes),
        empty(batch, n_nodes, (n_nodes + 63) // 64, dtype=torch.int64),
        empty(batch, n_nodes, dtype=torch.int64),
        empty(batch, n_nodes),
    )


class CandidatePool:
    """The candidates of all levels of one step, in the order that `select_tree` wants.

        pool = CandidatePool()
        level = expand_beam(logprobs, torch.zeros(batch, 1), k)          # [B, 1, V], from the root
        pool.add(level)
        for _ in range(depth):
            level = expand_beam(draft(level.tokens, level.parent_beam), level.scores, k)  # [B, k, V]
            pool.add(level)
        tree, node_tokens, index = pool.select(root_tokens, n_nodes)

    Levels of K x k candidates follow one another; within a level, beam by beam. The parent of candidate c of a level
    is the candidate of the level before that beam c // k was chosen as, never the beam's number itself. Plain tensor
    operations, so that a compiled step holds them.

    Attributes:
        levels: what was added.
    """

    def __init__(self) -> None:
        self.levels: list[Level] = []

    def add(self, level: Level) -> None:
        """Append the candidates of a level, whose beams are the new beam of the level before."""
        beams = level.candidates.scores.size(1)
        expected = self.levels[-1].scores.size(1) if self.levels else 1
        if beams != expected:
            raise ValueError(
                f"tranche.CandidatePool.add: expected a level grown from {expected} beams, got {beams}. "
                "Add the levels in order, the first grown from the root alone."
            )
        self.levels.append(level)

    @property
    def scores(self) -> Tensor:
        """[B, C], cumulative log-probabilities."""
        return torch.cat([level.candidates.scores.flatten(1) for level in self._levels()], dim=1)

    @property
    def tokens(self) -> Tensor:
        """int64 [B, C]."""
        return torch.cat([level.candidates.tokens.flatten(1) for level in self._levels()], dim=1)

    @property
    def parents(self) -> Tensor:
        """int32 [B, C], candidates of this pool; -1 on the first level."""
        first = self._levels()[0].candidates.tokens.flatten(1)
        parts = [torch.full_like(first, -1, dtype=torch.int32)]
        start = 0  # of the level that the beams belong to
        for before, level in zip(self.levels, self.levels[1:], strict=False):
            beam_candidate = start + chosen_candidates(before)
            parts.append(beam_candidate.repeat_interleave(level.candidates.tokens.size(2), dim=1))
            start += before.candidates.tokens[0].numel()
        return torch.cat(parts, dim=1)

    def select(self, root_tokens: Tensor, n_nodes: int) -> tuple[Tree, Tensor, Tensor]:
        """`select_tree` from the whole pool."""
        return select_tree(self.scores, self.parents, self.tokens, root_tokens, n_nodes)

    def _levels(self) -> list[Level]:
        if not self.levels:
            raise ValueError(
                "tranche.CandidatePool: expected at least one level, got none. Add the root's first."
            )
        return self.levels


def chosen_candidates(level: Level) -> Tensor:
    """Which of the level's K x k candidates each of the new beam is, int32 [B, k]."""
    # a beam's candidates have different tokens, so its chosen child is known by its token
    rows = level.candidates.tokens.gather(
        1, level.parent_beam.long()[:, :, None].expand(-1, -1, level.candidates.tokens.size(2))
    )
    rank = (rows == level.tokens[:, :, None]).to(torch.int8).argmax(2)
    return (level.parent_beam * rows.size(2) + rank).to(torch.int32)
