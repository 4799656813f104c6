"""Kernels over PyTorch that compute only the part of a network that matters.

The families are packages of this one: `tranche.bits` (one stored weight for
every precision), `tranche.tree` (draft trees for speculative decoding). Each offers typed
functions and modules; the raw ops behind them are `torch.ops.tranche.<family>_<op>`.
"""

from tranche import _library
from tranche import bits as bits
from tranche import limits as limits
from tranche import tree as tree

__version__ = _library.VERSION
