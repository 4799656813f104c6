"""fused_experts with experts packed by pack_experts, at every precision."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.moe.cases import FLOATS, Layer, assert_same_bits, judge, make_layer
from tranche import bits
from tranche.moe import PackedExperts, RoutingPlan, fused_experts, pack_experts, reference

BITS = range(2, 9)
NAMES = ("w_gate", "w_up", "w_down")


def packed(layer: Layer, number: int | None = None) -> Layer:
    """The same layer, packed."""
    stacks = {name: None if w is None else pack_experts(w) for name in NAMES for w in [getattr(layer, name)]}
    options = layer.options if number is None else {**layer.options, "bits": number}
    return replace(layer, **stacks, options=options)


def codes_of(stack: PackedExperts, number: int) -> torch.Tensor:
    """W_l * 2^(8-l), int8 but for 128."""
    codes = torch.stack([bits.unpack(stack.expert(e), number) for e in range(stack.num_experts)])
    return codes.int() * 2 ** (8 - number)


def test_what_is_packed():
    weight = torch.randn(3, 20, 40)
    stack = pack_experts(weight)
    assert (stack.num_experts, stack.out_features, stack.in_features) == (3, 20, 40)
    for e in range(3):
        codes, scale = bits.quantize(weight[e])
        assert torch.equal(stack.data[e], bits.pack(codes).data)
        assert torch.equal(stack.scale[e], scale)
    codes = codes_of(stack, 8).to(torch.int8)
    again = pack_experts(codes, stack.scale)
    assert torch.equal(again.data, stack.data)
    assert torch.equal(again.scale, stack.scale)
    assert torch.equal(reference.dense(stack), codes.double() * stack.scale.double()[..., None])
    error = (reference.dense(stack) - weight.double()).abs()
    assert (error <= 0.5001 * stack.scale.double()[..., None]).all()


@pytest.mark.parametrize("number", BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_precision(backend, dtype, number):
    packed(make_layer(1, dtype=dtype, device=backend.device), number).check()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", [2, 5, 8])
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner"), [(1, 33, 17), (17, 64, 96), (70, 31, 32), (130, 5, 1)]
)
def test_odd_shapes(backend, dtype, number, tokens, hidden, inner):
    if backend.name == "sim":
        tokens = min(tokens, 20)
    layer = make_layer(2, tokens=tokens, hidden=hidden, inner=inner, dtype=dtype, device=backend.device)
    packed(layer, number).check()


@pytest.mark.parametrize("dtype", FLOATS)
def test_long_sums(backend, dtype):
    hidden, inner = backend.pick((1100, 600), (330, 260))
    layer = make_layer(3, tokens=3, hidden=hidden, inner=inner, dtype=dtype, device=backend.device)
    packed(layer, 4).check()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_without_gate(backend, dtype, activation):
    layer = make_layer(4, dtype=dtype, gated=False, activation=activation, device=backend.device)
    packed(layer, 6).check()


@pytest.mark.parametrize("number", BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_integers_are_exact(backend, dtype, number):
    """Every code of 8 bits, at every precision: codes meet x exactly, and small sums are exact."""
    codes = torch.arange(-128, 128, dtype=torch.int8, device=backend.device).view(1, 16, 16)
    one = torch.ones(1, 16, device=backend.device)
    up, down = pack_experts(codes, one), pack_experts(torch.eye(16, device=backend.device)[None] * 64, one)
    assert torch.equal(codes_of(down, number), torch.eye(16, device=backend.device).int()[None] * 64)
    x = torch.eye(16, dtype=dtype, device=backend.device)
    ids = torch.zeros(16, 1, dtype=torch.int32, device=backend.device)
    weights = torch.full((16, 1), 1 / 64, device=backend.device)
    got = fused_experts(x, None, up, down, weights, ids, activation="relu", bits=number)
    assert torch.equal(got.int(), codes_of(up, number)[0].T.clamp(min=0))


@pytest.mark.parametrize("dtype", FLOATS)
def test_like_int8_weights(backend, dtype):
    """At 8 bits they are int8 weights with the same scales."""
    layer = packed(make_layer(5, tokens=20, dtype=dtype, device=backend.device))
    stacks = {name: codes_of(getattr(layer, name), 8).to(torch.int8) for name in NAMES}
    scales = {name + "_scale": getattr(layer, name).scale for name in NAMES}
    want = replace(layer, **stacks, options=scales)
    judge(layer.run(), want.reference(), want.reference(compute_dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_experts_without_tokens_are_not_read(backend, dtype):
    layer = packed(make_layer(6, tokens=20, experts=5, dtype=dtype, device=backend.device), 5)
    layer.ids[:, 0], layer.ids[:, 1] = 3, 1
    layer.check()
    out = layer.run()
    for stack in (layer.w_gate, layer.w_up, layer.w_down):
        stack.data[[0, 2, 4]] = 255
        stack.scale[[0, 2, 4]] = torch.nan
    assert_same_bits(layer.run(), out)


def test_only_the_bits_asked_for_are_read(backend):
    layer = packed(make_layer(7, device=backend.device))
    outputs = {number: layer.run(bits=number) for number in BITS}
    assert len({float(out.double().sum()) for out in outputs.values()}) == len(outputs)
    for number, out in outputs.items():
        eighths = {2: 3, 3: 5, 4: 5, 5: 7, 6: 7}.get(number, 8)
        stacks = {}
        for name in NAMES:
            stack = getattr(layer, name)
            data = stack.data.clone()
            data[:, data.size(1) * eighths // 8 :] = 0xA5
            stacks[name] = replace(stack, data=data)
        assert_same_bits(replace(layer, **stacks).run(bits=number), out)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_nan_row_stays_alone(backend, dtype):
    layer = packed(make_layer(8, tokens=20, dtype=dtype, device=backend.device), 4)
    want = layer.run()
    layer.x[7] = torch.nan
    got = layer.run()
    assert got[7].isnan().all()
    others = [i for i in range(20) if i != 7]
    assert_same_bits(got[others], want[others])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", [4, 8])
def test_rows_do_not_depend_on_their_neighbours(backend, dtype, number):
    tokens = backend.pick(150, 20)
    layer = make_layer(9, tokens=tokens, hidden=100, inner=70, experts=3, dtype=dtype, device=backend.device)
    layer = packed(layer, number)
    out = layer.run()
    for kept in backend.pick((1, 2, 3, 5, 15, 16, 17, 33, 64, 65), (1, 16, 17)):
        assert_same_bits(layer.some(slice(0, kept)).run(), out[:kept])
    for row in (3, tokens - 1):
        assert_same_bits(layer.some([row]).run(), out[row : row + 1])
    order = torch.randperm(tokens).tolist()
    assert_same_bits(layer.some(order).run(), out[order])


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_number_of_threads(dtype):
    layer = packed(make_layer(10, tokens=30, hidden=100, inner=70, dtype=dtype), 6)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(layer.run())
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 90),
    hidden=st.integers(1, 130),
    inner=st.integers(1, 130),
    experts=st.integers(1, 9),
    dtype=st.sampled_from(FLOATS),
    gated=st.booleans(),
    number=st.integers(2, 8),
    data=st.data(),
)
def test_any_case_on_the_cpu(seed, tokens, hidden, inner, experts, dtype, gated, number, data):
    top_k = data.draw(st.integers(1, experts))
    sizes = {"tokens": tokens, "hidden": hidden, "inner": inner, "experts": experts, "top_k": top_k}
    packed(make_layer(seed, **sizes, dtype=dtype, gated=gated), number).check()


def check_many():
    """Every precision and type on the CPU, in shapes with tails, few columns and many."""
    for number in BITS:
        for dtype in FLOATS:
            for tokens, hidden, inner in ((1, 33, 17), (7, 160, 40), (70, 64, 96)):
                layer = make_layer(number, tokens=tokens, hidden=hidden, inner=inner, experts=3, dtype=dtype)
                layer = packed(layer, number)
                layer.check()
                assert_same_bits(layer.some([tokens - 1]).run(), layer.run()[tokens - 1 :])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    run = subprocess.run(
        [sys.executable, "-c", "from tests.moe.test_packed import check_many; check_many()"],
        env={**os.environ, "TRANCHE_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_plans_and_no_tokens(backend):
    layer = packed(make_layer(11, device=backend.device), 4)
    assert_same_bits(layer.run(plan=RoutingPlan.from_ids(layer.ids, 4)), layer.run())
    assert layer.some([]).run().shape == (0, 48)


def test_ids_that_are_no_experts(backend):
    layer = packed(make_layer(12, device=backend.device), 4)
    bad = replace(layer, ids=layer.ids.clone())
    bad.ids[2, 1], bad.ids[3, 0] = 4, -1
    if backend.name == "cpu":
        with pytest.raises(IndexError, match=r"expected topk_ids\[2, 1\] in \[0, 4\), got 4"):
            bad.run()
        return
    without = replace(layer, weights=layer.weights.clone())
    without.weights[2, 1] = without.weights[3, 0] = 0
    assert_same_bits(bad.run(), without.run())


def test_bad_input(backend):
    plain = make_layer(13, device=backend.device)
    layer = packed(plain)

    def expect(message, options=None, **changes):
        with pytest.raises(ValueError, match=message):
            replace(layer, **changes, options=options or {}).run()

    for number in (1, 9, 0):
        expect(rf"tranche\.moe_experts: expected bits in .*, got {number}\.", {"bits": number})
    expect("expected packed w_down, as w_up is, got Tensor", w_down=plain.w_down)
    expect("expected packed w_gate, as w_up is, got Tensor", w_gate=plain.w_gate)
    expect("expected packed w_up, as another is, got a Tensor", w_up=plain.w_up)
    expect(r"expected w_gate of \[40, 48\] features an expert, got \[48, 40\]", w_gate=layer.w_down)
    expect(
        r"expected w_gate of \[40, 33\] features an expert, got \[40, 48\]", x=plain.x[:, :33].contiguous()
    )
    scale = torch.ones(4, 40, device=backend.device)
    expect("expected no w_up_scale for packed experts, got one", {"w_up_scale": scale})
    up = layer.w_up
    expect(r"expected w_up_scale of shape \[E, rows\]", w_up=replace(up, scale=up.scale[:3]))
    expect("expected w_up_scale of dtype torch.float32", w_up=replace(up, scale=up.scale.double()))
    expect(r"expected w_up of shape \[E, bytes\]", w_up=replace(up, data=up.data[:, :-512].contiguous()))
    expect("expected a contiguous w_up", w_up=replace(up, data=up.data.repeat(1, 2)[:, : up.data.size(1)]))
    expect("expected w_gate in layout 24, as w_up is, got 1", w_up=replace(up, layout=24))
    layouts = {name: replace(getattr(layer, name), layout=24) for name in NAMES}
    expect(r"expected layout 1 \(guarded planes\), got 24\. Pack the codes with", **layouts)
    if backend.name == "cpu":
        expect("expected x of dtype torch.float32 or torch.float16", x=plain.x.double())
    with pytest.raises(ValueError, match="expected no bits for weights that are not packed, got 4"):
        plain.run(bits=4)
    with pytest.raises(ValueError, match="expected weights of integers without gradients"):
        replace(layer, x=plain.x.clone().requires_grad_()).run()


def test_what_pack_experts_refuses():
    with pytest.raises(
        ValueError, match=r"expected weight \[E, O, I\], floating-point or int8, got \[4, 4\]"
    ):
        pack_experts(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"got \[1, 4, 4\] of torch\.int32"):
        pack_experts(torch.ones(1, 4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"expected scale of shape \[1, 4\], got none"):
        pack_experts(torch.ones(1, 4, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"expected scale of shape \[1, 4\], got \[4\]"):
        pack_experts(torch.ones(1, 4, 4), torch.ones(4))


def test_opcheck(backend):
    layer = packed(make_layer(14, device=backend.device))
    stacks = (layer.w_gate, layer.w_up, layer.w_down)
    arguments = (layer.x, *(stack.data for stack in stacks), layer.weights, layer.ids, 0)
    scales = dict(zip(("w_gate_scale", "w_up_scale", "w_down_scale"), (s.scale for s in stacks), strict=True))
    torch.library.opcheck(backend.ops().moe_experts.default, arguments, {**scales, "bits": 4})


def test_compiles_in_one_graph(backend):
    layer = packed(make_layer(15, device=backend.device))

    def step(x, weights, ids):
        return fused_experts(x * 1.0, layer.w_gate, layer.w_up, layer.w_down, weights, ids, bits=4)

    want = layer.run(bits=4)
    assert_same_bits(torch.compile(step, fullgraph=True)(layer.x, layer.weights, layer.ids), want)
