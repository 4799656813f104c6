"""Draft trees for speculative decoding: their structure, and attention of their nodes over a KV cache.

Every index tensor is int32 unless said, token ids are int64, and all live on the device of the data.
"""

from tranche.tree.accepted import Accepted
from tranche.tree.ops import tree_ancestors, tree_attention
from tranche.tree.structure import Tree
from tranche.tree.verify import sample, verify_greedy, verify_sample, verify_typical

__all__ = [
    "Accepted",
    "Tree",
    "sample",
    "tree_ancestors",
    "tree_attention",
    "verify_greedy",
    "verify_sample",
    "verify_typical",
]
