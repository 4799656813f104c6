"""tree_attention against its reference: shapes, dtypes, layouts, keywords, and what must never be seen."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tree.cases import assert_correct, assert_same_bits, make_case, used_rows
from tranche.tree import Tree, reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HEAD_SIZES = [32, 64, 80, 96, 128, 160, 192, 256]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_every_head_size(backend, head_dim, dtype):
    lengths = backend.pick((300, 17), (130, 17))
    assert_correct(make_case(head_dim=head_dim, dtype=dtype, lengths=lengths, device=backend.device))


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (8, 2), (6, 2), (7, 1), (5, 5), (24, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_ratio_of_heads(backend, heads, dtype):
    assert_correct(make_case(1, heads=heads, dtype=dtype, lengths=(70, 0), device=backend.device))


@pytest.mark.parametrize("nodes", [1, 2, 15, 16, 17, 33, 64, 65, 100])
def test_node_counts(backend, nodes):
    assert_correct(
        make_case(2, nodes=nodes, heads=(2, 1), dtype=torch.bfloat16, lengths=(40,), device=backend.device)
    )


@pytest.mark.parametrize("kind", ["random", "chain", "star", "binary", "deep"])
def test_364_nodes(backend, kind):
    heads, lengths = backend.pick(((4, 2), (500, 3)), ((1, 1), (30,)))
    assert_correct(
        make_case(
            3, nodes=364, kind=kind, heads=heads, lengths=lengths, dtype=torch.bfloat16, device=backend.device
        )
    )


def test_1024_nodes(backend):
    heads, lengths = backend.pick(((2, 1), (100, 5)), ((1, 1), (5,)))
    assert_correct(
        make_case(
            3,
            nodes=1024,
            kind="deep",
            heads=heads,
            lengths=lengths,
            dtype=torch.bfloat16,
            device=backend.device,
        )
    )


# around MMA groups of 16 and 32, chunks of 256, and runs of chunks
@pytest.mark.parametrize(
    "length", [0, 1, 15, 16, 31, 32, 240, 249, 255, 256, 257, 511, 513, 2040, 2048, 2300]
)
def test_cache_lengths(backend, length):
    assert_correct(make_case(4, lengths=(length,), heads=(2, 1), dtype=torch.bfloat16, device=backend.device))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "interleaved"])
@pytest.mark.parametrize("page_size", [None, 1, 3, 16, 64])
def test_layouts_give_the_same_bits(backend, layout, page_size, dtype):
    plain = make_case(5, lengths=(90, 33), dtype=dtype, device=backend.device)
    moved = make_case(
        5, lengths=(90, 33), dtype=dtype, layout=layout, page_size=page_size, device=backend.device
    )
    assert_correct(moved)
    assert_same_bits(moved.run(), plain.run())


def test_unaligned_rows_give_the_same_bits(backend):
    case = make_case(6, lengths=(90, 33), dtype=torch.bfloat16, device=backend.device)
    want = case.run()

    def shifted(tensor):
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
        view = wide.to(tensor.device)[..., 1:-2]
        view.copy_(tensor)
        return view

    case.q, case.k, case.v = shifted(case.q), shifted(case.k), shifted(case.v)
    assert_same_bits(case.run(), want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_ragged_batches(backend, dtype):
    assert_correct(
        make_case(
            7, nodes=40, lengths=(0, 5, 300, 41), n_nodes=(40, 0, 1, 33), dtype=dtype, device=backend.device
        )
    )


def test_fp64_on_the_cpu():
    for head_dim in (64, 80):
        assert_correct(make_case(8, dtype=torch.float64, head_dim=head_dim, nodes=20, lengths=(300, 20)))


@pytest.mark.parametrize(("batch", "nodes"), [(0, 4), (2, 0), (0, 0)])
def test_empty(backend, batch, nodes):
    case = make_case(9, lengths=(12,) * batch, nodes=nodes, device=backend.device)
    out, lse = case.run(return_lse=True)
    assert out.shape == (batch, nodes, 4, 64)
    assert lse.shape == (batch, nodes, 4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("exact", [False, True])
def test_visibility_is_exact(backend, dtype, exact):
    """q = k = 0 makes all weights equal; values that are powers of two then name the visible slots."""
    bits = {torch.float32: 20, torch.float16: 8, torch.bfloat16: 6}[dtype]
    for seed, length in ((0, 0), (1, 3), (2, 250)):
        case = make_case(
            seed, nodes=40, lengths=(length,), heads=(1, 1), head_dim=64, dtype=dtype, device=backend.device
        )
        case.q.zero_()
        case.k.nan_to_num_(0).zero_()
        case.v.nan_to_num_(0).zero_()
        sees = reference.visible_slots(length, 40, case.tree, 0, None)
        for first in range(0, length + 40, 64 * bits):
            slots = torch.arange(first, min(first + 64 * bits, length + 40), device=backend.device)
            values = torch.zeros(length + 40, 64, dtype=dtype, device=backend.device)
            values[slots, (slots - first) // bits] = 2.0 ** ((slots - first) % bits).to(dtype)
            case.v[0, : length + 40, 0] = values
            out, lse = case.run(return_lse=True, exact=exact)
            count = sees.sum(1)
            assert torch.equal(lse[0, :, 0].exp().round().long(), count)
            total = (out[0, :, 0].double() * count[:, None]).round()
            # out is rounded to its dtype, so round back: the sum has `bits` bits at most
            assert torch.equal(total, sees.double() @ values.double())


@pytest.mark.parametrize("dtype", FLOATS)
def test_integers_are_exact(backend, dtype):
    """Each row sees one far largest score, so the result is that slot's value, exactly."""
    case = make_case(
        10, nodes=20, lengths=(70, 300), dtype=dtype, integers=True, poison=False, device=backend.device
    )
    case.q.fill_(0)
    case.q[..., 0] = 1
    case.k.fill_(0)
    case.k[:, 13, :, 0] = 30000
    assert_same_bits(case.run(), case.v[:, 13, [0, 0, 1, 1]][:, None].expand_as(case.q))


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
def test_non_finite_slots_reach_only_the_rows_that_see_them(backend, special, dtype, exact):
    clean = make_case(11, nodes=21, lengths=(37, 250), dtype=dtype, device=backend.device)
    want = clean.run(exact=exact)
    for name in ("k", "v"):
        for node in (0, 3, 20):
            case = make_case(11, nodes=21, lengths=(37, 250), dtype=dtype, device=backend.device)
            for b, length in enumerate((37, 250)):
                getattr(case, name)[b, length + node] = special
            out = case.run(exact=exact)
            sees = case.tree.dense_mask()[:, :, node]
            assert_same_bits(out[~sees], want[~sees])
            touched = out[sees]
            if name == "v":
                assert torch.equal(touched, torch.full_like(touched, special)) or (
                    special != special and touched.isnan().all()
                )
            else:
                assert not touched.isfinite().all() or special == special


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_nan_in_the_prefix_reaches_every_row_and_head_that_sees_it(backend, dtype):
    case = make_case(12, lengths=(300, 20), dtype=dtype, device=backend.device)
    case.v[0, 299, 1, 5] = torch.nan
    out = case.run()
    assert out[0, :, 2:, 5].isnan().all()
    out[0, :, 2:, 5] = 0
    assert out.isfinite().all()


KEYWORDS = {
    "scale": 0.31,
    "window": 9,
    "softcap": 2.5,
    "sinks": torch.linspace(-1.0, 3.0, 4),
}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keywords_alone_and_together(backend, count, dtype):
    for names in itertools.combinations(KEYWORDS, count):
        options = {name: KEYWORDS[name] for name in names}
        assert_correct(
            make_case(13, nodes=12, lengths=(40, 3), dtype=dtype, device="cpu", **options).to(backend.device)
        )


@pytest.mark.parametrize("window", [1, 2, 5, 64, 280, 10**6])
@pytest.mark.parametrize("exact", [False, True])
def test_window_counts_depth(backend, window, exact):
    case = make_case(
        14, nodes=30, kind="deep", lengths=(290, 4), heads=(2, 1), window=window, device=backend.device
    )
    assert_correct(case.with_options(exact=exact))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scales", [False, True])
def test_fp8_caches(backend, dtype, scales):
    options = {"k_scale": torch.tensor([0.5, 1.7]), "v_scale": torch.tensor([2.0, 0.3])} if scales else {}
    case = make_case(15, nodes=9, lengths=(290, 4), dtype=dtype, cache_dtype=torch.float8_e4m3fn, **options)
    assert_correct(case.to(backend.device))


def test_sinks_are_left_out_of_lse(backend):
    case = make_case(16, device=backend.device)
    _, lse = case.run(return_lse=True)
    _, with_sinks = case.run(return_lse=True, sinks=torch.full((4,), 5.0, device=backend.device))
    assert_same_bits(lse, with_sinks)


def test_pages_shared_by_two_sequences(backend):
    case = make_case(17, lengths=(64, 64), page_size=16, dtype=torch.bfloat16, device=backend.device)
    case.options["block_table"][1, :4] = case.options["block_table"][0, :4]
    assert_correct(case)


def test_opcheck(backend):
    case = make_case(18, lengths=(30, 3), page_size=16, device=backend.device)
    arguments = (
        case.q,
        case.k,
        case.v,
        case.seqlens,
        case.tree.ancestors,
        case.tree.depth,
        case.tree.n_nodes,
    )
    op = backend.ops().tree_attention.default
    torch.library.opcheck(op, arguments, {"block_table": case.options["block_table"], "return_lse": True})
    torch.library.opcheck(op, arguments, {"block_table": case.options["block_table"], "window": 4})


def test_compiles_in_one_graph(backend):
    case = make_case(19, lengths=(30, 3), device=backend.device)

    def step(q, k, v, seqlens, parents):
        from tranche.tree import tree_attention

        return tree_attention(q, k, v, seqlens, Tree.from_parent(parents), return_lse=True)

    arguments = (case.q, case.k, case.v, case.seqlens, case.tree.parent)
    for a, b in zip(torch.compile(step, fullgraph=True)(*arguments), step(*arguments), strict=True):
        assert_same_bits(a, b)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    nodes=st.integers(1, 70),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (8, 2)]),
    head_dim=st.sampled_from(HEAD_SIZES),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(["bshd", "bhsd", "interleaved"]),
    page_size=st.sampled_from([None, 1, 7, 16, 256]),
    exact=st.booleans(),
    data=st.data(),
)
def test_any_case_on_the_cpu(seed, batch, nodes, heads, head_dim, dtype, layout, page_size, exact, data):
    lengths = data.draw(st.tuples(*[st.integers(0, 600)] * batch))
    counts = data.draw(st.tuples(*[st.integers(0, nodes)] * batch))
    case = make_case(
        seed,
        nodes=nodes,
        lengths=lengths,
        n_nodes=counts,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        layout=layout,
        page_size=page_size,
        exact=exact,
    )
    assert_correct(case)
    assert used_rows(case).sum() == sum(counts)
