"""Kernels over PyTorch that compute only the part of a network that matters.

The families are packages of this one: `tranche.tree` (draft trees for speculative decoding), `tranche.moe` (mixtures of
experts for few tokens), `tranche.bits` (one stored weight for every precision) and `tranche.pconv` (partial
convolution). Each offers typed functions and modules; the raw ops behind them are `torch.ops.tranche.<family>_<op>`.
Without their family's name are those of pconv (`partial_conv2d`, `partial_mlp`, `partial_attention`, `conv2d_slice`,
`channel_stats`, `channel_gate`); the `row_*` and `limit_*` ops belong to `tranche.rows` and `tranche.limits`.

`tranche.decode`, speculative decoding with these, needs transformers and is imported by itself:
`import tranche.decode`.
"""

import sys as _sys

try:
    from tranche import _library
except ImportError as error:
    if _sys.argv[:1] == ["-m"] and "--check" in _sys.argv:  # python -m tranche --check asks for this sentence
        raise SystemExit(f"tranche: {error}") from None
    raise

from tranche import bits as bits
from tranche import byte_llama as byte_llama
from tranche import corpus as corpus
from tranche import limits as limits
from tranche import moe as moe
from tranche import pconv as pconv
from tranche import rows as rows
from tranche import tree as tree

__version__ = _library.VERSION
