"""Integer bit switching: one stored weight, every precision from 8 to 2 bits, chosen call by call."""

from tranche.bits.allocation import allocate_bits, hessian_traces, weight_errors
from tranche.bits.fake_quantize import fake_quantize, fake_quantize_activations
from tranche.bits.modules import BitSwitchConv2d, BitSwitchLinear, convert
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
from tranche.bits.qat import QATConv2d, QATLinear, SwitchBatchNorm, calibrate, convert_qat, prepare_qat
from tranche.bits.switch import at_bits, set_bits
from tranche.bits.training import ALRS, HASBSampler, JointTrainer

__all__ = [
    "ALRS",
    "BitSwitchConv2d",
    "BitSwitchLinear",
    "HASBSampler",
    "JointTrainer",
    "PackedWeight",
    "QATConv2d",
    "QATLinear",
    "SwitchBatchNorm",
    "allocate_bits",
    "at_bits",
    "calibrate",
    "convert",
    "convert_qat",
    "dequantize",
    "fake_quantize",
    "fake_quantize_activations",
    "hessian_traces",
    "int_linear",
    "linear",
    "materialize",
    "pack",
    "prepare_qat",
    "quantize",
    "quantize_activations",
    "round_bits",
    "set_bits",
    "unpack",
    "weight_errors",
]
