"""partial_mlp, the fused block, against the reference: widths, gates, layouts, gradients, bad input."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pconv.convolutions import same_bits
from tranche import testing
from tranche.pconv import partial_mlp, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "conv_weight", "w1", "b1", "w2", "b2")
GATES = ("gate", "spatial_weight", "spatial_bias")


@dataclass
class Block:
    """One call: its tensors by name, and the rest."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, function: Any = partial_mlp) -> Tensor:
        keywords = {n: self.tensors[n] for n in GATES if n in self.tensors}
        return function(*(self.tensors[n] for n in NAMES), **keywords, **self.options)

    def mapped(self, function: Any) -> Block:
        return replace(self, tensors={n: function(t) for n, t in self.tensors.items()})


def make_block(
    seed: int = 0,
    *,
    batch: int = 2,
    channels: int = 24,
    width: int = 6,
    hidden: int = 48,
    size: tuple[int, int] = (5, 7),
    gated: bool = False,
    spatial: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    device: str = "cpu",
    **options: Any,
) -> Block:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    tensors = {
        "x": draw(batch, channels, *size),
        "conv_weight": draw(width, width, 3, 3, scale=(9 * width) ** -0.5),
        "w1": draw(hidden, channels, scale=channels**-0.5),
        "b1": draw(hidden),
        "w2": draw(channels, hidden, scale=hidden**-0.5),
        "b2": draw(channels),
    }
    if gated:
        tensors["gate"] = draw(batch, channels - width)
    if spatial:
        tensors |= {"spatial_weight": draw(hidden, scale=2 * hidden**-0.5), "spatial_bias": draw(1)}
    if channels_last:
        tensors["x"] = tensors["x"].to(memory_format=torch.channels_last)
    return Block(tensors, options)


def assert_correct(block: Block, got: Tensor) -> None:
    """As near to the fp64 reference as twice plain torch's error in the same dtype, plus one rounding."""
    want = block.mapped(torch.Tensor.double).run(reference.partial_mlp)
    plain = block.run(reference.partial_mlp)
    assert got.dtype == plain.dtype and got.shape == want.shape
    error, yardstick = (got.double() - want).abs().max(), (plain.double() - want).abs().max()
    roundings = 32 if got.dtype == torch.float64 else 4 if got.dtype == torch.float32 else 1
    assert error <= 2 * yardstick + roundings * torch.finfo(got.dtype).eps * want.abs().max(), (
        error,
        yardstick,
    )


BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"activation": "gelu"},
    "no residual": {"residual": False},
    "gated": {"gated": True, "activation": "gelu"},
    "spatial": {"spatial": True},
    "everything": {"gated": True, "spatial": True, "activation": "gelu", "channels": 40, "width": 10},
    "odd": {"channels": 37, "width": 9, "hidden": 53, "gated": True, "spatial": True},
    "twelve": {"channels": 48, "width": 12, "hidden": 96},
    "all convolved": {"width": 24},
    "one channel": {"width": 1, "hidden": 1},
    "one pixel": {"size": (1, 1), "batch": 3},
    "one row": {"size": (1, 9)},
    "several tiles": {"size": (11, 18)},
    "two chunks convolved": {"channels": 72, "width": 18, "hidden": 40, "spatial": True},
    "half convolved": {"channels": 48, "width": 33, "hidden": 16, "gated": True, "spatial": True},
    "wide": {"channels": 136, "width": 34, "hidden": 48, "spatial": True, "batch": 1},
    # rows of so many KB that they are spread
    "4 KB apart": {"channels": 16, "width": 4, "hidden": 1024, "gated": True},
    "4 KB apart in bf16": {"channels": 16, "width": 4, "hidden": 2048},
}
# On CUDA, weights that pass through shared memory because they do not fit.
STREAMED: dict[str, dict[str, Any]] = {
    "deep": {"channels": 20, "width": 5, "hidden": 2500},
    "gated": {"channels": 64, "width": 16, "hidden": 1000, "gated": True, "spatial": True, "size": (9, 9)},
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BLOCKS)
def test_against_reference(backend, name, dtype, channels_last):
    block = make_block(dtype=dtype, channels_last=channels_last, device=backend.device, **BLOCKS[name])
    before = block.tensors["x"].clone()
    y = block.run()
    assert_correct(block, y)
    assert y.stride() == torch.empty_like(before).stride()
    assert same_bits(block.tensors["x"], before)


@pytest.mark.parametrize("name", STREAMED)
def test_deep(backend, name):
    for dtype in (torch.bfloat16, torch.float16):
        block = make_block(dtype=dtype, channels_last=True, device=backend.device, **STREAMED[name])
        assert_correct(block, block.run())


def gelu(x: Tensor) -> Tensor:
    """Of single pixels [B], by a block that does nothing else."""
    unchanged, one, nothing = torch.zeros(1, 1, 3, 3), torch.ones(1, 1), torch.zeros(1)
    unchanged[..., 1, 1] = 1
    images = x[:, None, None, None]
    return partial_mlp(
        images, unchanged, one, nothing, one, nothing, activation="gelu", residual=False
    ).flatten()


def test_gelu_keeps_its_digits_on_both_sides():
    """Negative results are no differences of large numbers: they are right to their own size, as far as -13."""
    x = torch.linspace(-13, 13, 4097)
    want = x.double() / 2 * torch.special.erfc(-x.double() / 2**0.5)
    assert ((gelu(x).double() - want).abs() <= 6e-7 * (1 + x.double() ** 2 / 4) * want.abs()).all()


def test_gelu_at_the_ends():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -20.0, 20.0, 3e38, -3e38])
    want = torch.tensor([torch.inf, 0.0, torch.nan, 0.0, 0.0, 20.0, 3e38, 0.0])
    torch.testing.assert_close(gelu(x), want, rtol=0, atol=0, equal_nan=True)


def test_every_seed_of_the_simulator():
    block = make_block(
        size=(9, 17),
        gated=True,
        spatial=True,
        channels=72,
        width=18,
        dtype=torch.bfloat16,
        channels_last=True,
    )
    results = []
    for seed in range(5):
        with testing.use_simulator(seed=seed):
            results.append(block.run())
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_wide(dtype):
    block = make_block(
        channels=160, width=40, hidden=320, size=(14, 13), dtype=dtype, gated=True, spatial=True
    )
    assert_correct(block, block.run())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_few_pixels_and_many_weights(dtype):
    """Threads share outputs instead of pixels: the bits are those of a batch, whatever the threads."""
    block = make_block(
        batch=32, channels=250, width=40, hidden=520, size=(3, 4), dtype=dtype, gated=True, spatial=True
    )
    assert_correct(block, block.run())
    few = block.mapped(lambda t: t)
    few.tensors["x"], few.tensors["gate"] = block.tensors["x"][3:5], block.tensors["gate"][3:5]
    threads, want = torch.get_num_threads(), block.run()[3:5]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert same_bits(few.run(), want)
    finally:
        torch.set_num_threads(threads)


def test_fp64():
    for options in BLOCKS.values():
        block = make_block(dtype=torch.float64, **options)
        assert_correct(block, block.run())


def test_weights_of_1x1_convolutions(backend):
    block = make_block(device=backend.device)
    want = block.run()
    for name in ("w1", "w2"):
        block.tensors[name] = block.tensors[name][:, :, None, None]
    assert same_bits(block.run(), want)


def test_integers_are_exact(backend):
    for dtype in FLOATS:
        block = make_block(channels=8, width=2, hidden=16, dtype=dtype, device=backend.device)
        block = block.mapped(lambda t: t.mul(2).round().clamp(-1, 1))
        want = block.mapped(torch.Tensor.double).run(reference.partial_mlp)
        assert torch.equal(block.run().double(), want.to(dtype).double())


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_do_not_depend_on_neighbours(backend, dtype):
    size = backend.pick((33, 20), (6, 7))
    block = make_block(batch=3, size=size, dtype=dtype, gated=True, spatial=True, device=backend.device)
    y = block.run()
    one = block.mapped(lambda t: t)
    one.tensors["x"], one.tensors["gate"] = one.tensors["x"][1:2], one.tensors["gate"][1:2]
    assert same_bits(one.run(), y[1:2])
    other = block.mapped(lambda t: t)
    other.tensors["x"] = other.tensors["x"].contiguous(memory_format=torch.channels_last)
    assert same_bits(other.run(), y)
    # a crop: what lies two pixels from its edge sees the same window
    crop = block.mapped(lambda t: t)
    crop.tensors["x"] = crop.tensors["x"][:, :, 1:6, 2:7]
    assert same_bits(crop.run()[:, :, 1:-1, 1:-1], y[:, :, 2:5, 3:6])


def test_any_number_of_threads():
    block = make_block(batch=3, channels=40, width=10, size=(20, 20), channels_last=True, spatial=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(block.run())
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


def test_non_finite_values_stay_in_reach(backend):
    for dtype in FLOATS:
        block = make_block(dtype=dtype, device=backend.device)
        clean = block.run()
        block.tensors["x"][0, 0, 2, 3] = torch.nan  # convolved: its window
        block.tensors["x"][1, 20, 4, 6] = torch.nan  # untouched: its pixel
        reached = torch.zeros(2, 1, 5, 7, dtype=torch.bool, device=backend.device)
        reached[0, :, 1:4, 2:5] = True
        reached[1, :, 4, 6] = True
        y = block.run()
        assert torch.equal(torch.isnan(y), reached.expand_as(y))
        assert same_bits(y[~reached.expand_as(y)], clean[~reached.expand_as(y)])


def test_strided_and_empty(backend):
    block = make_block(size=(5, 14), device=backend.device)
    block.tensors["x"] = block.tensors["x"][:, :, :, ::2]
    assert_correct(block, block.run())
    block.tensors["x"] = block.tensors["x"][:0]
    assert block.run().shape == (0, 24, 5, 7)


@pytest.mark.parametrize("gates", [(), ("gate",), ("spatial_weight",), GATES])
def test_gradcheck_twice(gates):
    block = make_block(
        batch=2, channels=5, width=2, hidden=4, size=(3, 2), dtype=torch.float64, gated=True, spatial=True,
        activation="gelu" if "gate" in gates else "relu", residual=len(gates) != 1,
    )  # fmt: skip
    names = [n for n in block.tensors if n not in GATES or n in gates]

    def call(*tensors: Tensor) -> Tensor:
        return Block(dict(zip(names, tensors, strict=True)), block.options).run()

    leaves = tuple(block.tensors[n].clone().requires_grad_() for n in names)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_same_gradients_as_reference(backend):
    gradients = []
    for function in (partial_mlp, reference.partial_mlp):
        block = make_block(gated=True, spatial=True, activation="gelu", device=backend.device)
        block = block.mapped(lambda t: t.requires_grad_())
        y = block.run(function)
        upstream = torch.arange(y.numel(), device=y.device).view_as(y).sin()
        gradients.append(torch.autograd.grad((y * upstream).sum(), list(block.tensors.values())))
    for ours, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


def test_opcheck(backend):
    block = make_block(
        batch=1, channels=6, width=2, hidden=4, size=(3, 2), gated=True, spatial=True, device=backend.device
    )
    op = backend.ops().partial_mlp.default
    for leaf in (False, True):
        tensors = [t.clone().requires_grad_(leaf) for t in block.tensors.values()]
        torch.library.opcheck(op, (*tensors[:6], 0, *tensors[6:], True))
    torch.library.opcheck(op, (*block.tensors.values(),)[:6])


def test_compile(backend):
    block = make_block(gated=True, spatial=True, device=backend.device)
    compiled = torch.compile(partial_mlp, backend="aot_eager", fullgraph=True)
    assert same_bits(block.run(compiled), block.run())


BAD = {
    "x of shape": {"x": (24, 5, 7)},
    "conv_weight of shape": {"conv_weight": (6, 6, 5, 5)},
    "conv_weight.size": {"conv_weight": (25, 25, 3, 3)},
    "w1 of shape": {"w1": (48, 23)},
    "w2 of shape": {"w2": (48, 24)},
    "b2 of shape": {"b2": (23,)},
    "gate of shape": {"gate": (2, 24)},
    "spatial_weight of shape": {"spatial_weight": (24,)},
    "spatial_bias of shape": {"spatial_bias": (2,)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_shapes(backend, message):
    block = make_block(gated=True, spatial=True, device=backend.device)
    block.tensors |= {n: torch.zeros(s, device=backend.device) for n, s in BAD[message].items()}
    with pytest.raises(ValueError, match=message):
        block.run()


def test_bad_options(backend):
    block = make_block(spatial=True, device=backend.device)
    with pytest.raises(ValueError, match="activation in"):
        replace(block, options={"activation": "silu"}).run()
    del block.tensors["spatial_weight"]
    with pytest.raises(ValueError, match="spatial_weight beside spatial_bias"):
        block.run()
    with pytest.raises(ValueError, match=r"w1 of dtype torch\.float32"):
        replace(make_block(), tensors=make_block().tensors | {"w1": torch.zeros(48, 24).half()}).run()
