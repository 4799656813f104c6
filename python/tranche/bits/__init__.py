"""Integer bit switching: one stored weight, every precision from 8 to 2 bits, chosen call by call."""

from tranche.bits.ops import (
    dequantize,
    int_linear,
    linear,
    materialize,
    pack,
    quantize,
    quantize_activations,
    round_bits,
    unpack,
)
from tranche.bits.packed import PackedWeight

__all__ = [
    "PackedWeight",
    "dequantize",
    "int_linear",
    "linear",
    "materialize",
    "pack",
    "quantize",
    "quantize_activations",
    "round_bits",
    "unpack",
]
