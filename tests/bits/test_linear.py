"""int_linear and linear: exact integers, floats within the rule, rows that do not see their neighbours."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys

import pytest
import torch

from tranche import bits
from tranche.bits import reference

ALL_BITS = range(2, 9)
LAYOUTS = ["guarded", "single"]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def make_weight(rows, inputs, group_size=None, device="cpu", layout="guarded"):
    codes, scale = bits.quantize(torch.randn(rows, inputs), group_size=group_size)
    codes.view(-1)[: codes.numel() // 3].random_(-128, 128)
    return bits.pack(codes.to(device), layout=layout), scale.to(device)


def random_codes(rows, inputs, device="cpu"):
    return torch.randint(-128, 128, (rows, inputs), dtype=torch.int8).to(device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", ALL_BITS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 17, 33, 70])
def test_integers_are_exact(backend, rows, width, layout):
    for outputs, inputs in ((1, 1), (17, 33), backend.pick((50, 1000), (20, 300))):
        packed, _ = make_weight(outputs, inputs, device=backend.device, layout=layout)
        x = random_codes(rows, inputs, backend.device)
        want = reference.int_linear(x, packed, width)
        assert torch.equal(bits.int_linear(x, packed, width), want)
        assert torch.equal(bits.int_linear(x, bits.materialize(packed, width), width), want)


@pytest.mark.parametrize("width", ALL_BITS)
@pytest.mark.parametrize("rows", [1, 6])
def test_extreme_sums_over_many_inputs(backend, rows, width):
    inputs = backend.pick(131071, 5003)
    codes = torch.full((3, inputs), -128, dtype=torch.int8, device=backend.device)
    codes[1], codes[2] = 127, random_codes(1, inputs, backend.device)
    packed = bits.pack(codes)
    for value in (-128, 127):
        x = torch.full((rows, inputs), value, dtype=torch.int8, device=backend.device)
        rounded = reference.round_bits(codes, width).long()
        want = (value * rounded.sum(1)).to(torch.int32).expand(rows, 3)
        assert torch.equal(bits.int_linear(x, packed, width), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inputs", [2, 31, 63, 100, 257, 1023, 4097, 100_003])
def test_any_number_of_inputs(backend, inputs, layout):
    inputs = backend.pick(inputs, inputs % 1000)
    packed, scale = make_weight(5, inputs, device=backend.device, layout=layout)
    for rows in (1, 7):
        x = random_codes(rows, inputs, backend.device)
        for width in backend.pick(ALL_BITS, (2, 4, 8)):
            assert torch.equal(bits.int_linear(x, packed, width), reference.int_linear(x, packed, width))
        assert_close(x.float(), packed, scale, 8)


def assert_close(x, packed, scale, width, bias=None, activation_bits=None):
    """No worse than twice the error of the same computation in plain torch in the same dtype, plus one rounding."""
    got = bits.linear(x, packed, scale, width, bias, activation_bits=activation_bits)
    assert got.dtype == x.dtype and got.shape == (*x.shape[:-1], packed.out_features)
    want = reference.linear(x, packed, scale, width, bias, activation_bits=activation_bits)
    plain = reference.linear(
        x, packed, scale, width, bias, activation_bits=activation_bits, compute_dtype=torch.float32
    ).to(x.dtype)
    one_rounding = want.abs().max() * torch.finfo(x.dtype).eps if want.numel() else 0.0
    error = (got.double() - want).abs().max() if want.numel() else 0.0
    allowed = 2 * (plain.double() - want).abs().max() + one_rounding if want.numel() else 0.0
    assert error <= allowed


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("group_size", [None, 32, 64, 96])
def test_linear(backend, dtype, activation_bits, group_size):
    outputs, inputs = backend.pick((70, 576), (20, 192))
    packed, scale = make_weight(outputs, inputs, group_size, backend.device)
    bias = torch.randn(outputs, device=backend.device)
    for rows, width in ((1, 2), (1, 8), (2, 3), (5, 4), (9, 6), (40, 8), (40, 2)):
        x = torch.randn(rows, inputs, device=backend.device).to(dtype)
        assert_close(x, packed, scale, width, bias if rows % 2 else None, activation_bits)
    single = bits.pack(bits.unpack(packed), layout="single")
    for width in (3, 4, 5, 8):
        for rows in (1, 3, 12):
            x = torch.randn(rows, inputs, device=backend.device).to(dtype)
            first, *others = (
                bits.linear(x, w, scale, width, bias, activation_bits=activation_bits)
                for w in (packed, single, bits.materialize(single, width))
            )
            assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_shapes_of_x(backend, activation_bits):
    # many outputs: the largest of a few errors of plain torch is small by luck
    packed, scale = make_weight(146, 40, device=backend.device)
    for shape in ((40,), (3, 40), (2, 3, 40), (0, 40), (2, 0, 40)):
        assert_close(torch.randn(shape, device=backend.device), packed, scale, 4, None, activation_bits)
    strided = torch.randn(3, 80, device=backend.device)[:, ::2]
    assert_close(strided, packed, scale, 4, None, activation_bits)
    empty, no_scale = make_weight(0, 40, device=backend.device)
    assert bits.linear(torch.randn(3, 40, device=backend.device), empty, no_scale, 4).shape == (3, 0)
    no_inputs, ones = bits.pack(random_codes(5, 0, backend.device)), torch.ones(5, device=backend.device)
    bias = torch.randn(5, device=backend.device)
    x = torch.ones(2, 0, device=backend.device)
    got = bits.linear(x, no_inputs, ones, 4, bias, activation_bits=activation_bits)
    assert torch.equal(got, bias.expand(2, 5))
    assert not bits.int_linear(x.to(torch.int8), no_inputs, 4).any()


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("group_size", [None, 64])
def test_rows_do_not_depend_on_their_neighbours(backend, activation_bits, group_size):
    outputs, inputs = backend.pick((50, 1024), (20, 320))
    packed, scale = make_weight(outputs, inputs, group_size, backend.device)
    x = torch.randn(backend.pick(67, 20), inputs, device=backend.device).to(torch.bfloat16)
    for width in backend.pick((2, 4, 8), (4,)):
        whole = bits.linear(x, packed, scale, width, activation_bits=activation_bits)
        for count in (1, 2, 3, 4, 5, 8, 9, 17):
            part = bits.linear(x[-count:], packed, scale, width, activation_bits=activation_bits)
            assert torch.equal(part, whole[-count:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("inputs", "group_size"), [(40, None), (1500, None), (2336, None), (2304, 1152)])
def test_a_row_alone_at_every_precision(dtype, layout, inputs, group_size):
    """It may meet weights in registers: blocks several at once, one at a time, and cut short."""
    packed, scale = make_weight(35, inputs, group_size, layout=layout)
    x = torch.randn(9, inputs).to(dtype)
    for width in ALL_BITS:
        whole = bits.linear(x, packed, scale, width)
        assert torch.equal(bits.linear(x[4:5], packed, scale, width), whole[4:5])


def test_any_number_of_threads():
    packed, scale = make_weight(600, 512)
    x = torch.randn(9, 512)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [[bits.linear(x, packed, scale, 4, activation_bits=a) for a in (None, 8)]]
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_non_finite_rows_stay_alone(backend, special, activation_bits):
    packed, scale = make_weight(18, 70, device=backend.device)
    for rows in (3, 12):
        x = torch.randn(rows, 70, device=backend.device)
        want = bits.linear(x, packed, scale, 4, activation_bits=activation_bits)
        x[1, 7] = special
        got = bits.linear(x, packed, scale, 4, activation_bits=activation_bits)
        others = [row for row in range(rows) if row != 1]
        assert torch.equal(got[others], want[others])
        if activation_bits == 8 or special != special:
            assert got[1].isnan().all()


def test_zero_and_huge_activations(backend):
    packed, scale = make_weight(18, 70, device=backend.device)
    x = torch.zeros(2, 70, device=backend.device)
    x[1] = 3e38
    got = bits.linear(x, packed, scale * 1e-6, 4, activation_bits=8)
    assert not got[0].any() and got[1].isfinite().all()


# ---- every instruction set --------------------------------------------------------------------------------------

DIGEST = """
import torch
from tests.bits.test_linear import digest
from tranche import _host
print(_host.build_info()["isa"], digest())
"""


def digest():
    """The bits of everything that must not depend on the instruction set."""
    torch.manual_seed(0)
    state = hashlib.sha256()
    shapes = ((1, 1, None), (40, 300, None), (33, 192, 64), (20, 192, 96))
    for layout, (outputs, inputs, group_size) in itertools.product(LAYOUTS, shapes):
        packed, scale = make_weight(outputs, inputs, group_size, layout=layout)
        state.update(packed.data.numpy().tobytes())
        for rows in (1, 2, 3, 5, 9, 40):
            codes, x = random_codes(rows, inputs), torch.randn(rows, inputs)
            for width in ALL_BITS:
                state.update(bits.int_linear(codes, packed, width).numpy().tobytes())
                state.update(bits.linear(x, packed, scale, width, activation_bits=8).numpy().tobytes())
            for part in bits.quantize_activations(x):
                state.update(part.numpy().tobytes())
    return state.hexdigest()


def test_every_instruction_set_gives_the_same_integers():
    results = {}
    for isa in ("baseline", "avx2", "avx512", "amx"):
        run = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "TRANCHE_ISA": isa},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        name, value = run.stdout.split()
        results[name] = value
    assert "baseline" in results
    assert len(set(results.values())) == 1, results


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("linear", lambda x, weight, scale: bits.linear(x, weight, scale, 4)),
        ("linear", lambda x, weight, scale: bits.linear(x.requires_grad_(), weight, scale, 4)),
        ("int_linear", lambda x, weight, scale: bits.int_linear(x.to(torch.int8), weight, 4)),
        ("dequantize", lambda x, weight, scale: bits.dequantize(weight, scale, 4)),
        ("unpack", lambda x, weight, scale: bits.unpack(weight, 4)),
        ("materialize", lambda x, weight, scale: bits.materialize(weight, 4)),
    ],
)
def test_codes_in_place_of_a_packed_weight(function, call):
    codes, scale = bits.quantize(torch.randn(18, 64))
    message = (
        rf"^tranche\.bits\.{function}: expected a PackedWeight, got a Tensor\. Use bits\.pack\(codes\)\.$"
    )
    with pytest.raises(TypeError, match=message):
        call(torch.randn(2, 64), codes, scale)


def test_bad_input(backend):
    packed, scale = make_weight(18, 64, device=backend.device)
    x = torch.randn(2, 64, device=backend.device)
    for wrong in (1, 9, 0, -4):
        with pytest.raises(ValueError, match=rf"tranche\.bits_linear: expected bits in .*, got {wrong}\."):
            bits.linear(x, packed, scale, wrong)
        with pytest.raises(ValueError, match="expected bits in"):
            bits.round_bits(random_codes(2, 2, backend.device), wrong)
    for version in (0, 3, 17, 25):
        other_version = bits.PackedWeight(packed.data, 18, 64, layout=version)
        with pytest.raises(
            ValueError,
            match=rf"expected layout 1 .*, 2 .*, got {version}\. Another version packed this weight",
        ):
            bits.linear(x, other_version, scale, 4)
    with pytest.raises(ValueError, match=r"expected bits == 4, for which the weight was materialized, got 8"):
        bits.linear(x, bits.materialize(packed, 4), scale, 8)
    unpacked = bits.PackedWeight(random_codes(18, 64, backend.device), 18, 64)
    with pytest.raises(ValueError, match=r"expected data of dtype torch\.uint8, got torch\.int8"):
        bits.linear(x, unpacked, scale, 4)
    with pytest.raises(ValueError, match="expected data of 2048 bytes for 18 x 64 codes, got 2047"):
        bits.linear(x, bits.PackedWeight(packed.data[:-1], 18, 64), scale, 4)
    with pytest.raises(ValueError, match="expected data aligned to 16 bytes"):
        bits.linear(x, bits.PackedWeight(torch.cat([packed.data[:1], packed.data])[1:], 18, 64), scale, 4)
    with pytest.raises(ValueError, match=r"expected x\.size\(-1\) == in_features \(64\), got 63"):
        bits.linear(x[:, :63], packed, scale, 4)
    with pytest.raises(ValueError, match="expected activation_bits None or 8, got 4"):
        bits.linear(x, packed, scale, 4, activation_bits=4)
    with pytest.raises(
        ValueError,
        match=r"expected x of dtype torch\.float32 or torch\.float16 or torch\.bfloat16, got torch\.float64",
    ):
        bits.linear(x.double(), packed, scale, 4)
    with pytest.raises(ValueError, match=r"expected scale\.size\(0\) == out_features \(18\), got 17"):
        bits.linear(x, packed, scale[:17], 4)
    with pytest.raises(ValueError, match="groups of a multiple of 32, got 4"):
        bits.linear(x, packed, scale[:, None].repeat(1, 4), 4)
    with pytest.raises(ValueError, match=r"expected bias of shape \[O\] = \[18\], got \[17\]"):
        bits.linear(x, packed, scale, 4, scale[:17])
    with pytest.raises(
        ValueError, match=r"tranche\.bits_int_linear: expected x of dtype torch.int8, got torch.float32"
    ):
        bits.int_linear(x, packed, 4)
    with pytest.raises(
        ValueError, match=r"tranche\.bits_pack: expected codes of dtype torch.int8, got torch.float32"
    ):
        bits.pack(x)
    wide = bits.pack(torch.zeros(1, 131072, dtype=torch.int8, device=backend.device))
    with pytest.raises(ValueError, match="expected at most 131071 inputs to sum in 32 bits, got 131072"):
        bits.int_linear(torch.zeros(1, 131072, dtype=torch.int8, device=backend.device), wide, 4)


# ---- torch ------------------------------------------------------------------------------------------------------


def test_opcheck(backend):
    packed, scale = make_weight(18, 64, device=backend.device)
    flat, single = (18, 64, 1, 4), bits.pack(bits.unpack(packed), layout="single")
    x, codes = torch.randn(3, 64, device=backend.device), random_codes(3, 64, backend.device)
    ops = backend.ops()
    for op, arguments in (
        (ops.bits_round, (codes, 4)),
        (ops.bits_pack, (codes,)),
        (ops.bits_pack, (codes, 2)),
        (ops.bits_unpack, (packed.data, *flat)),
        (ops.bits_materialize, (packed.data, *flat)),
        (ops.bits_dequantize, (packed.data, scale, *flat, torch.float16)),
        (ops.bits_quantize_activations, (x,)),
        (ops.bits_int_linear, (codes, packed.data, *flat)),
        (ops.bits_linear, (x, packed.data, scale, *flat)),
        (ops.bits_linear, (x, single.data, scale, 18, 64, 2, 3)),
        (ops.bits_linear, (x, packed.data, scale, *flat, scale, 8)),
    ):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_gradients_flow_to_x_and_bias(backend, activation_bits):
    packed, scale = make_weight(18, 64, device=backend.device)
    x = torch.randn(2, 3, 64, device=backend.device, requires_grad=True)
    bias = torch.randn(18, device=backend.device, requires_grad=True)
    grad = torch.randn(2, 3, 18, device=backend.device)
    bits.linear(x, packed, scale, 4, bias, activation_bits=activation_bits).backward(grad)
    assert torch.allclose(x.grad, grad @ reference.dequantize(packed, scale, 4, torch.float32), atol=1e-4)
    assert torch.allclose(bias.grad, grad.sum((0, 1)), atol=1e-5)
