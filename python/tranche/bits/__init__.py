"""Integer bit switching: one stored weight, every precision from 8 to 2 bits, chosen call by call."""

from tranche.bits.modules import BitSwitchConv2d, BitSwitchLinear, at_bits, convert, set_bits
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
    "BitSwitchConv2d",
    "BitSwitchLinear",
    "PackedWeight",
    "at_bits",
    "convert",
    "dequantize",
    "int_linear",
    "linear",
    "materialize",
    "pack",
    "quantize",
    "quantize_activations",
    "round_bits",
    "set_bits",
    "unpack",
]
