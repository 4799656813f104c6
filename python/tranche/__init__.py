"""Kernels over PyTorch that compute only the part of a network that matters.

The families are packages of this one: `tranche.tree` (draft trees for speculative decoding) and
`tranche.pconv` (partial convolution). Each offers typed
functions and modules; the raw ops behind them are `torch.ops.tranche.<family>_<op>`.
"""

from tranche import _library
from tranche import limits as limits
from tranche import pconv as pconv
from tranche import tree as tree

__version__ = _library.VERSION
