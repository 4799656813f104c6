"""partial_attention against the reference, in every layout and size, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.pconv.convolutions import same_bits
from tranche import testing
from tranche.pconv import conv2d_pack, partial_attention, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Attention:
    """The arguments of one call."""

    x: Tensor
    start: int
    weights: list[Tensor]  # qkv_weight, qkv_bias, proj_weight, proj_bias, bias
    heads: int

    def run(self, function=partial_attention, **options) -> Tensor:
        return function(self.x, self.start, *self.weights, self.heads, **options)

    def to(self, *args) -> Attention:
        return replace(self, x=self.x.to(*args), weights=[w.to(*args) for w in self.weights])

    def packed(self) -> dict[str, Tensor]:
        qkv_weight, qkv_bias, proj_weight, proj_bias, _ = self.weights
        return {
            "qkv_packed": conv2d_pack(qkv_weight[:, :, None, None], qkv_bias),
            "proj_packed": conv2d_pack(proj_weight[:, :, None, None], proj_bias),
        }


def draw(batch=2, channels=24, height=3, width=5, *, start=4, heads=1, dtype=torch.float32, device="cpu"):
    """Scores of a few units, so that softmax neither picks one key nor takes all alike."""
    n, pixels = channels - start, height * width
    x = torch.randn(batch, channels, height, width) * 2 + 1
    qkv, proj = torch.randn(3 * n, n) / n**0.5, torch.randn(n, n) / n**0.5
    biases = torch.randn(3 * n) / 2, torch.randn(n) / 2, torch.randn(heads, pixels, pixels)
    return Attention(x, start, [qkv, biases[0], proj, *biases[1:]], heads).to(device, dtype)


def layouts(x: Tensor) -> Iterator[Tensor]:
    """x in other memory formats, and as views of larger tensors."""
    yield x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    wide = torch.full((batch, channels + 3, height, width + 2), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, 2:-1, :, 1:-1] = x
    yield wide[:, 2:-1, :, 1:-1]
    yield wide.contiguous(memory_format=torch.channels_last)[:, 2:-1, :, 1:-1]
    yield x.transpose(2, 3).contiguous().transpose(2, 3)


def assert_correct(case: Attention, got: Tensor) -> None:
    exact, plain = (
        case.to(torch.float64).run(reference.partial_attention),
        case.run(reference.partial_attention),
    )
    assert got.dtype == case.x.dtype and got.shape == exact.shape
    error, yardstick = (got.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    roundings = 32 if got.dtype == torch.float64 else 8 if got.dtype == torch.float32 else 2
    assert error <= 2 * yardstick + roundings * torch.finfo(got.dtype).eps * exact.abs().max(), (
        error,
        yardstick,
    )
    assert same_bits(got[:, : case.start], case.x[:, : case.start])


SIZES = {
    "plain": {},
    "heads": {"heads": 4},
    "all channels": {"start": 0, "heads": 4},
    "one channel": {"channels": 3, "start": 2},
    "odd": {"batch": 3, "channels": 26, "start": 5, "heads": 3, "height": 7, "width": 1},
    "one pixel": {"height": 1, "width": 1, "heads": 2},
    "a panel of keys": {"batch": 1, "height": 4, "width": 8, "heads": 2},
    "a key more": {"batch": 1, "height": 3, "width": 11, "heads": 2},
    "as in T0": {"channels": 64, "start": 16, "height": 7, "width": 7, "heads": 4},
    "wide heads": {"batch": 1, "channels": 80, "start": 10, "height": 3, "width": 3},
    "wider heads": {"batch": 1, "channels": 150, "start": 0, "height": 2, "width": 3},
    "several blocks": {"batch": 1, "channels": 270, "start": 1, "height": 2, "width": 2},
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_against_reference(backend, size, dtype):
    case = draw(**SIZES[size], dtype=dtype, device=backend.device)
    before = case.x.clone()
    want = case.run()
    assert_correct(case, want)
    assert same_bits(case.x, before) and want.stride() == torch.empty_like(case.x).stride()
    for x in layouts(case.x):
        y = replace(case, x=x).run()
        assert y.stride() == torch.empty_like(x).stride() and same_bits(y, want)


@pytest.mark.parametrize("size", SIZES)
def test_fp64(size):
    case = draw(**SIZES[size], dtype=torch.float64)
    assert_correct(case, case.run())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_large_images(dtype):
    """Several blocks of queries, and threads that share a head."""
    case = draw(1, 20, 29, 37, start=3, heads=1, dtype=dtype)
    assert_correct(case, case.run())
    for x in layouts(case.x):
        assert same_bits(replace(case, x=x).run(), case.run())


def test_several_tiles_of_keys(backend):
    case = draw(1, 10, 9, 11, start=2, heads=2, device=backend.device)
    assert_correct(case, case.run())


def test_an_image_depends_on_no_other(backend):
    case = draw(5, 40, 7, 7, start=8, heads=4, device=backend.device)
    want = case.run()
    for i in range(5):
        assert same_bits(replace(case, x=case.x[i : i + 1]).run(), want[i : i + 1])
    other = case.x.clone()
    other[1, 20, 3, 3], other[3, 30, 0, 1] = torch.nan, torch.inf
    other[2, 3, 2, 2] = torch.nan  # passes through
    got = replace(case, x=other).run()
    assert same_bits(got[[0, 4]], want[[0, 4]])
    assert got[[1, 3], 8:].isnan().all() and same_bits(got[[1, 3], :8], want[[1, 3], :8])
    assert same_bits(got[2, 8:], want[2, 8:]) and same_bits(got[2, :8], other[2, :8])


@pytest.mark.parametrize("size", [(7, 7), (20, 21)])
def test_any_number_of_threads(size):
    threads, results = torch.get_num_threads(), []
    case = draw(2 if size[0] > 7 else 40, 40, *size, start=8, heads=1)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(case.run())
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_weights(backend, dtype):
    case = draw(2, 40, 4, 5, start=8, heads=4, dtype=dtype, device=backend.device)
    want, packed = case.run(), case.packed()
    for names in (["qkv_packed"], ["proj_packed"], list(packed)):
        assert same_bits(case.run(**{name: packed[name] for name in names}), want)
    if backend.name == "cpu":
        case.weights[:4] = [torch.zeros_like(w) for w in case.weights[:4]]
        assert same_bits(case.run(**packed), want)


def test_masks(backend):
    """-inf in the bias hides a key, in whichever tile; where all are hidden nothing is left."""
    case = draw(1, 10, 7, 10, start=2, heads=2, device=backend.device)
    hidden = torch.zeros(70, 70, dtype=torch.bool)
    hidden[:, :40], hidden[3:5, 40:] = True, True
    case.weights[4].masked_fill_(hidden.to(backend.device), -torch.inf)
    got, want = case.run().flatten(2), case.run(reference.partial_attention).flatten(2)
    assert got[:, 2:, 3:5].isnan().all() and got[:, 2:, 5:].isfinite().all()
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_large_scores(backend):
    """The largest is subtracted first: no exponential overflows."""
    case = draw(1, 12, 3, 3, start=2, device=backend.device)
    case.weights[4] += 1e4 * torch.arange(9.0, device=backend.device)
    assert_correct(case, case.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_number_hides_too(backend, dtype):
    """As masks of the largest finite numbers are written: all keys of a query alike, some of them, one alone."""
    case = draw(1, 10, 5, 8, start=2, heads=2, dtype=dtype, device=backend.device)
    lowest = torch.finfo(dtype).min
    case.weights[4][:, 3] = lowest
    case.weights[4][:, 4, :35] = lowest
    case.weights[4][:, 5, 7] = -lowest
    got = case.run()
    assert got.isfinite().all()
    assert_correct(case, got)


def test_small_and_empty(backend):
    for shape in ((0, 6, 3, 3), (2, 6, 0, 3), (2, 6, 3, 0)):
        case = draw(*shape, start=2, heads=2, device=backend.device)
        assert case.run().shape == shape
    case = draw(2, 6, 3, 3, start=2, device=backend.device)
    case.x[0] = 3  # no variance
    assert_correct(case, case.run())
    torch.testing.assert_close(case.run(eps=0.5), case.run(reference.partial_attention, eps=0.5))


def as_function(case):
    return lambda x, *weights: partial_attention(x, case.start, *weights, case.heads)


def test_gradients():
    for options in ({"start": 1, "heads": 2}, {"start": 0, "heads": 1}):
        case = draw(2, 4 + options["start"], 2, 3, **options, dtype=torch.float64)
        inputs = [t.requires_grad_() for t in (case.x, *case.weights)]
        assert torch.autograd.gradcheck(as_function(case), inputs)
        assert torch.autograd.gradgradcheck(as_function(case), inputs)


def test_same_gradients_as_reference(backend):
    gradients = []
    for function in (partial_attention, reference.partial_attention):
        torch.manual_seed(1)
        case = draw(2, 14, 3, 4, start=2, heads=4, device=backend.device)
        inputs = [t.requires_grad_() for t in (case.x, *case.weights)]
        gradients.append(torch.autograd.grad(case.run(function).sin().sum(), inputs))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_opcheck_and_compile(backend):
    case = draw(2, 10, 2, 3, start=2, heads=2, device=backend.device)
    op = backend.ops().partial_attention.default
    torch.library.opcheck(op, (case.x, 2, *case.weights, 2))
    torch.library.opcheck(op, (case.x, 2, *case.weights, 2), case.packed())
    torch.library.opcheck(op, (case.x.clone().requires_grad_(), 2, *case.weights, 2))
    compiled = torch.compile(as_function(case), backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(case.x, *case.weights), case.run())


def test_counted_operations():
    case = draw(2, 20, 3, 5, start=4, heads=2).to("meta")
    with FlopCounterMode(display=False) as counter:
        case.run()
    assert counter.get_total_flops() == 2 * 2 * 15 * (4 * 16 * 16 + 2 * 15 * 16)


def test_bad_arguments(backend):
    case = draw(2, 10, 2, 3, start=2, heads=2, device=backend.device)

    def refused(message, case=case, **options):
        with pytest.raises(ValueError, match=rf"tranche\.partial_attention: expected {message}"):
            case.run(**options)

    refused("x of shape", replace(case, x=case.x[0]))
    refused("x of dtype", replace(case, x=case.x.int()))
    for start in (-1, 10):
        refused(r"start in \[0, x.size\(1\) - 1\]", replace(case, start=start))
    for heads in (0, 3, -1):
        refused(r"num_heads >= 1 that divides x.size\(1\) - start \(8\)", replace(case, heads=heads))
    for eps in (-1e-6, float("nan"), float("inf")):
        refused(r"eps in \[0, 1e30\]", eps=eps)
    names = "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "bias"
    for i, name in enumerate(names):
        for wrong, what in (
            (case.weights[i][1:], "of shape"),
            (case.weights[i][None], "of shape"),
            (case.weights[i].half(), "of dtype"),
        ):
            refused(
                f"{name} {what}", replace(case, weights=[*case.weights[:i], wrong, *case.weights[i + 1 :]])
            )
    strided = case.weights[0].T.contiguous().T
    refused("a contiguous qkv_weight", replace(case, weights=[strided, *case.weights[1:]]))
    refused("start in", replace(case, x=case.x[:, :2]))
    refused("x with channels", replace(case, x=case.x[:, :0]))


def test_bad_packed():
    case = draw(2, 10, 2, 3, start=2, heads=2)
    packed = case.packed()
    for name, other in (("qkv_packed", "proj_packed"), ("proj_packed", "qkv_packed")):
        with pytest.raises(ValueError, match=f"expected {name} made of these weights"):
            case.run(**{name: packed[other]})
        with pytest.raises(ValueError, match=f"expected {name} made by conv2d_pack"):
            case.run(**{name: packed[name][1:]})
        with testing.use_simulator(), pytest.raises(ValueError, match=f"expected {name} without elements"):
            case.run(**{name: packed[name]})
