"""fused_experts against loops in fp64, and its plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.moe.cases import FLOATS, assert_same_bits, make_layer
from tranche.moe import RoutingPlan, reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_activations(backend, dtype, gated, activation):
    make_layer(1, dtype=dtype, gated=gated, activation=activation, device=backend.device).check()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 17, 70, 130])
@pytest.mark.parametrize(("hidden", "inner"), [(33, 17), (64, 96)])
def test_odd_shapes(backend, dtype, tokens, hidden, inner):
    if backend.name == "sim":
        tokens = min(tokens, 70)
    make_layer(2, tokens=tokens, hidden=hidden, inner=inner, dtype=dtype, device=backend.device).check()


@pytest.mark.parametrize("dtype", FLOATS)
def test_long_sums(backend, dtype):
    hidden, inner = backend.pick((1100, 600), (330, 260))
    make_layer(3, tokens=3, hidden=hidden, inner=inner, dtype=dtype, device=backend.device).check()


@pytest.mark.parametrize("dtype", FLOATS)
def test_integers_are_exact(backend, dtype):
    layer = make_layer(4, tokens=9, dtype=dtype, hidden=24, inner=16, integers=True, device=backend.device)
    layer = replace(layer, w_gate=None, options={"activation": "relu"}, weights=layer.weights.sign())
    want = layer.reference()
    exact = want.abs() <= 1 / torch.finfo(dtype).eps
    assert exact.float().mean() > 0.5
    assert torch.equal(layer.run().double()[exact], want[exact])


def test_fp64():
    for gated in (True, False):
        for activation in ("silu", "gelu", "relu"):
            make_layer(5, tokens=20, dtype=torch.float64, gated=gated, activation=activation).check()


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_expert_with_all_tokens_and_experts_with_none(backend, dtype):
    layer = make_layer(6, tokens=20, experts=5, top_k=2, dtype=dtype, device=backend.device)
    layer.ids[:, 0], layer.ids[:, 1] = 3, 1
    poisoned = [0, 2, 4]
    for w in (layer.w_gate, layer.w_up, layer.w_down):
        w[poisoned] = torch.nan  # never looked at
    out = layer.run()
    assert out.isfinite().all()
    for w in (layer.w_gate, layer.w_up, layer.w_down):
        w[poisoned] = 0
    assert_same_bits(layer.run(), out)
    layer.check()


def test_every_expert_chosen(backend):
    make_layer(7, experts=4, top_k=4, device=backend.device).check()
    make_layer(7, experts=1, top_k=1, device=backend.device).check()


def test_no_tokens(backend):
    layer = make_layer(8, tokens=0, device=backend.device)
    assert layer.run().shape == (0, 48)


@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_as_they_lie(backend, dtype):
    layer = make_layer(9, dtype=dtype, device=backend.device)
    want = layer.run()
    fused = torch.cat([layer.w_gate, layer.w_up], 1)
    gate, up = fused.chunk(2, 1)
    wide = torch.full((5, 101), torch.nan, dtype=dtype, device=backend.device)
    wide[:, 1:49] = layer.x
    down = torch.full((4, 48, 43), torch.nan, dtype=dtype, device=backend.device)
    down[:, :, 1:41] = layer.w_down
    strided = replace(layer, w_gate=gate, w_up=up, x=wide[:, 1:49], w_down=down[:, :, 1:41])
    assert_same_bits(strided.run(), want)


def test_a_zero_weight_leaves_its_expert_out(backend):
    layer = make_layer(10, device=backend.device)
    layer.ids[:, 0], layer.ids[:, 1] = 0, 2
    layer.weights[:, 1] = 0
    layer.w_down[2] = torch.inf
    assert layer.run().isfinite().all()
    layer.check()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_nan_row_stays_alone(backend, dtype):
    layer = make_layer(11, tokens=20, dtype=dtype, device=backend.device)
    want = layer.run()
    layer.x[7] = torch.nan
    got = layer.run()
    assert got[7].isnan().all()
    others = [i for i in range(20) if i != 7]
    assert_same_bits(got[others], want[others])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_what_is_not_finite(backend, dtype, tokens):
    """Infinities as the sum has them: 1 * inf is no NaN, however numbers are taken apart."""
    layer = make_layer(
        16, tokens=tokens, hidden=70, inner=37, dtype=dtype, gated=False, device=backend.device
    )
    layer = replace(layer, options={"activation": "relu"})
    layer.w_up.abs_()
    layer.w_up[:, ::2] = 1
    layer.w_down.abs_()
    layer.weights.fill_(0.5)
    want = layer.run()
    layer.x[1, 5] = torch.inf
    layer.x[2, 69] = -torch.inf
    got = layer.run()
    assert (got[1] == torch.inf).all()
    assert (got[2] == 0).all()
    others = [i for i in range(tokens) if i not in (1, 2)]
    assert_same_bits(got[others], want[others])
    layer.x[2] = 0
    layer.w_up[:] = torch.inf
    assert layer.run()[2].isnan().all()


def test_the_largest_numbers(backend):
    layer = make_layer(
        17, tokens=20, hidden=40, inner=33, experts=1, top_k=1, gated=False, device=backend.device
    )
    layer = replace(layer, options={"activation": "relu"})
    largest = torch.finfo(torch.float32).max
    layer.x.zero_()[:, 3] = largest
    layer.w_up.zero_()[:, :, 3] = 2.0**-120
    layer.w_down.zero_()[:, :, 0] = 1
    layer.weights.fill_(1)
    assert (layer.run() == largest * 2.0**-120).all()
    layer.w_up[:, :, 3] = 1
    layer.w_down[:, :, 0] = 0.5
    assert (layer.run() == largest / 2).all()
    layer.w_down[:, :, 1:3] = 1
    assert (layer.run() == torch.inf).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_weights(backend, dtype):
    layer = make_layer(12, tokens=18, hidden=40, dtype=dtype, device=backend.device)
    generator = torch.Generator().manual_seed(3)
    integers, scales = {}, {}
    for name in ("w_gate", "w_up", "w_down"):
        shape = getattr(layer, name).shape
        integers[name] = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(
            backend.device
        )
        scales[name + "_scale"] = (torch.rand(shape[:2], generator=generator) * 0.002 + 0.001).to(
            backend.device
        )
    replace(layer, **integers, options=scales).check()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_do_not_depend_on_their_neighbours(backend, dtype):
    tokens = backend.pick(150, 70)
    layer = make_layer(13, tokens=tokens, hidden=100, inner=70, experts=3, dtype=dtype, device=backend.device)
    out = layer.run()
    for kept in backend.pick((1, 2, 5, 6, 7, 15, 16, 17, 33, 64, 65), (1, 16, 17, 65)):
        assert_same_bits(layer.some(slice(0, kept)).run(), out[:kept])
    for row in (3, tokens - 1):
        assert_same_bits(layer.some([row]).run(), out[row : row + 1])
    order = torch.randperm(tokens).tolist()
    assert_same_bits(layer.some(order).run(), out[order])


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_several_pages(dtype):
    """The CPU reads long weight rows in parts, in other ones for a few tokens than for many."""
    layer = make_layer(15, tokens=14, hidden=5001, inner=2090, experts=1, top_k=1, dtype=dtype)
    layer.check()
    out = layer.run()
    for kept in (1, 2, 3, 4, 7, 12, 13):
        assert_same_bits(layer.some(slice(0, kept)).run(), out[:kept])


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_tokens_of_long_rows(dtype):
    """More columns than a cache keeps are taken in chunks, and several tiles of rows together."""
    layer = make_layer(18, tokens=70, hidden=2100, inner=1393, experts=2, top_k=2, dtype=dtype)
    layer.check()
    out = layer.run()
    for kept in (1, 17, 33, 49):
        assert_same_bits(layer.some(slice(0, kept)).run(), out[:kept])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_any_number_of_threads(dtype):
    layer = make_layer(14, tokens=30, hidden=600, inner=300, dtype=dtype)
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
    data=st.data(),
)
def test_any_case_on_the_cpu(seed, tokens, hidden, inner, experts, dtype, gated, data):
    top_k = data.draw(st.integers(1, experts))
    make_layer(
        seed,
        tokens=tokens,
        hidden=hidden,
        inner=inner,
        experts=experts,
        top_k=top_k,
        dtype=dtype,
        gated=gated,
    ).check()


@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_plan(backend, tokens):
    layer = make_layer(15, tokens=tokens, hidden=1, inner=1, experts=7, top_k=3, device=backend.device)
    plan = RoutingPlan.from_ids(layer.ids, 7)
    offsets, slots = reference.plan(layer.ids, 7)
    assert torch.equal(plan.offsets, offsets)
    assert torch.equal(plan.slots, slots)
    assert plan.num_experts == 7
    assert int(plan.counts.sum()) == 3 * tokens


def test_plans_made_on_the_way_and_ahead(backend):
    """The same bits whether the op makes the plan, and of few slots or many, or is given it."""
    layer = make_layer(23, tokens=360, hidden=16, inner=16, experts=5, top_k=3, device=backend.device)
    layer.ids[layer.ids == 1] = 4  # one expert without tokens, one twice in some
    want = layer.run(plan=RoutingPlan.from_ids(layer.ids, 5))
    assert_same_bits(layer.run(), want)
    assert_same_bits(layer.some(slice(0, 40)).run(), want[:40])


def test_a_plan_serves_two_layers(backend):
    first, second = (make_layer(seed, device=backend.device) for seed in (16, 17))
    second = replace(second, ids=first.ids)
    plan = RoutingPlan.from_ids(first.ids, 4)
    for layer in (first, second):
        assert_same_bits(layer.run(plan=plan), layer.run())


def test_ids_that_are_no_experts(backend, monkeypatch):
    layer = make_layer(18, device=backend.device)
    bad = replace(layer, ids=layer.ids.clone())
    bad.ids[2, 1] = 4
    bad.ids[3, 0] = -1
    message = r"tranche\.moe_experts: expected topk_ids\[2, 1\] in \[0, 4\), got 4\. An id is"
    if backend.name == "cpu":
        with pytest.raises(IndexError, match=message):
            bad.run()
        return
    # left out
    without = replace(layer, weights=layer.weights.clone())
    without.weights[2, 1] = 0
    without.weights[3, 0] = 0
    assert_same_bits(bad.run(), without.run())
    plan = RoutingPlan(torch.full_like(layer.ids[0].new_empty(5), 2**30), layer.ids.new_full((10,), 2**30))
    assert bad.run(plan=plan).shape == (5, 48)  # nothing out of bounds
    monkeypatch.setenv("TRANCHE_CHECK", "1")
    with pytest.raises(IndexError, match=message):
        bad.run()


def test_a_plan_of_other_ids():
    layer = make_layer(19)
    plan = RoutingPlan.from_ids((layer.ids + 1) % 4, 4)
    with pytest.raises(IndexError, match="The plan belongs to other topk_ids"):
        layer.run(plan=plan)


def test_bad_input(backend):
    layer = make_layer(20, device=backend.device)

    def expect(message, options=None, **changes):
        with pytest.raises(ValueError, match=message):
            replace(layer, **changes, options=options or {}).run()

    expect(r"expected activation in \('silu', 'gelu', 'relu'\), got 'tanh'", {"activation": "tanh"})
    expect(r"expected x of shape \[T, H\], got \[48\]", x=layer.x[0])
    expect("expected x of dtype .*, got torch.int32", x=layer.x.int())
    expect(r"expected x\.stride\(-1\) == 1", x=layer.x.T.contiguous().T)
    expect("expected w_up of dtype torch.float32 or torch.int8, got torch.float16", w_up=layer.w_up.half())
    expect(r"expected w_down\.size\(1\) == .* \(48\), got 47", w_down=layer.w_down[:, :47])
    expect(r"expected w_gate\.size\(0\) == .* \(4\), got 3", w_gate=layer.w_gate[:3])
    expect("expected topk_ids of dtype torch.int32, got torch.int64", ids=layer.ids.long())
    expect(r"expected topk_weights of shape \[T, K\] = \[5, 2\]", weights=layer.weights[:, :1])
    expect("expected w_up_scale for int8 weights, got none", w_up=layer.w_up.to(torch.int8))
    scale = torch.ones(4, 40, device=backend.device)
    expect("expected no w_up_scale, got one", {"w_up_scale": scale})


def test_opcheck(backend):
    layer = make_layer(21, device=backend.device)
    torch.library.opcheck(backend.ops().moe_experts.default, layer.tensors())
    torch.library.opcheck(backend.ops().moe_plan.default, (layer.ids, 4))


def test_compiles_in_one_graph(backend):
    layer = make_layer(22, device=backend.device)

    def step(x, *rest):
        from tranche.moe import fused_experts

        return fused_experts(x * 1.0, *rest)

    assert_same_bits(torch.compile(step, fullgraph=True)(*layer.tensors()), layer.run())
