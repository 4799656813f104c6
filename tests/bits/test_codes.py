"""Rounding, packing and the way back: every code at every precision, and the layout byte for byte."""

from __future__ import annotations

import pytest
import torch

from tranche import bits
from tranche.bits import reference

ALL_BITS = range(2, 9)
LAYOUTS = ["guarded", "single"]
SHAPES = [(1, 1), (16, 32), (15, 31), (17, 33), (40, 100), (0, 5), (5, 0), (0, 0)]


def random_codes(rows, inputs, device="cpu"):
    return torch.randint(-128, 128, (rows, inputs), dtype=torch.int8).to(device)


@pytest.mark.parametrize("width", ALL_BITS)
def test_all_codes_round_half_up_and_saturate(backend, width):
    codes = torch.arange(-128, 128, dtype=torch.int32)
    step = 2 ** (8 - width)
    want = torch.floor(codes / step + (0.5 if width < 8 else 0)).clamp(max=2 ** (width - 1) - 1)
    got = bits.round_bits(codes.to(torch.int8).to(backend.device), width)
    assert torch.equal(got.cpu(), want.to(torch.int8))
    assert torch.equal(reference.round_bits(codes.to(torch.int8), width), want.to(torch.int8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", ALL_BITS)
def test_all_codes_in_every_place_of_a_tile(backend, width, layout):
    # every code meets every field position, and one more row and column start new tiles
    base = torch.arange(256).view(256, 1) + 37 * torch.arange(33)
    codes = ((base % 256) - 128).to(torch.int8)[: backend.pick(256, 49)].to(backend.device)
    packed = bits.pack(codes, layout=layout)
    assert torch.equal(bits.unpack(packed, width), reference.round_bits(codes, width))
    ones = torch.eye(
        33, dtype=torch.int8, device=backend.device
    )  # the weights one by one, as products decode them
    assert torch.equal(bits.int_linear(ones, packed, width).T, reference.round_bits(codes, width).int())
    assert torch.equal(
        bits.int_linear(ones[7:8], packed, width)[0], reference.round_bits(codes, width)[:, 7].int()
    )


def test_rounding_twice_is_another_rounding():
    codes = torch.arange(-128, 128, dtype=torch.int8)
    chained = reference.round_bits(reference.round_bits(codes, 4) * 16, 2)
    assert int((chained != reference.round_bits(codes, 2)).sum()) == 24


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layout(backend, shape, layout):
    codes = random_codes(*shape, device=backend.device)
    packed = bits.pack(codes, layout=layout)
    assert packed.data.numel() == 512 * -(-shape[0] // 16) * -(-shape[1] // 32)
    assert torch.equal(packed.data, reference.pack(codes, layout=layout).data)
    for width in (2, 5, 8):
        plain = bits.materialize(packed, width)
        assert torch.equal(plain.data, reference.materialize(packed, width).data)
        assert torch.equal(plain.data, reference.materialize(bits.pack(codes), width).data)
        assert torch.equal(bits.unpack(plain, width), reference.round_bits(codes, width))
        assert torch.equal(bits.unpack(packed, width), reference.unpack(packed, width))


def test_the_layouts_as_the_page_draws_them():
    codes = torch.full((16, 32), -128, dtype=torch.int8)  # u = 0
    codes[3, 16 * 1 + 4 * 2 + 1] = 127  # u = 255: row 3, q = 1, s = 2, j = 1
    data = reference.pack(codes).data
    two, one = 64 * 1 + 4 * 3 + 1, 4 * 3 + 1
    want = torch.zeros(512, dtype=torch.uint8)
    for start in (0, 192, 320):
        want[start + two] = 0b11 << 4
    for start in (128, 448):
        want[start + one] = 1 << 5
    assert torch.equal(data, want)
    codes[3, 16 * 1 + 4 * 2 + 1] = 0b1011_0010 - 128
    want = torch.zeros(512, dtype=torch.uint8)
    for plane, bit in enumerate((1, 0, 1, 1, 0, 0, 1, 0)):
        want[64 * plane + one] = bit << 5
    assert torch.equal(reference.pack(codes, layout="single").data, want)


def test_bytes_that_a_precision_reads():
    codes = random_codes(32, 64)
    eighths = {"guarded": (3, 5, 5, 7, 7, 8, 8), "single": (3, 4, 5, 6, 7, 8, 8)}
    for layout, expected in eighths.items():
        packed = bits.pack(codes, layout=layout)
        assert tuple(packed.bytes_read(width) // 256 for width in ALL_BITS) == expected
        assert bits.materialize(packed, 3).bytes_read(3) == 2048


def test_pack_refuses():
    with pytest.raises(
        ValueError, match=r'tranche\.bits\.pack: expected layout "guarded" or "single", got \'triple\''
    ):
        bits.pack(random_codes(3, 3), layout="triple")
    with pytest.raises(
        ValueError, match=r"bits_pack: expected layout 1 \(guarded planes\) or 2 \(single planes\), got 18"
    ):
        torch.ops.tranche.bits_pack(random_codes(3, 3), 18)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", ALL_BITS)
def test_slices_that_a_precision_does_not_need_are_not_read(backend, width, layout):
    codes = random_codes(20, 40, backend.device)
    packed = bits.pack(codes, layout=layout)
    spoilt = packed.data.clone()
    spoilt[packed.bytes_read(width) :] ^= 0xFF
    other = bits.PackedWeight(spoilt, 20, 40, packed.layout)
    assert torch.equal(bits.unpack(other, width), bits.unpack(packed, width))
    for rows in (1, 3, 9):
        x = random_codes(rows, 40, backend.device)
        assert torch.equal(bits.int_linear(x, other, width), bits.int_linear(x, packed, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [None, 32])
def test_dequantize(backend, dtype, groups):
    weight = torch.randn(20, 64, device=backend.device)
    codes, scale = bits.quantize(weight, group_size=groups)
    for layout in LAYOUTS:
        packed = bits.pack(codes, layout=layout)
        for width in ALL_BITS:
            got = bits.dequantize(packed, scale, width, dtype)
            assert torch.equal(got, reference.dequantize(packed, scale, width, dtype))


def test_quantize():
    weight = torch.randn(6, 64)
    weight[1] = 0
    weight[2, 3] = torch.nan
    codes, scale = bits.quantize(weight)
    assert torch.equal(codes[0], (weight[0] / (weight[0].abs().max() / 127)).round().to(torch.int8))
    assert scale[1] == 1 and not codes[1].any()
    assert scale[2].isnan()
    given, same = bits.quantize(weight.nan_to_num(0), scale=torch.full((6,), 1e-3))
    assert given.min() == -128 and given.max() == 127 and torch.equal(same, torch.full((6,), 1e-3))
    assert bits.quantize(weight, group_size=32)[1].shape == (6, 2)


def test_quantize_refuses():
    with pytest.raises(
        ValueError, match=r"tranche\.bits\.quantize: expected a floating-point weight of shape"
    ):
        bits.quantize(torch.ones(3, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match="a multiple of 32 that divides 48, got 32"):
        bits.quantize(torch.ones(3, 48), group_size=32)
    with pytest.raises(ValueError, match=r"expected scale of shape \[3, 2\], got \[3\]"):
        bits.quantize(torch.ones(3, 64), scale=torch.ones(3), group_size=32)


# ---- activations ------------------------------------------------------------------------------------------------


def assert_quantized_like_the_reference(x):
    for got, want in zip(bits.quantize_activations(x), reference.quantize_activations(x), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert torch.equal(got, want) or torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inputs", [0, 1, 31, 64, 65, 300])
def test_activations(backend, dtype, inputs):
    x = torch.randn(2, 3, inputs, device=backend.device).to(dtype)
    assert_quantized_like_the_reference(x)
    assert_quantized_like_the_reference(x.transpose(0, 1))


def test_strange_activations(backend):
    x = torch.randn(10, 70)
    x[0] = 0
    x[1, 5] = torch.nan
    x[2, 69] = -torch.inf
    x[3] *= 1e38
    x[4] *= 1e-42  # subnormal
    x[5] *= 1e-31  # just above and below the least absmax
    x[6] = torch.arange(70) - 35.5  # ties
    x[7, 1:] = 0
    x[8] = -1
    x = x.to(backend.device)
    codes, scale, row_sum = bits.quantize_activations(x)
    assert_quantized_like_the_reference(x)
    assert scale.isnan().flatten().tolist() == [False, True, True, *[False] * 7]
    assert not codes[:3].any() and not row_sum[:3].any()
    assert (codes[8] == -127).all()
