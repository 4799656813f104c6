"""partial_conv2d, partial_conv2d_ and conv2d_slice against the reference, in every geometry and layout."""

from __future__ import annotations

import pytest
import torch

from tests.pconv.convolutions import Case, assert_correct, make_case, same_bits
from tranche.pconv import conv2d_slice, partial_conv2d, partial_conv2d_, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GEOMETRIES = {
    "plain": {},
    "bias": {"bias": True},
    "unaligned": {"width": 10, "start": 3},
    "twelve": {"width": 12, "shape": (1, 36, 6, 6)},
    "twenty": {"width": 20, "start": 1, "shape": (1, 44, 5, 4)},
    "thirty-six": {"width": 36, "shape": (1, 40, 4, 5)},
    "one channel": {"width": 1, "start": 5},
    "everything": {"width": 24},
    "1x1": {"kernel": (1, 1)},
    "7x7": {"kernel": (7, 7)},
    "1x11": {"kernel": (1, 11)},
    "11x1": {"kernel": (11, 1), "bias": True},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2, "bias": True},
    "odd groups": {"width": 9, "groups": 3, "start": 2},
    "depthwise": {"groups": 8, "start": 4, "bias": True},
    "depthwise 7x7": {"groups": 20, "width": 20, "kernel": (7, 7)},
    "one pixel": {"shape": (3, 24, 1, 1)},
    "one row": {"shape": (2, 24, 1, 9)},
    "one column": {"shape": (2, 24, 9, 1)},
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_against_reference(backend, geometry, dtype, channels_last):
    case = make_case(dtype=dtype, channels_last=channels_last, device=backend.device, **GEOMETRIES[geometry])
    before = case.x.clone()
    y = case.run(partial_conv2d)
    assert_correct(case, y, "partial_conv2d")
    assert y.stride() == torch.empty_like(case.x).stride()
    assert same_bits(case.x, before)
    rest = [i for i in range(case.x.size(1)) if not case.slice.start <= i < case.slice.stop]
    assert same_bits(y[:, rest], case.x[:, rest])
    part = case.run(conv2d_slice)
    assert same_bits(part, y[:, case.slice])
    case.run(partial_conv2d_)
    assert same_bits(case.x, y)


def test_fp64():
    for geometry in GEOMETRIES.values():
        case = make_case(dtype=torch.float64, **geometry)
        assert_correct(case, case.run(partial_conv2d), "partial_conv2d")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "out": 5},
        {"stride": (2, 1), "out": 40, "bias": True},
        {"padding": 0, "out": 3},
        {"padding": (3, 2), "start": 7},
        {"stride": 3, "dilation": 2, "padding": (1, 4), "out": 17},
        {"stride": 2, "groups": 4, "out": 12, "start": 1},
        {"stride": 2, "kernel": (2, 2), "padding": 0, "out": 16},
        {"stride": 2, "groups": 8},
    ],
)
def test_slices_of_any_stride_and_width(backend, options, channels_last):
    case = make_case(channels_last=channels_last, device=backend.device, **options)
    assert_correct(case, case.run(conv2d_slice), "conv2d_slice")


def test_integers_are_exact(backend):
    for dtype in FLOATS:
        case = make_case(dtype=dtype, integers=True, bias=True, start=3, device=backend.device)
        want = case.wider(torch.float64)
        assert torch.equal(case.run(partial_conv2d).double(), want.run(reference.partial_conv2d))


def test_strided_views(backend):
    whole = make_case(shape=(2, 24, 9, 14), device=backend.device)
    for view in (
        whole.x[:, :, :, ::2],
        whole.x.transpose(2, 3),
        whole.x[:, ::2],
        whole.x[:1].expand(3, -1, -1, -1),
    ):
        case = Case(view, whole.weight, None, {"padding": 1, "start": 2})
        assert_correct(case, case.run(partial_conv2d), "partial_conv2d")
        assert_correct(case, case.run(conv2d_slice), "conv2d_slice")


def test_in_place_in_a_larger_tensor(backend):
    whole = torch.randn(2, 30, 8, 9).to(backend.device)
    before = whole.clone()
    case = make_case(device=backend.device)
    view = whole[:, 3:27, 1:7]
    want = partial_conv2d(view, case.weight, padding=1, start=5)
    partial_conv2d_(view, case.weight, padding=1, start=5)
    assert same_bits(view, want)
    mask = torch.ones_like(whole, dtype=torch.bool)
    mask[:, 3:27, 1:7] = False
    assert torch.equal(whole[mask], before[mask])


@pytest.mark.parametrize("shape", [(0, 24, 5, 5), (2, 24, 0, 5), (2, 24, 5, 0)])
def test_empty(backend, shape):
    case = make_case(shape=shape, device=backend.device)
    assert case.run(partial_conv2d).shape == shape
    case.run(partial_conv2d_)
    assert make_case(shape=(0, 24, 5, 5), device=backend.device).run(conv2d_slice).shape == (0, 8, 5, 5)


def test_non_finite_values_stay_in_reach(backend):
    for dtype in FLOATS:
        case = make_case(dtype=dtype, start=4, device=backend.device)
        clean = case.run(partial_conv2d)
        case.x[0, 5, 4, 3] = torch.nan
        case.x[1, 4, 8, 6] = torch.inf
        case.x[0, 0] = torch.nan
        y = case.run(partial_conv2d)
        reached = torch.zeros(2, 1, 9, 7, dtype=torch.bool, device=backend.device)
        reached[0, :, 3:6, 2:5] = True
        reached[1, :, 7:, 5:] = True
        part = y[:, case.slice]
        assert torch.equal(~torch.isfinite(part), reached.expand_as(part))
        assert torch.isinf(part[1]).any() and not torch.isnan(part[1]).any()
        assert same_bits(part[~reached.expand_as(part)], clean[:, case.slice][~reached.expand_as(part)])
        assert torch.isnan(y[0, 0]).all() and torch.isfinite(y[0, 1:4]).all()


def test_the_largest_number_beside_an_infinity(backend):
    """inf - largest is inf: a sum that is done again sees every number as it was."""
    x = torch.zeros(1, 32, 4, 4, device=backend.device)
    weight = torch.zeros(32, 32, 1, 1, device=backend.device)
    x[0, 3], x[0, 5] = torch.inf, torch.finfo(torch.float32).max
    weight[:, 3], weight[:, 5] = 1, -1
    assert torch.isposinf(conv2d_slice(x, weight)).all()
    x[0, 3] = 1
    weight[:, 3], weight[:, 5] = torch.inf, -torch.finfo(torch.float32).max * 2.0**-127
    x[0, 5] = 2.0**127
    assert torch.isposinf(conv2d_slice(x, weight)).all()


@pytest.mark.parametrize("width", [16, 20, 36])
def test_infinities_and_the_largest_numbers(width):
    """Where products are taken in parts or overlap, as on AMX tiles, neither becomes NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(width=width, shape=(1, width, 6, 7), dtype=dtype)
        case.weight.copy_(case.weight.abs() + 2**-10)
        case.x[0, :, 3, 2] = torch.inf
        y = case.run(partial_conv2d)
        assert torch.isposinf(y[0, :, 2:5, 1:4]).all() and torch.isfinite(y[0, :, :, 4:]).all()
        largest = torch.finfo(dtype).max
        case.x.zero_()
        case.x[0, width - 1, 3, 2] = largest
        case.weight.fill_(0.5)
        y = case.run(partial_conv2d)
        assert torch.equal(y[0, :, 2:5, 1:4], torch.full((width, 3, 3), largest / 2, dtype=dtype))


@pytest.mark.parametrize("width", [8, 16, 36, 64])
def test_fp32_is_as_near_as_a_chain_of_fmas(width):
    """Sums of one sign, in which parts that are left out would add up."""
    case = make_case(width=width, shape=(1, width, 12, 9))
    case.x.abs_(), case.weight.abs_()
    want = case.wider(torch.float64).run(reference.partial_conv2d)
    error = (case.run(partial_conv2d).double() - want).abs() / want
    chain = (
        torch.finfo(torch.float32).eps / 2 * (9 * width) ** 0.5
    )  # roundings of as many additions, at random
    assert error.max() < 2 * chain and error.pow(2).mean().sqrt() < chain / 2


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_do_not_depend_on_neighbours(backend, dtype):
    case = make_case(
        shape=backend.pick((5, 24, 33, 20), (3, 24, 9, 7)), width=12, dtype=dtype, device=backend.device
    )
    y = case.run(partial_conv2d)
    # one image alone, the other layout, another place among the channels, and a crop with its halo
    assert same_bits(partial_conv2d(case.x[2:3], case.weight, padding=1), y[2:3])
    other = partial_conv2d(case.x.contiguous(memory_format=torch.channels_last), case.weight, padding=1)
    assert same_bits(other, y)
    moved = torch.cat([case.x[:, 12:15], case.x[:, :12]], dim=1)
    assert same_bits(partial_conv2d(moved, case.weight, padding=1, start=3)[:, 3:], y[:, :12])
    crop = conv2d_slice(case.x[:, :, 2:6, 1:5], case.weight)
    assert same_bits(crop, y[:, :12, 3:5, 2:4])
    # some of the outputs alone
    assert same_bits(conv2d_slice(case.x, case.weight[3:8], padding=1), y[:, 3:8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_number_of_threads(dtype):
    case = make_case(shape=(3, 40, 20, 20), width=36, dtype=dtype, channels_last=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(case.run(partial_conv2d))
            x = case.x.clone()
            partial_conv2d_(x, case.weight, **case.options)
            results.append(x)
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"width": 1024, "kernel": (1, 1)},
        {"width": 2048, "kernel": (1, 1)},
        {"width": 512, "kernel": (2, 2), "stride": 2, "padding": 0},
        {"width": 1024, "kernel": (3, 3), "groups": 2},
    ],
)
def test_pixels_4_kb_apart(dtype, options):
    """They are spread where they are packed, and the bits are those of a pixel alone."""
    channels = options["width"] * options.get("groups", 1)
    case = make_case(shape=(2, channels, 4, 6), out=20, dtype=dtype, channels_last=True, **options)
    want = case.run(conv2d_slice)
    assert_correct(case, want, "conv2d_slice")
    case.x = case.x[1:]
    assert same_bits(case.run(conv2d_slice), want[1:])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": (1, 1), "width": 256},
        {"groups": 2},
        {"stride": 2, "out": 130},
        {"stride": 2, "out": 130, "width": 256, "kernel": (2, 2), "padding": 0},
    ],
)
def test_few_pixels_of_many_channels(dtype, options):
    """Threads share channels instead of pixels: the bits are those of a batch, whatever the threads."""
    given = {"width": 128, "out": 256, "bias": True, "channels_last": True}
    case = make_case(shape=(16, 256, 3, 3), dtype=dtype, **(given | options))
    want = case.run(conv2d_slice)
    assert_correct(case, want, "conv2d_slice")
    case.x = case.x[5:6]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert same_bits(case.run(conv2d_slice), want[5:6])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"width": 3, "kernel": (4, 4), "stride": 4},
        {"width": 3, "kernel": (2, 3), "stride": 2, "dilation": 2},
        {"width": 12, "kernel": (2, 2), "stride": 2},
        {"width": 64, "kernel": (2, 2), "stride": 2},
        {"width": 34, "kernel": (2, 3), "stride": (1, 2)},
        {"width": 8, "kernel": (3, 2), "stride": (1, 3), "groups": 2},
        {"width": 50, "kernel": (3, 3)},
        {"width": 20, "kernel": (1, 1)},
    ],
)
def test_windows_without_padding(dtype, options):
    """Windows may lie side by side in x, and be packed so: the bits are those of any other layout."""
    given = {"out": 40, "bias": True, "channels_last": True, "padding": 0, "dtype": dtype}
    case = make_case(shape=(3, options["width"], 13, 17), **(given | options))
    want = case.run(conv2d_slice)
    assert_correct(case, want, "conv2d_slice")
    around = torch.full((3, options["width"] + 5, 15, 19), torch.nan, dtype=dtype)
    around = around.contiguous(memory_format=torch.channels_last)[:, :, 1:-1, 1:-1]
    around[:, 2:-3] = case.x
    for x, start in ((case.x.contiguous(), 0), (around, 2), (case.x[1:], 0)):
        got = conv2d_slice(x, case.weight, case.bias, **(case.options | {"start": start}))
        assert same_bits(got, want[-x.size(0) :])


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (4, 6)])
def test_images_of_single_pixels_follow_one_another(backend, size):
    case = make_case(shape=(5, 24, *size), width=20, out=33, kernel=(1, 1), start=2, device=backend.device)
    for channels_last in (False, True):
        if channels_last:
            case.x = case.x.to(memory_format=torch.channels_last)
        y = case.run(conv2d_slice)
        assert_correct(case, y, "conv2d_slice")
        whole = case.x
        for b in range(5):
            case.x = whole[b : b + 1]
            assert same_bits(case.run(conv2d_slice), y[b : b + 1])
        case.x = whole[::2]  # apart
        assert same_bits(case.run(conv2d_slice), y[::2])
        case.x = whole


def test_start_and_width_are_run_time_values(backend):
    x = make_case(device=backend.device).x
    traces = 0

    def count(graph, _):
        nonlocal traces
        traces += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w, start: partial_conv2d(x, w, padding=1, start=start),
        backend=count,
        fullgraph=True,
        dynamic=True,
    )
    for start in range(2, 7):
        weight = torch.randn(4 + start, 4 + start, 3, 3, device=backend.device)
        assert same_bits(compiled(x, weight, start), partial_conv2d(x, weight, padding=1, start=start))
    assert traces == 1


def test_compile_and_export(backend):
    case = make_case(start=3, bias=True, channels_last=True, device=backend.device)

    class Model(torch.nn.Module):
        def forward(self, x, weight, bias):
            return partial_conv2d(x, weight, bias, padding=1, start=3).relu() + 1

    arguments = (case.x, case.weight, case.bias)
    want = Model()(*arguments)
    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(*arguments), want)
    assert same_bits(torch.export.export(Model(), arguments).module()(*arguments), want)


def test_opcheck(backend):
    for options in ({}, {"bias": True, "channels_last": True, "start": 2}, {"groups": 8}):
        case = make_case(shape=(1, 12, 3, 4), device=backend.device, **options)
        pairs = ([1, 1], [1, 1], [1, 1], options.get("groups", 1), options.get("start", 0))
        for name in ("partial_conv2d", "conv2d_slice", "partial_conv2d_"):
            op = getattr(backend.ops(), name).default
            torch.library.opcheck(op, (case.x.clone(), case.weight, case.bias, *pairs))
        x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        for name in ("partial_conv2d", "conv2d_slice"):
            torch.library.opcheck(getattr(backend.ops(), name).default, (x, weight, case.bias, *pairs))
