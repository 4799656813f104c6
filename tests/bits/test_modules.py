"""The modules: conversion, switching, state, and calls at different bits at once."""

from __future__ import annotations

import copy
import pickle
import re
import threading

import pytest
import torch
from torch import nn

from tranche import bits
from tranche.bits import BitSwitchConv2d, BitSwitchLinear, at_bits, convert, reference, set_bits


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, size=32):
        super().__init__()
        self.first = nn.Linear(size, size)
        self.blocks = nn.ModuleList([Block(size) for _ in range(2)])
        self.last = nn.Linear(size, 5)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_module(backend, dtype, activation_bits):
    linear = nn.Linear(40, 18)
    made = BitSwitchLinear.from_float(linear, activation_bits=activation_bits).to(backend.device).to(dtype)
    assert made.scale.dtype == torch.float32 and made.bias.dtype == torch.float32
    x = torch.randn(2, 3, 40, device=backend.device).to(dtype)
    for width in (8, 4, 2):
        made.bits = width
        got = made(x)
        want = reference.linear(x, made.packed, made.scale, width, made.bias, activation_bits=activation_bits)
        assert got.dtype == dtype and got.shape == (2, 3, 18)
        assert (got.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()
    with pytest.raises(ValueError, match="expected bits in"):
        made.bits = 1


@pytest.mark.parametrize(
    "options", [{}, {"padding": 1}, {"stride": 2, "padding": (2, 0), "dilation": (1, 2)}]
)
def test_conv2d_module(backend, options):
    conv = nn.Conv2d(3, 10, (3, 2), **options)
    made = BitSwitchConv2d.from_float(conv)
    exact = copy.deepcopy(conv)
    made, x = made.to(backend.device), torch.randn(2, 3, 9, 8)
    for width in (8, 3):
        made.bits = width
        weight = bits.dequantize(made.packed, made.scale, width).cpu()
        exact.weight.data = weight.view_as(conv.weight)
        got = made(x.to(backend.device)).cpu()
        assert torch.allclose(got, exact(x), atol=1e-4)
        assert torch.allclose(made(x[0].to(backend.device)).cpu(), exact(x[0]), atol=1e-4)


def test_conv2d_refuses_what_it_cannot_do():
    for conv in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding="same")):
        with pytest.raises(ValueError, match="expected groups == 1 and zero padding given in numbers"):
            BitSwitchConv2d.from_float(conv)


def test_convert_and_skip():
    def converted(model):
        return [name for name, m in model.named_modules() if isinstance(m, BitSwitchLinear)]

    inner = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    model = Model()
    assert convert(model) is model
    assert converted(model) == inner
    assert converted(convert(Model(), skip=())) == ["first", *inner, "last"]
    assert converted(convert(Model(), skip=("last", "blocks.1"))) == ["first", *inner[:2]]
    assert converted(convert(Model(), skip=("blocks.0.up",))) == ["first", *inner[1:], "last"]
    with pytest.raises(ValueError, match="expected names of modules in skip, got 'nothing'"):
        convert(Model(), skip=("nothing",))


@pytest.mark.parametrize(
    ("model", "skip", "message"),
    [
        (nn.Linear(3, 3), (), r"got a single layer\. Use BitSwitchLinear\.from_float\."),
        (nn.Linear(3, 3), ("first", "last"), r"got a single layer\. Use BitSwitchLinear\.from_float\."),
        (nn.Conv2d(3, 3, 1), (), r"got a single layer\. Use BitSwitchConv2d\.from_float\."),
    ],
)
def test_a_single_layer_is_not_converted(model, skip, message):
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"^tranche\.bits\.convert: expected .*" + message):
        convert(model, skip=skip)
    assert kinds == [type(module) for module in model.modules()]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), r"skip leaves out all of \['0', '2'\]"),
        (nn.Sequential(nn.ReLU()), "it has no such layer"),
    ],
)
def test_nothing_to_convert_is_said(model, message):
    kinds = [type(module) for module in model.modules()]
    with pytest.warns(UserWarning, match=r"^tranche\.bits\.convert: Sequential stays as it is: " + message):
        assert convert(model) is model
    assert kinds == [type(module) for module in model.modules()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BitSwitchLinear(64, 32),
            "BitSwitchLinear: expected codes int8 [O, I] and scale as tensors, got int and int. "
            "Use BitSwitchLinear.from_float(nn.Linear(64, 32)).",
        ),
        (lambda: BitSwitchConv2d(3, 8, 3), "BitSwitchConv2d: expected codes int8"),
        (
            lambda: BitSwitchLinear.from_float(nn.Conv2d(3, 3, 1)),
            "BitSwitchLinear.from_float: expected a module nn.Linear, got Conv2d. Use BitSwitchConv2d.from_float.",
        ),
        (
            lambda: BitSwitchConv2d.from_float(nn.Linear(3, 3)),
            "BitSwitchConv2d.from_float: expected a module nn.Conv2d, got Linear. Use BitSwitchLinear.from_float.",
        ),
        (lambda: BitSwitchLinear.from_float(nn.ReLU()), "got ReLU. Leave this module as it is."),
    ],
)
def test_made_of_something_else(make, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


def test_set_bits():
    model = convert(Model())
    set_bits(model, 4)
    assert {m.bits for m in model.modules() if isinstance(m, BitSwitchLinear)} == {4}
    set_bits(model, {"blocks": 6, "blocks.1": 3, "blocks.1.up": 2})
    assert [model.blocks[0].up.bits, model.blocks[1].down.bits, model.blocks[1].up.bits] == [6, 3, 2]
    for wrong in (1, 3.5, 4.0, "4", None, {"blocks": 9}):
        with pytest.raises(ValueError, match="expected bits in"):
            set_bits(model, wrong)
    with pytest.raises(ValueError, match="expected prefixes of bit-switching modules"):
        set_bits(model, {"block": 4})
    for switch in (set_bits, lambda *given: at_bits(*given).__enter__()):
        with pytest.raises(
            ValueError, match=r"expected a model with bit-switching layers, got Model without\. Convert"
        ):
            switch(Model(), 4)


def test_at_bits_nests_and_ends():
    model, x = convert(Model()), torch.randn(3, 32)
    results = {}
    for width in (8, 4, 2):
        set_bits(model, width)
        results[width] = model(x)
    set_bits(model, 8)
    with at_bits(model, 4):
        assert torch.equal(model(x), results[4])
        with at_bits(model, 2):
            assert torch.equal(model(x), results[2])
        assert torch.equal(model(x), results[4])
    assert torch.equal(model(x), results[8])
    assert not torch.equal(results[2], results[4])


def test_threads_at_different_bits_at_once():
    model, x = convert(Model()), torch.randn(3, 32)
    wanted = {}
    for width in (2, 4, 8):
        with at_bits(model, width):
            wanted[width] = model(x)
    wrong = []

    def work(width):
        with at_bits(model, width), torch.inference_mode():
            wrong.extend(width for _ in range(50) if not torch.equal(model(x), wanted[width]))

    threads = [threading.Thread(target=work, args=(width,)) for width in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_state_goes_around():
    model, x = convert(Model(), activation_bits=8), torch.randn(3, 32)
    set_bits(model, 4)
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)
    other = convert(Model(), bits=4, activation_bits=8)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), want)
    state = model.state_dict()
    state["blocks.0.up._extra_state"] = {**state["blocks.0.up._extra_state"], "layout": 7}
    with pytest.raises((ValueError, RuntimeError), match="expected packed data with"):
        other.load_state_dict(state)


def test_layouts_of_a_model():
    model = Model()
    guarded, single = convert(copy.deepcopy(model)), convert(copy.deepcopy(model), layout="single")
    conv = nn.Conv2d(3, 5, 3)
    pairs = [(guarded, single, torch.randn(3, 32))]
    pairs += [
        (
            *(BitSwitchConv2d.from_float(conv, layout=kind) for kind in ("guarded", "single")),
            torch.randn(2, 3, 8, 8),
        )
    ]
    for first, second, x in pairs:
        for width in (3, 8):
            set_bits(first, width)
            set_bits(second, width)
            assert torch.equal(second(x), first(x))
    assert single.blocks[0].up.packed.bytes_read(3) < guarded.blocks[0].up.packed.bytes_read(3)
    with pytest.raises((ValueError, RuntimeError), match="expected packed data with"):
        guarded.load_state_dict(single.state_dict())


def test_compiles_once_for_each_value_of_bits():
    compiled_graphs = []

    def count(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, x = convert(Model()), torch.randn(3, 32)
    compiled = torch.compile(model, backend=count, fullgraph=True)
    with torch.no_grad():
        for width in (8, 4, 2, 8, 4, 2):
            set_bits(model, width)
            assert torch.equal(compiled(x), model(x))
    assert len(compiled_graphs) == 3


def test_a_compiled_model_goes_by_at_bits():
    compiled_graphs = []

    def count(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, x = convert(Model()), torch.randn(3, 32)
    compiled = torch.compile(model, backend=count, fullgraph=True)
    results = {}
    with torch.no_grad():
        for width in (8, 4, 2):
            with at_bits(model, width):
                results[width] = model(x)
        for width in (4, 2, 4, 2, 4):
            with at_bits(model, width):
                assert torch.equal(compiled(x), results[width])
        assert torch.equal(compiled(x), results[8])
        assert len(compiled_graphs) == 3

        def elsewhere():  # another thread is not in this one's context
            with torch.no_grad():
                found.append(torch.equal(compiled(x), results[8]))

        found = []
        with at_bits(model, 2):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert torch.equal(compiled(x), results[2])
    assert found == [True] and len(compiled_graphs) == 3
