"""Draft trees for speculative decoding: their structure, and attention of their nodes over a KV cache.

Every index tensor is int32 unless said, token ids are int64, and all live on the device of the data.
"""

from tranche.tree.ops import merge_state, tree_ancestors, tree_attention
from tranche.tree.structure import Tree

__all__ = ["Tree", "merge_state", "tree_ancestors", "tree_attention"]
