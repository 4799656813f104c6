"""Gradients of tree_attention against torch's autograd through the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tree.cases import Case, assert_same_bits, make_case
from tranche.tree import Tree, tree_attention

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HEAD_SIZES = [32, 64, 80, 96, 128, 160, 192, 256]
SINKS = torch.linspace(-1.0, 3.0, 4)
KEYWORDS = {"scale": 0.31, "window": 9, "softcap": 2.5, "sinks": SINKS}


def leaves(case: Case, dtype: torch.dtype | None = None) -> Case:
    """The case with q, k, v (and sinks) that require gradients, converted to `dtype`."""

    def leaf(tensor):
        return tensor.detach().to(dtype or tensor.dtype).requires_grad_()

    made = replace(case, q=leaf(case.q), k=leaf(case.k), v=leaf(case.v), options=dict(case.options))
    if "sinks" in case.options:
        sinks = case.options["sinks"].detach().clone()
        made.options["sinks"] = (sinks.double() if dtype == torch.float64 else sinks).requires_grad_()
    return made


def gradients(case: Case, out, lse, grad_out, grad_lse):
    """Gradients of q, k, v and, where there are sinks, of these."""
    inputs = [case.q, case.k, case.v]
    if "sinks" in case.options:
        inputs.append(case.options["sinks"])
    return torch.autograd.grad((out, lse), inputs, (grad_out.to(out.dtype), grad_lse.to(lse.dtype)))


def directions(case: Case, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(case.q.shape, generator=generator).to(case.q)
    grad_lse = torch.randn(case.q.shape[:3], generator=generator).to(case.q.device)
    return grad_out, grad_lse * case.tree.n_nodes.gt(
        torch.arange(case.q.size(1), device=case.q.device)[:, None]
    ).T[..., None]


def computed(case: Case, seed: int = 0):
    ours = leaves(case)
    return gradients(ours, *ours.run(return_lse=True), *directions(case, seed))


def assert_gradients(case: Case) -> None:
    """As near to the fp64 reference as twice plain torch's error in the same dtype, plus one rounding."""
    grads = directions(case)
    got = computed(case)
    wide = leaves(case, torch.float64)
    expected = gradients(wide, *wide.reference(return_lse=True), *grads)
    narrow = leaves(case)
    plain = gradients(narrow, *narrow.reference(return_lse=True, compute_dtype=case.q.dtype), *grads)
    for name, ours, theirs, want in zip("qkvs", got, plain, expected, strict=False):
        assert ours.isfinite().all(), name
        error = (ours.double() - want).abs().max()
        yardstick = (theirs.double() - want).abs().max()
        unit = torch.finfo(ours.dtype).eps * want.abs().max()
        assert error <= 2 * yardstick + unit, (name, error, yardstick, unit)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_every_head_size(backend, head_dim, dtype):
    lengths = backend.pick((300, 17), (70, 17))
    assert_gradients(make_case(head_dim=head_dim, dtype=dtype, lengths=lengths, device=backend.device))


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (8, 2), (6, 2), (7, 1), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_ratio_of_heads(backend, heads, dtype):
    assert_gradients(
        make_case(1, heads=heads, dtype=dtype, lengths=(70, 0), head_dim=32, device=backend.device)
    )


@pytest.mark.parametrize("nodes", [1, 2, 31, 33, 63, 64, 65, 130])
def test_node_counts(backend, nodes):
    case = make_case(2, nodes=nodes, heads=(2, 1), head_dim=32, lengths=(40,), device=backend.device)
    assert_gradients(case)


@pytest.mark.parametrize("kind", ["random", "chain", "star", "binary", "deep"])
def test_kinds_of_trees(backend, kind):
    nodes = backend.pick(200, 70)
    assert_gradients(
        make_case(
            3,
            nodes=nodes,
            kind=kind,
            heads=(2, 1),
            head_dim=32,
            lengths=(21,),
            window=7,
            device=backend.device,
        )
    )


@pytest.mark.parametrize("length", [0, 1, 31, 32, 63, 64, 65, 127, 128])
def test_cache_lengths(backend, length):
    for dtype in (torch.float32, torch.bfloat16):
        assert_gradients(
            make_case(4, lengths=(length,), heads=(2, 1), head_dim=32, dtype=dtype, device=backend.device)
        )


@pytest.mark.parametrize("name", [*KEYWORDS, "all"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_keywords(backend, name, dtype):
    options = KEYWORDS if name == "all" else {name: KEYWORDS[name]}
    case = make_case(5, nodes=20, lengths=(50, 5), n_nodes=(20, 13), head_dim=32, dtype=dtype)
    assert_gradients(case.with_options(**options).to(backend.device))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "interleaved"])
@pytest.mark.parametrize("page_size", [None, 1, 3, 16, 64])
def test_layouts(backend, layout, page_size, dtype):
    case = make_case(
        6,
        nodes=5,
        lengths=(70, 33),
        head_dim=32,
        dtype=dtype,
        layout=layout,
        page_size=page_size,
        device=backend.device,
    )
    assert_gradients(case)
    plain = make_case(6, nodes=5, lengths=(70, 33), head_dim=32, dtype=dtype, device=backend.device)
    assert_same_bits(computed(case)[0], computed(plain)[0])


def test_unaligned_and_strided_queries(backend):
    case = make_case(7, nodes=5, lengths=(70, 33), dtype=torch.bfloat16, device=backend.device)
    want = computed(case)

    def shifted(tensor):
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
        view = wide.to(tensor.device)[..., 1:-2]
        view.copy_(tensor)
        return view

    moved = replace(case, q=shifted(case.q), k=shifted(case.k), v=shifted(case.v))
    for a, b in zip(computed(moved), want, strict=True):
        assert_same_bits(a, b)


def test_an_expanded_gradient(backend):
    case = leaves(make_case(7, head_dim=32, lengths=(20, 3), device=backend.device))
    (got,) = torch.autograd.grad(case.run().sum(), case.q)
    (want,) = torch.autograd.grad((case.run() * torch.ones_like(case.q)).sum(), case.q)
    assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_pages_shared_by_two_sequences_sum(backend, dtype):
    case = make_case(
        8, nodes=6, lengths=(64, 40), page_size=16, head_dim=32, dtype=dtype, device=backend.device
    )
    case.options["block_table"][1, :2] = case.options["block_table"][0, :2]
    assert_gradients(case)


@pytest.mark.parametrize("dtype", FLOATS)
def test_ragged_batches(backend, dtype):
    case = make_case(
        9,
        nodes=40,
        lengths=(0, 5, 100, 41),
        n_nodes=(40, 0, 1, 33),
        head_dim=32,
        dtype=dtype,
        device=backend.device,
    )
    assert_gradients(case)
    grad_q, grad_k, grad_v = computed(case)
    assert (grad_q[1] == 0).all()
    assert (grad_q[2, 1:] == 0).all()
    for grad in (grad_k, grad_v):
        assert (grad[1] == 0).all()  # no rows: nobody looks
        assert (grad[2, 101:] == 0).all()
        assert (grad[2, :101] != 0).any(-1).all()


def test_slots_outside_the_window_get_zeros(backend):
    case = make_case(10, nodes=1, lengths=(200,), head_dim=32, window=8, device=backend.device)
    _, grad_k, grad_v = computed(case)
    for grad in (grad_k, grad_v):
        assert (grad[0, :193] == 0).all()
        assert (grad[0, 193:201] != 0).any(-1).all()
        assert (grad[0, 201:] == 0).all()


@pytest.mark.parametrize(("batch", "nodes"), [(0, 4), (2, 0), (0, 0)])
@pytest.mark.parametrize("page_size", [None, 4])
def test_empty(backend, batch, nodes, page_size):
    case = make_case(11, lengths=(12,) * batch, nodes=nodes, device=backend.device)
    if page_size is not None:
        case.k = case.v = torch.ones(5, page_size, 2, 64, device=backend.device)
        case.options["block_table"] = torch.zeros(batch, 4, dtype=torch.int32, device=backend.device)
    ours = leaves(case)
    out, lse = ours.run(return_lse=True)
    for grad, tensor in zip(gradients(ours, out, lse, out, lse), (case.q, case.k, case.v), strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_slots_reach_only_the_rows_and_slots_they_may(backend, dtype, special, name):
    lengths = (37, 70)

    def fresh():
        return make_case(12, nodes=21, lengths=lengths, head_dim=32, dtype=dtype, device=backend.device)

    sees = fresh().tree.dense_mask()
    want = computed(fresh())
    for node in (0, 3, 20):
        case = fresh()
        for b, length in enumerate(lengths):
            getattr(case, name)[b, length + node] = special
        grad_q, grad_k, grad_v = computed(case)
        blind = ~sees[:, :, node]
        assert_same_bits(grad_q[blind], want[0][blind])
        if name == "v":
            assert grad_q[~blind].isnan().all()
        for grad, clean in ((grad_k, want[1]), (grad_v, want[2])):
            for b, length in enumerate(lengths):
                # nodes that no row with the bad slot in sight also sees keep their gradients' bits
                apart = ~(sees[b] & ~blind[b][:, None]).any(0)
                assert_same_bits(grad[b, length : length + 21][apart], clean[b, length : length + 21][apart])
                assert grad[b, length + 21 :].eq(0).all()
                if name == "v":
                    assert grad[b, :length].isnan().all()


def test_a_padding_row_may_hold_anything(backend):
    case = make_case(13, nodes=6, lengths=(9,), n_nodes=(4,), head_dim=32, device=backend.device)
    want = computed(case)
    case.q[0, 4:] = torch.nan
    for got, clean in zip(computed(case), want, strict=True):
        assert_same_bits(got, clean)


def test_a_broken_query_stays_in_its_row_and_path(backend):
    case = make_case(
        14, nodes=9, kind="binary", lengths=(0,), heads=(1, 1), head_dim=32, device=backend.device
    )
    want = computed(case)
    case.q[0, 7] = torch.nan
    grad_q, grad_k, _ = computed(case)
    path = case.tree.dense_mask()[0, 7]
    rows = torch.arange(9, device=backend.device) == 7
    assert grad_q[0, rows].isnan().all()
    assert_same_bits(grad_q[0, ~rows], want[0][0, ~rows])
    assert grad_k[0, :9][path].isnan().all()
    assert_same_bits(grad_k[0, :9][~path], want[1][0, :9][~path])


@pytest.mark.parametrize("options", [{}, *({key: value} for key, value in KEYWORDS.items()), KEYWORDS])
@pytest.mark.parametrize("page_size", [None, 4])
def test_gradcheck(options, page_size):
    heads = (4, 2) if "sinks" in options else (2, 1)
    case = make_case(
        15, nodes=5, lengths=(3, 70), n_nodes=(5, 3), heads=heads, head_dim=32, dtype=torch.float64,
        page_size=page_size, poison=False, **options,
    )  # fmt: skip
    case.k.nan_to_num_(0)  # spare pages
    case.v.nan_to_num_(0)

    def attend(q, k, v):
        return tree_attention(q, k, v, case.seqlens, case.tree, **case.options)

    inputs = (case.q.requires_grad_(), case.k.requires_grad_(), case.v.requires_grad_())
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_gradcheck_of_every_element():
    case = make_case(
        16, nodes=3, lengths=(2,), heads=(2, 1), head_dim=32, dtype=torch.float64, softcap=1.5, window=3
    )

    def attend(q, k, v):
        return tree_attention(q, k, v, case.seqlens, case.tree, **case.options)

    inputs = (case.q.requires_grad_(), case.k.requires_grad_(), case.v.requires_grad_())
    assert torch.autograd.gradcheck(attend, inputs)


def test_fp64_matches_the_reference():
    case = make_case(
        17, nodes=20, lengths=(150, 20), dtype=torch.float64, sinks=SINKS, softcap=2.0, window=60
    )
    wide = leaves(case, torch.float64)
    grads = directions(case)
    expected = gradients(wide, *wide.reference(return_lse=True), *grads)
    for got, want in zip(computed(case)[:3], expected, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_no_second_derivative():
    case = leaves(make_case(18, head_dim=32, lengths=(3, 2)))
    with pytest.raises(
        RuntimeError, match=r"expected to be differentiated once, got create_graph=True\. Its"
    ):
        torch.autograd.grad(case.run().sum(), case.q, create_graph=True)


def test_only_what_is_asked_for(backend):
    case = make_case(19, head_dim=32, lengths=(30, 3), device=backend.device)
    want = computed(case)
    for i, name in enumerate(("q", "k", "v")):
        alone = replace(case, **{name: getattr(case, name).clone().requires_grad_()})
        (got,) = torch.autograd.grad(alone.run(return_lse=True), getattr(alone, name), directions(case))
        assert_same_bits(got, want[i])
    sinks = torch.zeros(4, device=backend.device, requires_grad=True)
    (got,) = torch.autograd.grad(case.run(sinks=sinks).sum(), sinks)
    assert got.shape == (4,)


def test_the_results_are_those_without_gradients(backend):
    case = make_case(20, head_dim=32, lengths=(30, 3), device=backend.device)
    recorded = leaves(case).run(return_lse=True)
    for got, want in zip(recorded, case.run(return_lse=True), strict=True):
        assert got.requires_grad
        assert_same_bits(got.detach(), want)
    with torch.no_grad():
        assert not leaves(case).run().requires_grad
    assert leaves(case).run(exact=True).requires_grad


def test_every_run_is_the_same(backend):
    case = make_case(
        21, nodes=30, lengths=(90, 64), page_size=16, dtype=torch.bfloat16, device=backend.device
    )
    case.options["block_table"][1, :3] = case.options["block_table"][0, :3]
    first = computed(case)
    for _ in range(backend.pick(10, 1)):
        for got, want in zip(computed(case), first, strict=True):
            assert_same_bits(got, want)


def test_any_number_of_threads():
    case = make_case(22, nodes=30, lengths=(190, 64), heads=(8, 4), dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(computed(case))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same_bits(got, want)


def test_compiles_in_one_graph(backend):
    case = make_case(23, lengths=(30, 3), head_dim=32, sinks=SINKS, window=8).to(backend.device)

    def step(q, k, v, seqlens, parents, sinks):
        return tree_attention(
            q, k, v, seqlens, Tree.from_parent(parents), sinks=sinks, window=8, return_lse=True
        )

    def run(function):
        ours = leaves(case)
        out, lse = function(ours.q, ours.k, ours.v, case.seqlens, case.tree.parent, ours.options["sinks"])
        return (out.detach(), lse.detach(), *gradients(ours, out, lse, *directions(case)))

    for got, want in zip(run(torch.compile(step, fullgraph=True)), run(step), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_opcheck(backend):
    case = make_case(24, lengths=(30, 3), page_size=16, head_dim=32, device=backend.device)
    out, lse = case.run(return_lse=True)
    grad_out, grad_lse = directions(case)
    tree = case.tree
    arguments = (
        grad_out,
        grad_lse,
        case.q,
        case.k,
        case.v,
        out,
        lse,
        case.seqlens,
        tree.ancestors,
        tree.depth,
        tree.n_nodes,
    )
    op = backend.ops().tree_attention_backward.default
    for options in ({}, {"window": 4, "query": False}, {"caches": False}):
        torch.library.opcheck(op, arguments, {"block_table": case.options["block_table"], **options})


def test_caches_of_another_dtype(backend):
    case = make_case(25, lengths=(30, 3), cache_dtype=torch.float8_e4m3fn, device=backend.device)
    case.q.requires_grad_()
    with pytest.raises(
        ValueError, match=r"expected caches of dtype torch\.float32 where gradients are wanted, got"
    ):
        case.run()
    with torch.no_grad():
        assert case.run().isfinite().all()


def test_bad_arguments_of_the_raw_op(backend):
    case = make_case(26, lengths=(30, 3), head_dim=32, device=backend.device)
    out, lse = case.run(return_lse=True)
    tree, op = case.tree, backend.ops().tree_attention_backward
    rest = (case.seqlens, tree.ancestors, tree.depth, tree.n_nodes)

    def expect(message, grad_out=out, grad_lse=None, k=case.k, v=case.v, result=out, logs=lse):
        with pytest.raises(ValueError, match=r"tranche\.tree_attention_backward: expected " + message):
            op(grad_out, grad_lse, case.q, k, v, result, logs, *rest)

    expect("grad_out of dtype torch.float32, got torch.float64", grad_out=out.double())
    expect(r"grad_out of shape \[B, N, Hq, D\]", grad_out=out[:1])
    expect("a contiguous grad_out", grad_out=out.transpose(0, 1).contiguous().transpose(0, 1))
    expect(r"lse of shape \[B, N, Hq\]", logs=lse[..., 0])
    expect(r"grad_lse of shape \[B, N, Hq\]", grad_lse=lse[..., 0])
    expect("out of dtype torch.float32", result=out.half())
    fp8 = torch.float8_e4m3fn
    expect(
        "caches of dtype torch.float32, got torch.float8_e4m3fn. Gradients need",
        k=case.k.to(fp8),
        v=case.v.to(fp8),
    )
