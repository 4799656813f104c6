"""Row invariance, bit for bit: a row depends on its own query, the slots it sees, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tree.cases import assert_correct, assert_same_bits, make_case
from tranche.tree import Tree

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def truncated(case, nodes):
    """The same case without the nodes from `nodes` on."""
    tree = Tree(
        case.tree.parent[:, :nodes].contiguous(),
        case.tree.n_nodes.clamp(max=nodes),
        case.tree.depth[:, :nodes].contiguous(),
        case.tree.ancestors[:, :nodes, : (nodes + 63) // 64].contiguous(),
    )
    return replace(case, q=case.q[:, :nodes].contiguous(), tree=tree)


def sequence(case, b):
    """One sequence of the batch alone."""
    tree = Tree(
        *(
            t[b : b + 1].contiguous()
            for t in (case.tree.parent, case.tree.n_nodes, case.tree.depth, case.tree.ancestors)
        )
    )
    return replace(
        case,
        q=case.q[b : b + 1],
        k=case.k[b : b + 1],
        v=case.v[b : b + 1],
        seqlens=case.seqlens[b : b + 1],
        tree=tree,
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("exact", [False, True])
def test_truncating_the_tree_after_the_row(backend, dtype, exact):
    nodes, lengths = backend.pick((70, (300, 2100)), (40, (250,)))
    case = make_case(20, nodes=nodes, lengths=lengths, heads=(4, 1), dtype=dtype, device=backend.device)
    case.options["exact"] = exact
    out, lse = case.run(return_lse=True)
    for kept in backend.pick((1, 2, 3, 15, 16, 17, 33, 64, 65), (1, 7, 17, 33)):
        short, short_lse = truncated(case, kept).run(return_lse=True)
        assert_same_bits(short, out[:, :kept])
        assert_same_bits(short_lse, lse[:, :kept])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("exact", [False, True])
def test_alone_and_in_a_batch(backend, dtype, exact):
    case = make_case(
        21, nodes=20, lengths=(300, 0, 77), n_nodes=(20, 5, 19), dtype=dtype, device=backend.device
    )
    case.options["exact"] = exact
    out = case.run()
    for b in range(3):
        assert_same_bits(sequence(case, b).run(), out[b : b + 1])


@pytest.mark.parametrize("dtype", FLOATS)
def test_other_rows_other_heads_spare_slots(backend, dtype):
    case = make_case(22, nodes=20, lengths=(300, 40), heads=(8, 2), dtype=dtype, device=backend.device)
    want = case.run()
    roomy = make_case(22, nodes=20, lengths=(300, 40), heads=(8, 2), dtype=dtype, device=backend.device)
    more = torch.full((2, 500, 2, 64), torch.nan, dtype=dtype, device=backend.device)
    roomy.k, roomy.v = torch.cat([case.k, more], 1), torch.cat([case.v, more], 1)
    assert_same_bits(roomy.run(), want)
    for g in range(2):
        one = replace(
            case, q=case.q[:, :, 4 * g : 4 * g + 4], k=case.k[:, :, g : g + 1], v=case.v[:, :, g : g + 1]
        )
        assert_same_bits(one.run(), want[:, :, 4 * g : 4 * g + 4])
        first = replace(one, q=one.q[:, :, :1])
        assert_same_bits(first.run(), want[:, :, 4 * g : 4 * g + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_number_of_threads(dtype):
    case = make_case(23, nodes=30, lengths=(2500, 90), heads=(8, 2), dtype=dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case.run())
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_every_run_is_the_same(backend):
    case = make_case(24, nodes=30, lengths=(600,), heads=(4, 1), dtype=torch.bfloat16, device=backend.device)
    first = case.run()
    for _ in range(backend.pick(20, 3)):
        assert_same_bits(case.run(), first)


def committed(case, b, node):
    """The case as plain decoding of `node`: its ancestors are committed to consecutive slots, N = 1."""
    length = int(case.seqlens[b])
    path = [j for j in range(node + 1) if bool(case.tree.dense_mask()[b, node, j])]
    slots = torch.tensor([*range(length), *(length + j for j in path)], device=case.q.device)
    k, v = case.k[b : b + 1, slots], case.v[b : b + 1, slots]
    depth = len(path) - 1
    seqlens = torch.tensor([length + depth], dtype=torch.int32, device=case.q.device)
    tree = Tree.chain(1, device=case.q.device)
    return replace(case, q=case.q[b : b + 1, node : node + 1], k=k, v=v, seqlens=seqlens, tree=tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "blocks"),
    [
        (700, (1, 2)),  # the sequence, chunks in turn
        (1100, (1, 2)),  # the sequence, quads of which the last is open
        (4200, (1, 2, 5)),  # the sequence, segments, quads
    ],
)
def test_how_a_launch_is_cut_does_not_show(backend, monkeypatch, dtype, length, blocks):
    """On CUDA a block owns a chunk, a quad, a segment or the sequence: a launch of fewer blocks takes longer spans."""
    for options in ({}, {"exact": True}, {"window": 600}):
        case = make_case(
            7,
            nodes=3,
            lengths=(length,),
            heads=(2, 1),
            head_dim=32,
            dtype=dtype,
            device=backend.device,
            **options,
        )
        monkeypatch.setenv("TRANCHE_TREE_ATTENTION_BLOCKS", "1000")  # a block per chunk
        out, lse = case.run(return_lse=True)
        assert_correct(case)
        for target in blocks:
            monkeypatch.setenv("TRANCHE_TREE_ATTENTION_BLOCKS", str(target))
            other, other_lse = case.run(return_lse=True)
            assert_same_bits(out, other)
            assert_same_bits(lse, other_lse)


def count_differences(case, rows):
    """Of these (sequence, node) pairs, how many differ in any bit from their plain decoding."""
    out, lse = case.run(return_lse=True)
    differing = 0
    for b, node in rows:
        alone, alone_lse = committed(case, b, node).run(return_lse=True)
        same = torch.equal(alone[0, 0], out[b, node]) and torch.equal(alone_lse[0, 0], lse[b, node])
        differing += not same
    return differing


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["random", "deep", "chain"])
def test_exact_rows_equal_plain_decoding(backend, dtype, kind):
    # lengths on both sides of group and chunk boundaries, so that paths cross them
    for seed, length in enumerate(backend.pick((0, 5, 31, 250, 255, 500, 2040), (5, 250))):
        nodes = backend.pick(40, 24)
        case = make_case(
            seed,
            nodes=nodes,
            kind=kind,
            lengths=(length,),
            heads=(2, 1),
            dtype=dtype,
            exact=True,
            device=backend.device,
        )
        rows = [(0, node) for node in range(0, nodes, backend.pick(1, 5))]
        assert count_differences(case, rows) == 0


def test_exact_under_every_keyword(backend):
    case = make_case(
        30, nodes=24, kind="deep", lengths=(250,), heads=(2, 1), dtype=torch.bfloat16, exact=True,
        window=40, softcap=3.0, sinks=torch.tensor([0.5, -1.0]),
    ).to(backend.device)  # fmt: skip
    assert count_differences(case, [(0, node) for node in range(0, 24, backend.pick(1, 5))]) == 0


@pytest.mark.soak
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_thousand_exact_rows(backend, dtype):
    rows_left, seed, generator = 10_000, 0, torch.Generator().manual_seed(1)
    while rows_left > 0:
        length = int(torch.randint(0, backend.pick(2500, 300), (), generator=generator))
        kind = ("random", "deep", "binary")[seed % 3]
        case = make_case(
            seed,
            nodes=64,
            kind=kind,
            lengths=(length,),
            heads=(2, 1),
            dtype=dtype,
            exact=True,
            device=backend.device,
        )
        assert count_differences(case, [(0, node) for node in range(64)]) == 0
        rows_left -= 64
        seed += 1
