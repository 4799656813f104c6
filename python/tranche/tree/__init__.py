"""Draft trees for speculative decoding: growing them, attention of their nodes over a KV cache, keeping what holds.

Every index tensor is int32 unless said, token ids are int64, and all live on the device of the data.
"""

from tranche.tree.accepted import Accepted
from tranche.tree.cache import compact_cache_, write_cache_
from tranche.tree.growth import CandidatePool, Candidates, Level, chosen_candidates, expand_beam, select_tree
from tranche.tree.modules import KVCache, TreeAttention
from tranche.tree.ops import merge_state, tree_ancestors, tree_attention
from tranche.tree.structure import Tree
from tranche.tree.verify import sample, verify_greedy, verify_sample, verify_typical

__all__ = [
    "Accepted",
    "CandidatePool",
    "Candidates",
    "KVCache",
    "Level",
    "Tree",
    "TreeAttention",
    "chosen_candidates",
    "compact_cache_",
    "expand_beam",
    "merge_state",
    "sample",
    "select_tree",
    "tree_ancestors",
    "tree_attention",
    "verify_greedy",
    "verify_sample",
    "verify_typical",
    "write_cache_",
]
