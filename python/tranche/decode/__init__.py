"""Lossless speculative decoding of transformers models: `generate`, and the drafters that speed it up."""

from tranche.decode.drafter import Context, Drafter

__all__ = ["Context", "Drafter"]
