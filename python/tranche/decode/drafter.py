"""The protocol between `generate` and a drafter: what a drafter is told, and what it is asked for.

A drafter guesses how the text goes on. `generate` has the target model score the guess and keeps what the target
would have said itself, so a drafter can cost time but never change the text. One call of `generate` goes

    drafter.prepare(model, batch, capacity, device)
    for each chunk of the prompts:
        the target's pass over the chunk;  drafter.observe(context, accepted)
    until all sequences have ended:
        tree, tokens = drafter.propose(context)
        the target's pass over the tree, verification, commit;  drafter.observe(context, accepted)

A sequence b is its `seqlens[b]` committed tokens, whose keys and values are in the target's cache, and one more, the
**root**: the last token that the target chose and has not yet seen. It stands at tokens[b, seqlens[b]], and is node 0
of every tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tranche.tree import Accepted, Tree
from tranche.tree.transformers import TreeCache


@dataclass
class Context:
    """What a drafter may read. All tensors live on the model's device, and none is the drafter's to write.

    Attributes:
        model: the target, ready to be called as `evaluate` of `tranche.tree.transformers` calls it.
        cache: the target's cache. Slots from seqlens on are free for a drafter's own passes of the target: the
            next pass of the target overwrites them.
        tokens: int64 [B, S + 2]; the first seqlens[b] + 1 of row b are the text so far, without padding.
        active: bool [B], the sequences that have not ended.
        tree_size: the most nodes, root included, that this step's tree should have; more are cut off. It follows
            the measured cost of a pass and what the drafter's nodes were worth, so number the likeliest nodes first.
        temperature: float32 [B], as top_k int32 [B], top_p float32 [B] and seed int64 [B] the settings with which
            `tranche.tree.sample` draws the target's token at position seqlens + 1 and so on.
        top_k: see `temperature`.
        top_p: see `temperature`.
        seed: see `temperature`.
        exact: whether the target's passes are asked for `tree_attention(exact=True)`.
        tree: the trees of the target's last pass; those of a prompt's chunk are chains.
        node_tokens: int64 [B, N], their tokens.
        node_hidden: [B, N, H], their last hidden states, which the model's output embeddings take.
        logits: [B, N, V], their logits; None after a chunk of the prompts, where only the last one's are made.
        path: int32 [B, N], the nodes that the last pass committed, in order, padded with -1.
        committed: int32 [B], how many; 0 for sequences that took no part in it.
    """

    model: PreTrainedModel
    cache: TreeCache
    tokens: Tensor
    active: Tensor
    tree_size: int
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    exact: bool
    tree: Tree
    node_tokens: Tensor
    node_hidden: Tensor
    logits: Tensor | None
    path: Tensor
    committed: Tensor

    @property
    def seqlens(self) -> Tensor:
        """int32 [B], committed tokens; the root's position."""
        return self.cache.seqlens

    @property
    def root(self) -> Tensor:
        """int64 [B], the last chosen token of each sequence."""
        return self.tokens.gather(1, self.seqlens.long()[:, None])[:, 0]

    @property
    def hidden(self) -> Tensor:
        """The last hidden states of what the last pass committed, [B, N, H]: the first committed[b] rows are real.

        Row j belongs to position seqlens - committed + j, and the token that follows it is
        tokens[seqlens - committed + j + 1]: the pairs that a feature drafter (EAGLE, Jakiro) takes.
        """
        index = self.path.clamp(min=0).long()[:, :, None]
        return self.node_hidden.gather(1, index.expand(-1, -1, self.node_hidden.size(2)))

    @property
    def following(self) -> Tensor:
        """int64 [B, N], the token after each row of `hidden`; rows past `committed` repeat the root."""
        column = torch.arange(self.path.size(1), device=self.path.device)
        position = (self.seqlens - self.committed + 1)[:, None] + column
        return self.tokens.gather(1, torch.minimum(position, self.seqlens[:, None]).long())


@runtime_checkable
class Drafter(Protocol):
    """What `generate` asks of a drafter. Constructors take the drafter's own data only.

    No method may change the context's tensors, draw from torch's global random numbers, or wait for the device. If a
    method raises, `generate` warns, goes on without the drafter, and the text is the same.

    A drafter with an attribute `chooses_size` that is true is always asked for as many nodes as there may be, and
    itself decides how many of them are worth a pass.
    """

    def prepare(self, model: PreTrainedModel, batch: int, capacity: int, device: torch.device) -> None:
        """Begin a call of `generate`: forget the previous one's sequences, allocate for these.

        Args:
            model: the target.
            batch: sequences, B.
            capacity: slots of a sequence in the target's cache, room for the largest tree included.
            device: where the context's tensors live.
        """

    def propose(self, context: Context) -> tuple[Tree, Tensor]:
        """Draft trees of at most context.tree_size nodes, and their tokens.

        Returns:
            tree: B trees of N nodes at most. Node 0 stands for the root. What is proposed for sequences that have
                ended is ignored.
            tokens: int64 [B, N]; node 0's is ignored. Tokens outside the vocabulary count as the nearest
                inside.
        """

    def observe(self, context: Context, accepted: Accepted) -> None:
        """Learn what became of the last pass, a chunk of the prompts or a draft tree.

        Args:
            context: with seqlens, tokens and root as they are after the pass, and what the pass computed.
            accepted: the verification's verdict on the trees; for a chunk of the prompts the whole chunk is the
                path. What the context says of sequences that have ended (`active`) means nothing.
        """
