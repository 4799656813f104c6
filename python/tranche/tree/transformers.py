"""Draft trees in transformers models: the attention function `tranche_tree`, and the cache that goes with it.

    import tranche.tree.transformers  # registers the attention function

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="tranche_tree")
    cache = TreeCache(model, batch=1, capacity=4096)
    prefill(model, cache, prompt)                      # commits the prompt
    logits = evaluate(model, cache, node_tokens, tree) # all nodes of the tree in one pass
    cache.commit_(accepted)                            # keeps the accepted path

Any causal model whose attention goes through `AttentionInterface` will do (Llama, Mistral, Qwen2, Qwen3, ...).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tranche._extras import needed

with needed("tranche.tree.transformers", "transformers"):
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.cache_utils import Cache

from tranche.tree.accepted import Accepted
from tranche.tree.cache import compact_cache_, write_cache_
from tranche.tree.ops import tree_attention
from tranche.tree.structure import Tree

MAX_NODES = 1024


class TreeCache(Cache):
    """A static KV cache whose sequences have lengths of their own.

    Node i of sequence b is written to slot seqlens[b] + i; nothing is committed until `seqlens` advances.

    Attributes:
        keys: one tensor [B, S, Hkv, D] per layer.
        values: likewise.
        seqlens: int32 [B], committed tokens of each sequence.
        tree: the trees of the pass under way, whose n_nodes say which rows are real; None: chains, all rows real.
    """

    def __init__(self, model: PreTrainedModel, batch: int, capacity: int):
        """Room for `capacity` tokens, draft nodes included, in each of `batch` sequences."""
        super().__init__(layers=[])
        config = model.config.get_text_config()
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.capacity = capacity
        shape = (batch, capacity, heads, head_dim)

        def slots() -> list[Tensor]:
            return [
                torch.zeros(shape, dtype=model.dtype, device=model.device)
                for _ in range(config.num_hidden_layers)
            ]

        self.keys = slots()
        self.values = slots()
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=model.device)
        self.tree: Tree | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the nodes' keys and values [B, Hkv, N, D]; returns the layer's whole cache, [B, Hkv, S, D]."""
        batch, _, nodes, _ = key_states.shape
        tree = Tree.chain(nodes, batch, key_states.device) if self.tree is None else self.tree
        write_cache_(
            key_states.transpose(1, 2),
            value_states.transpose(1, 2),
            self.keys[layer_idx],
            self.values[layer_idx],
            self.seqlens,
            tree,
        )
        return self.keys[layer_idx].transpose(1, 2), self.values[layer_idx].transpose(1, 2)

    def commit_(self, accepted: Accepted) -> None:
        """Keep the accepted path of each tree in every layer, and advance `seqlens`."""
        compact_cache_([*self.keys, *self.values], accepted, self.seqlens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest committed sequence (reads it back from the device)."""
        return int(self.seqlens.max()) if self.seqlens.numel() else 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Slots of a sequence."""
        return self.capacity


def tranche_tree(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Tree | None = None,
    cache_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    exact: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function. `tree`, `cache_seqlens` and `exact` are keyword arguments of the model's call.

    Args:
        module: the attention layer.
        query: [B, Hq, N, D].
        key: [B, Hkv, S, D], a layer of a `TreeCache`; `value` likewise.
        value: see `key`.
        attention_mask: must be None; the tree says what is visible.
        scaling: as `tree_attention`'s scale.
        dropout: must be 0.
        tree: the nodes' trees.
        cache_seqlens: int32 [B], committed tokens.
        sliding_window: as `tree_attention`'s window.
        softcap: as there.
        s_aux: [Hq], as its sinks.
        exact: as there.
        kwargs: what else models pass along.

    Returns:
        [B, N, Hq, D], and None in place of attention weights.

    Raises:
        ValueError: the tree or the lengths are missing, or a mask or dropout is asked for.
    """
    if tree is None or cache_seqlens is None:
        raise ValueError(
            "tranche.tree.transformers.tranche_tree: expected the model's keyword arguments tree and "
            "cache_seqlens, got none. Call tranche.tree.transformers.evaluate or prefill, or pass them."
        )
    if attention_mask is not None or dropout != 0.0:
        raise ValueError(
            "tranche.tree.transformers.tranche_tree: expected no attention_mask and no dropout, got one. "
            "Give padding its place in n_nodes and cache_seqlens, and call model.eval()."
        )
    out = tree_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens,
        tree,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.float(),
        exact=exact,
    )
    assert isinstance(out, Tensor)
    return out, None


AttentionInterface.register("tranche_tree", tranche_tree)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, cache: TreeCache, tokens: Tensor, tree: Tree, *, exact: bool = False
) -> Tensor:
    """Logits of every node of the trees, in one pass, without gradients.

    Args:
        model: a causal model with attn_implementation="tranche_tree".
        cache: what is committed; the nodes' keys and values are written behind it, uncommitted.
        tokens: int64 [B, N], the nodes' tokens; the root's is the last one not yet committed.
        tree: the trees.
        exact: as `tree_attention`'s.

    Returns:
        [B, N, V]; node i's row predicts the token after node i.
    """
    cache.tree = tree
    try:
        return model(
            input_ids=tokens,
            position_ids=tree.positions(cache.seqlens),
            past_key_values=cache,
            use_cache=True,
            tree=tree,
            cache_seqlens=cache.seqlens,
            exact=exact,
        ).logits
    finally:
        cache.tree = None


def prefill(
    model: PreTrainedModel, cache: TreeCache, tokens: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """Commit prompts, in chained chunks; returns the logits [B, V] after each prompt's last token.

    Args:
        model: as for `evaluate`.
        cache: is advanced by the prompts' lengths.
        tokens: int64 [B, T], right-padded.
        lengths: int32 [B], the prompts' lengths, at least 1; all T when left out.
    """
    batch, total = tokens.shape
    if lengths is None:
        lengths = torch.full((batch,), total, dtype=torch.int32, device=tokens.device)
    last: Tensor | None = None
    for start in range(0, total, MAX_NODES):
        chunk = tokens[:, start : start + MAX_NODES]
        nodes = chunk.size(1)
        counts = (lengths - start).clamp(0, nodes).to(torch.int32)
        parents = torch.arange(-1, nodes - 1, dtype=torch.int32, device=tokens.device).repeat(batch, 1)
        logits = evaluate(model, cache, chunk, Tree.from_parent(parents, counts))
        ends = logits[torch.arange(batch, device=tokens.device), (counts - 1).clamp(min=0).long()]
        last = ends if last is None else torch.where((counts > 0)[:, None], ends, last)
        cache.seqlens += counts
    if last is None:
        raise ValueError(
            "tranche.tree.transformers.prefill: expected prompts of at least one token, got none."
        )
    return last
