"""write_cache_ and compact_cache_ against their references, and how in-place ops stand to autograd."""

from __future__ import annotations

import pytest
import torch

from tests.tree.cases import random_parents
from tranche import _library
from tranche.__main__ import op_table
from tranche.tree import (
    Accepted,
    KVCache,
    Tree,
    TreeAttention,
    compact_cache_,
    reference,
    tree_attention,
    write_cache_,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def bits(tensor):
    """The tensor's bytes, so that NaN compares equal to itself."""
    return tensor.detach().contiguous().view(torch.uint8).cpu()


def assert_same_caches(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(bits(a), bits(b))


def make_cache(shape, dtype, layout="bshd", seed=0):
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn(shape, generator=generator).to(dtype)
    if layout == "bhsd":
        return cache.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":  # rows that are not aligned to 16 bytes
        wide = torch.zeros((*shape[:-1], shape[-1] + 3)).to(dtype)
        wide[..., 1:-2] = cache
        return wide[..., 1:-2]
    return cache


def copy_of(cache):
    """A copy with the same strides."""
    return torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=cache.device).copy_(
        cache
    )


def make_tree(batch, nodes, counts=None, device="cpu", kind="random"):
    counts = torch.tensor(counts if counts is not None else [nodes] * batch, dtype=torch.int32)
    parents = random_parents(batch, nodes, kind, torch.Generator().manual_seed(3))
    ancestors, depth = reference.tree_ancestors(parents, counts)
    return Tree(parents, counts, depth, ancestors).to(device)


def lengths(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def page_table(batch, per_sequence, pages, device, spare=1):
    """Distinct pages for every sequence; entries past them are no pages at all."""
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1))[: batch * per_sequence]
    table = torch.full((batch, per_sequence + spare), -9, dtype=torch.int32)
    table[:, :per_sequence] = order.view(batch, per_sequence)
    return table.to(device)


# ---- write_cache_ ----------------------------------------


def write_case(
    device, dtype, *, cache_dtype=None, head_dim=32, layout="bshd", page_size=None, heads=2, nodes=7
):
    """k, v, caches, seqlens, tree and keywords of a ragged batch of three."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(3, nodes, heads, head_dim, generator=generator).to(dtype) for _ in range(2))
    options = {}
    if page_size is None:
        shape = (3, 20 + nodes, heads, head_dim)
    else:
        per_sequence = -(-(20 + nodes) // page_size)
        shape = (3 * per_sequence + 2, page_size, heads, head_dim)
        options["block_table"] = page_table(3, per_sequence, shape[0], device, spare=0)
    caches = [make_cache(shape, cache_dtype or dtype, layout, seed=i) for i in (1, 2)]
    tree = make_tree(3, nodes, (nodes, 0, nodes // 2), device)
    return (
        [t.to(device) for t in (k, v)],
        [c.to(device) for c in caches],
        lengths(20, 3, 7, device=device),
        tree,
        options,
    )


def tables(positions, width, dtype, device):
    inverse = 10000.0 ** (-torch.arange(0, width, 2)[: width // 2] / width)
    angle = torch.arange(positions)[:, None] * inverse
    return tuple(f(angle).to(dtype).to(device) for f in (torch.cos, torch.sin))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "padded"])
@pytest.mark.parametrize("page_size", [None, 1, 5, 16])
def test_written_rows_are_copies_and_nothing_else_changes(backend, page_size, layout, dtype):
    states, caches, seqlens, tree, options = write_case(
        backend.device, dtype, layout=layout, page_size=page_size
    )
    states[1][0, 0, 0, :3] = torch.nan
    want = [copy_of(c) for c in caches]
    reference.write_cache_(*states, *want, seqlens, tree, compute_dtype=dtype, **options)
    write_cache_(*states, *caches, seqlens, tree, **options)
    assert_same_caches(caches, want)


@pytest.mark.parametrize("head_dim", [1, 2, 6, 80, 128, 256])
def test_head_sizes_and_strided_states(backend, head_dim):
    states, caches, seqlens, tree, _ = write_case(backend.device, torch.bfloat16, head_dim=head_dim)
    states = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in states]
    want = [copy_of(c) for c in caches]
    reference.write_cache_(*states, *want, seqlens, tree, compute_dtype=torch.bfloat16)
    write_cache_(*states, *caches, seqlens, tree)
    assert_same_caches(caches, want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("table_dtype", ["float32", "same"])
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("layout", ["bshd", "padded"])
def test_rope_by_depth(backend, halves, table_dtype, dtype, layout):
    states, caches, seqlens, tree, options = write_case(backend.device, dtype, head_dim=32, layout=layout)
    rope = tables(40, 32, torch.float32 if table_dtype == "float32" else dtype, backend.device)
    rope = tuple(t.repeat(1, halves).contiguous() for t in rope)
    exact, plain = ([copy_of(c) for c in caches] for _ in range(2))
    # in float32 the reference rounds as the kernels do
    reference.write_cache_(*states, *exact, seqlens, tree, rope=rope, compute_dtype=torch.float32, **options)
    reference.write_cache_(*states, *plain, seqlens, tree, rope=rope, **options)
    write_cache_(*states, *caches, seqlens, tree, rope=rope, **options)
    assert_same_caches(caches, exact)
    assert torch.allclose(caches[0].double(), plain[0].double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_rope_tables_may_differ_between_the_halves(backend):
    states, caches, seqlens, tree, _ = write_case(backend.device, torch.float32, head_dim=6)
    rope = tuple(
        torch.randn(40, 6, generator=torch.Generator().manual_seed(i)).to(backend.device) for i in (1, 2)
    )
    want = [copy_of(c) for c in caches]
    reference.write_cache_(*states, *want, seqlens, tree, rope=rope, compute_dtype=torch.float32)
    write_cache_(*states, *caches, seqlens, tree, rope=rope)
    assert_same_caches(caches, want)


def test_rope_is_that_of_transformers(backend):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    states, caches, seqlens, tree, _ = write_case(backend.device, torch.float32)
    cos, sin = (t.repeat(1, 2).contiguous() for t in tables(40, 32, torch.float32, backend.device))
    write_cache_(*states, *caches, seqlens, tree, rope=(cos, sin))
    position = tree.positions(seqlens)
    _, rotated = apply_rotary_pos_emb(states[0], states[0], cos[position], sin[position], unsqueeze_dim=2)
    for b, count in enumerate(tree.n_nodes.tolist()):
        start = int(seqlens[b])
        assert torch.allclose(caches[0][b, start : start + count], rotated[b, :count], atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("page_size", [None, 5])
def test_float8_caches(backend, page_size, rotate, scaled, dtype):
    case = write_case(backend.device, dtype, cache_dtype=torch.float8_e4m3fn, page_size=page_size)
    states, caches, seqlens, tree, options = case
    states[0][0, 0, 0, :4] = torch.tensor([1e4, -1e4, torch.nan, 1e-9]).to(dtype)
    if scaled:
        options["k_scale"] = torch.tensor([0.5, 0.013], device=backend.device)
        options["v_scale"] = torch.tensor([3.0, 0.25], device=backend.device)
    if rotate:
        options["rope"] = tables(40, 32, torch.float32, backend.device)
    want = [copy_of(c) for c in caches]
    reference.write_cache_(*states, *want, seqlens, tree, compute_dtype=torch.float32, **options)
    write_cache_(*states, *caches, seqlens, tree, **options)
    for a, b in zip(caches, want, strict=True):
        nan = b.float().isnan()
        assert torch.equal(a.float().isnan(), nan)
        assert torch.equal(a.float()[~nan], b.float()[~nan])


def test_write_in_double():
    states, caches, seqlens, tree, _ = write_case("cpu", torch.float64)
    for rope in (None, tables(40, 32, torch.float64, "cpu"), tables(40, 32, torch.float32, "cpu")):
        want = [copy_of(c) for c in caches]
        reference.write_cache_(*states, *want, seqlens, tree, rope=rope)
        write_cache_(*states, *caches, seqlens, tree, rope=rope)
        assert_same_caches(caches, want)


@pytest.mark.parametrize("shape", [(0, 4, 2, 32), (2, 0, 2, 32), (2, 4, 0, 32), (2, 4, 2, 0)])
def test_write_nothing(backend, shape):
    batch, nodes, heads, size = shape
    k = torch.zeros(shape, device=backend.device)
    caches = [torch.ones(batch, 9, heads, size, device=backend.device) for _ in range(2)]
    tree = make_tree(batch, nodes, device=backend.device)
    write_cache_(k, k, *caches, lengths(*[3] * batch, device=backend.device), tree)
    assert all((c == 1).all() for c in caches)


def test_slots_and_positions_past_the_end(backend, monkeypatch):
    def case():
        states, caches, seqlens, tree, _ = write_case(backend.device, torch.float32)
        return states, caches, seqlens, tree

    def expect(message, seqlens, **options):
        states, caches, _, tree = case()
        with pytest.raises(IndexError, match=message):
            write_cache_(*states, *caches, seqlens, tree, **options)

    rope = tables(22, 32, torch.float32, backend.device)
    past = lengths(21, 3, 7, device=backend.device)
    negative = lengths(20, 3, -2, device=backend.device)
    wrong = [
        (r"cache_seqlens\[0\] \+ n_nodes\[0\] <= 27, got 28", past, {}),
        (r"cache_seqlens\[2\] in \[0, 27\], got -2", negative, {}),
        (
            r"cache_seqlens\[0\] \+ depth\[0, \d\] in \[0, 22\), got 22\. Give rope tables",
            lengths(20, 3, 7, device=backend.device),
            {"rope": rope},
        ),
    ]
    if backend.name != "cpu":
        states, caches, _, tree = case()
        clamped = [copy_of(c) for c in caches]
        write_cache_(*states, *caches, past, tree)
        write_cache_(*states, *clamped, lengths(20, 3, 7, device=backend.device), tree)
        assert_same_caches(caches, clamped)
        write_cache_(*states, *caches, negative, tree)
        write_cache_(*states, *clamped, lengths(20, 3, 0, device=backend.device), tree)
        assert_same_caches(caches, clamped)
        # positions past the table take its last row
        longer = tuple(torch.cat([t, t[-1:].expand(20, -1)]) for t in rope)
        seqlens = lengths(20, 3, 7, device=backend.device)
        write_cache_(*states, *caches, seqlens, tree, rope=rope)
        write_cache_(*states, *clamped, seqlens, tree, rope=longer)
        assert_same_caches(caches, clamped)
        monkeypatch.setenv("TRANCHE_CHECK", "1")
    for message, seqlens, options in wrong:
        expect(message, seqlens, **options)


def test_write_bad_input_by_name(backend):
    (k, v), (k_cache, v_cache), seqlens, tree, _ = write_case(backend.device, torch.float32)
    cos, sin = tables(40, 32, torch.float32, backend.device)
    ones = torch.ones(2, device=backend.device)
    wrong = [
        ((k[0], v, k_cache, v_cache), {}, r"k of shape \[B, N, Hkv, D\], got \[7, 2, 32\]"),
        ((k, v.half(), k_cache, v_cache), {}, "v of dtype torch.float32, got torch.float16"),
        ((k, v[:, :5], k_cache, v_cache), {}, r"v\.size\(1\) == k\.size\(1\) \(7\), got 5"),
        (
            (k, v, k_cache.half(), v_cache),
            {},
            "k_cache of dtype torch.float32 or torch.float8_e4m3fn, got torch.float16",
        ),
        ((k, v, k_cache, v_cache[:, :9]), {}, r"v_cache\.size\(1\) == k_cache\.size\(1\)"),
        (
            (k, v, k_cache[:, :, :1], v_cache[:, :, :1]),
            {},
            r"k_cache\.size\(2\) == k\.size\(2\) \(2\), got 1",
        ),
        ((k, v, k_cache[:2], v_cache[:2]), {}, r"k_cache\.size\(0\) == k\.size\(0\) \(3\), got 2"),
        ((k, v, k_cache, v_cache), {"rope": (cos, None)}, "expected cos and sin, or neither"),
        ((k, v, k_cache, v_cache), {"rope": (cos[:, :5], sin)}, r"cos\.size\(1\) in \{32, 16\}, got 5"),
        (
            (k, v, k_cache, v_cache),
            {"rope": (cos.half(), sin)},
            "cos of dtype torch.float32, got torch.float16",
        ),
        ((k, v, k_cache, v_cache), {"k_scale": ones}, "no k_scale for caches of dtype torch.float32"),
    ]
    for arguments, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            write_cache_(*arguments, seqlens, tree, **options)


# ---- compact_cache_ ----------------------------------------


def accept(paths, nodes, device="cpu"):
    """`Accepted` of these paths; an empty path accepts nothing, not even the root."""
    path = torch.full((len(paths), nodes), -1, dtype=torch.int32)
    for b, row in enumerate(paths):
        path[b, : len(row)] = torch.tensor(row, dtype=torch.int32)
    length = torch.tensor([max(len(row) - 1, 0) for row in paths], dtype=torch.int32)
    return Accepted(
        path.to(device), length.to(device), torch.zeros(len(paths), dtype=torch.int64, device=device)
    )


PATHS = [[0, 2, 3, 7, 8, 11], [0], [0, 1, 2], [], [0, 11], list(range(12)), [0, 5, 6, 7, 8, 9, 10, 11]]
STARTS = (20, 0, 7, 13, 28, 28, 3)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "padded"])
@pytest.mark.parametrize("page_size", [None, 1, 7, 16])
def test_accepted_paths_are_kept(backend, page_size, layout, dtype):
    slots, device = 40, backend.device
    accepted, seqlens, options = accept(PATHS, 12, device), lengths(*STARTS, device=device), {}
    shape = (7, slots, 2, 16)
    if page_size is not None:
        per_sequence = -(-slots // page_size)
        shape = (7 * per_sequence + 2, page_size, 2, 16)
        options["block_table"] = page_table(7, per_sequence, shape[0], device)
    caches = [make_cache(shape, dtype, layout, seed=i).to(device) for i in range(3)]
    want, want_seqlens = [copy_of(c) for c in caches], seqlens.clone()
    reference.compact_cache_(want, accepted, want_seqlens, **options)
    compact_cache_(caches, accepted, seqlens, **options)
    assert torch.equal(seqlens, want_seqlens)
    assert seqlens.tolist() == [s + len(p) for s, p in zip(STARTS, PATHS, strict=True)]
    assert_same_caches(caches, want)


@pytest.mark.parametrize("seed", range(4))
def test_random_paths_overlap_anyhow(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    nodes, batch, device = backend.pick(64, 24), 5, backend.device
    paths = []
    for _ in range(batch):
        chosen = torch.rand(nodes - 1, generator=generator) < torch.rand(1, generator=generator)
        paths.append([0, *(chosen.nonzero().flatten() + 1).tolist()])
    seqlens = torch.randint(0, 9, (batch,), generator=generator).to(torch.int32).to(device)
    caches = [make_cache((batch, nodes + 9, 3, 40), torch.bfloat16, seed=i).to(device) for i in range(2)]
    want, want_seqlens = [copy_of(c) for c in caches], seqlens.clone()
    reference.compact_cache_(want, accept(paths, nodes, device), want_seqlens)
    compact_cache_(caches, accept(paths, nodes, device), seqlens)
    assert torch.equal(seqlens, want_seqlens)
    assert_same_caches(caches, want)


def test_many_caches_of_several_kinds(backend):
    device = backend.device
    kinds = [(2, 16, torch.float32), (1, 64, torch.bfloat16), (4, 10, torch.float16)]
    count = backend.pick(600, 259)  # more than one launch holds
    caches = [
        make_cache((2, 9, heads, size), dtype, seed=i).to(device)
        for i, (heads, size, dtype) in ((i, kinds[i % 3]) for i in range(count))
    ]
    accepted, seqlens = accept([[0, 2, 4], [0, 3]], 5, device), lengths(1, 4, device=device)
    want, want_seqlens = [copy_of(c) for c in caches], seqlens.clone()
    reference.compact_cache_(want, accepted, want_seqlens)
    compact_cache_(caches, accepted, seqlens)
    assert torch.equal(seqlens, want_seqlens)
    assert_same_caches(caches, want)


def test_pages_shared_by_two_prefixes_are_never_written(backend):
    device, page = backend.device, 4
    caches = [make_cache((9, page, 2, 16), torch.float32, seed=i).to(device) for i in range(2)]
    # pages 3 and 5 hold the prefix of both sequences; what follows is their own
    table = torch.tensor([[3, 5, 0, 1, 2], [3, 5, 8, 7, 6]], dtype=torch.int32, device=device)
    before = [copy_of(c) for c in caches]
    seqlens = lengths(8, 8, device=device)
    compact_cache_(caches, accept([[0, 3, 7], [0, 1, 6]], 8, device), seqlens, block_table=table)
    assert seqlens.tolist() == [11, 11]
    for cache, old in zip(caches, before, strict=True):
        for shared in (3, 5, 4):
            assert torch.equal(cache[shared], old[shared])
        assert torch.equal(cache[0, :3], torch.stack([old[0, 0], old[0, 3], old[1, 3]]))
        assert torch.equal(cache[8, :3], torch.stack([old[8, 0], old[8, 1], old[7, 2]]))


@pytest.mark.parametrize("columns", [1, 1 << 12, 1 << 17, (1 << 19) - 1])
def test_a_wide_capacity_leaves_few_bits_for_counting_readers(backend, columns):
    device, page = backend.device, 4096
    caches = [make_cache((3, page, 2, 4), torch.float32, seed=i).to(device) for i in range(5)]
    table = torch.zeros(2, columns, dtype=torch.int32, device=device)
    table[:, 0] = torch.tensor([2, 1])
    want = [copy_of(c) for c in caches]
    accepted, seqlens = accept([[0, 2], [0, 1, 3]], 4, device), lengths(3, 4092, device=device)
    want_seqlens = seqlens.clone()
    reference.compact_cache_(want, accepted, want_seqlens, block_table=table)
    compact_cache_(caches, accepted, seqlens, block_table=table)
    assert seqlens.tolist() == want_seqlens.tolist() == [5, 4095]
    assert_same_caches(caches, want)


@pytest.mark.parametrize("batch", [0, 3])
def test_compact_nothing(backend, batch):
    device = backend.device
    caches = [torch.ones(batch, 5, 2, 8, device=device)]
    seqlens = lengths(*[2] * batch, device=device)
    compact_cache_(caches, accept([[] for _ in range(batch)], 4, device), seqlens)
    assert seqlens.tolist() == [2] * batch
    empty = [torch.ones(batch, 5, 2, 0, device=device)]
    compact_cache_(empty, accept([[0, 2] for _ in range(batch)], 4, device), seqlens)
    assert seqlens.tolist() == [4] * batch


def test_paths_that_are_none(backend, monkeypatch):
    device = backend.device
    wrong = [
        ([0, 3, 2], None, 4, r"path\[0, 2\] in \(3, 6\), got 2\. An accepted path"),
        ([1, 2], None, 4, r"path\[0, 0\] == 0 \(the root\), got 1"),
        ([0, 9], None, 4, r"path\[0, 1\] in \(0, 6\), got 9"),
        ([0, -5], None, 4, r"path\[0, 1\] in \(0, 6\), got -5"),
        ([0], 6, 4, r"length\[0\] in \[0, 5\], got 6"),
        ([0], -2, 4, r"length\[0\] in \[0, 5\], got -2"),
        ([0, 5], None, 9, r"cache_seqlens\[0\] \+ the accepted nodes <= 10, got 15"),
    ]
    for path, length, start, message in wrong:
        accepted = accept([path], 6, device)
        if length is not None:
            accepted.length.fill_(length)
        caches, seqlens = [make_cache((1, 10, 1, 8), torch.float32).to(device)], lengths(start, device=device)
        if backend.name != "cpu":
            before = copy_of(caches[0])
            compact_cache_(caches, accepted, seqlens)
            assert start <= int(seqlens[0]) <= 10
            assert torch.equal(caches[0][:, :start], before[:, :start])
            seqlens.fill_(start)
            monkeypatch.setenv("TRANCHE_CHECK", "1")
        with pytest.raises(IndexError, match=message):
            compact_cache_(caches, accepted, seqlens)
        monkeypatch.delenv("TRANCHE_CHECK", raising=False)


@pytest.mark.parametrize("wrong", [-1, -(2**31), 11, 2**20, 2**31 - 1])
def test_a_length_outside_the_cache_breaks_its_own_sequence_alone(backend, monkeypatch, wrong):
    device = backend.device
    caches = [make_cache((3, 10, 2, 8), torch.float32).to(device)]
    want, want_seqlens = [copy_of(cache) for cache in caches], lengths(4, 4, 4, device=device)
    accepted = accept([[0, 2, 5]] * 3, 6, device)
    reference.compact_cache_(want, accepted, want_seqlens)
    seqlens = lengths(4, wrong, 4, device=device)
    if backend.name != "cpu":
        compact_cache_(caches, accepted, seqlens)
        assert seqlens[[0, 2]].tolist() == want_seqlens[[0, 2]].tolist()
        assert torch.equal(caches[0][[0, 2]], want[0][[0, 2]])
        seqlens = lengths(4, wrong, 4, device=device)
        monkeypatch.setenv("TRANCHE_CHECK", "1")
    with pytest.raises(IndexError, match=rf"cache_seqlens\[1\] in \[0, 10\], got {wrong}\."):
        compact_cache_(caches, accepted, seqlens)


def test_pages_that_do_not_exist(backend):
    device = backend.device
    caches = [make_cache((3, 4, 1, 8), torch.float32).to(device)]
    table = torch.tensor([[2, 99]], dtype=torch.int32, device=device)
    seqlens = lengths(2, device=device)
    accepted = accept([[0, 1, 3]], 4, device)
    if backend.name == "cpu":
        with pytest.raises(IndexError, match=r"block_table\[0, 1\] in \[0, 3\), got 99"):
            compact_cache_(caches, accepted, seqlens, block_table=table)
    else:
        before = copy_of(caches[0])
        compact_cache_(caches, accepted, seqlens, block_table=table)  # the last page stands in
        assert torch.equal(caches[0][:2], before[:2])
        assert seqlens.tolist() == [5]


def test_compact_bad_input_by_name(backend):
    device = backend.device
    accepted, seqlens = accept([[0, 2], [0]], 4, device), lengths(1, 1, device=device)
    cache = make_cache((2, 9, 2, 8), torch.float32).to(device)
    path, length, token = accepted.path, accepted.length, accepted.next_token
    nine = [torch.zeros(2, 9, 2, 8 * n, device=device) for n in range(1, 10)]
    wrong = [
        ([], accepted, "expected at least one cache, got none"),
        ([cache[0]], accepted, r"caches\[0\] of shape \[B, S, Hkv, D\], got \[9, 2, 8\]"),
        ([cache, cache[:, :8]], accepted, r"caches\[1\]\.size\(1\) == caches\[0\]\.size\(1\) \(9\), got 8"),
        ([cache.int()], accepted, r"caches\[0\] of dtype torch.float32 or .*got torch.int32"),
        ([cache.mT.contiguous().mT], accepted, r"expected caches\[0\]\.stride\(-1\) == 1"),
        ([cache[:1]], accepted, r"caches\[0\]\.size\(0\) == path\.size\(0\) \(2\), got 1"),
        ([cache], Accepted(path.long(), length, token), "path of dtype torch.int32, got torch.int64"),
        ([cache], Accepted(path, length[:1], token), r"length of shape \[B\] = \[2\], got \[1\]"),
        (nine, accepted, "at most 8 different strides"),
    ]
    for caches, bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            compact_cache_(caches, bad, seqlens)


# ---- together, and beside autograd ----------------------------------------


def test_tree_attention_module_is_write_then_attend(backend):
    device, nodes = backend.device, 6
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, nodes, 4, 32, generator=generator).to(device)
    k, v = (torch.randn(2, nodes, 2, 32, generator=generator).to(device) for _ in range(2))
    caches = [make_cache((2, 30, 2, 32), torch.float32, seed=i).to(device) for i in (1, 2)]
    tree, seqlens = make_tree(2, nodes, (6, 4), device), lengths(20, 5, device=device)
    sinks = torch.randn(4, generator=generator).to(device)
    module = TreeAttention(window=9, softcap=20.0, sinks=sinks)
    assert "window=9" in repr(module)
    assert list(module.state_dict()) == ["sinks"]
    expected = [copy_of(c) for c in caches]
    write_cache_(k, v, *expected, seqlens, tree)
    want = tree_attention(q, *expected, seqlens, tree, window=9, softcap=20.0, sinks=sinks)
    assert torch.equal(module(q, k, v, KVCache(*caches, seqlens), tree), want)
    assert_same_caches(caches, expected)


def inplace_calls(device):
    """(call, tensors it writes) for each in-place op."""
    states, caches, seqlens, tree, _ = write_case(device, torch.float32)
    accepted = accept([[0, 2], [0], [0, 3, 4]], 7, device)
    return [
        (lambda: write_cache_(*states, *caches, seqlens, tree), caches, [*states, *caches]),
        (lambda: compact_cache_(caches, accepted, seqlens), [*caches, seqlens], caches),
    ]


def test_writing_raises_the_version(backend):
    for call, written, _ in inplace_calls(backend.device):
        before = [t._version for t in written]
        call()
        assert [t._version for t in written] == [v + 1 for v in before]


def test_backward_through_an_overwritten_tensor_fails(backend):
    for call, written, _ in inplace_calls(backend.device):
        x = torch.ones_like(written[0], requires_grad=True)
        loss = (x * written[0]).sum()
        call()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_tensors_that_require_grad_are_refused(backend):
    for call, _, floats in inplace_calls(backend.device):
        for tensor in floats:
            tensor.requires_grad_()
            with pytest.raises(
                RuntimeError, match=r"tree_\w+_cache_: expected tensors that do not require grad"
            ):
                call()
            with torch.no_grad():
                call()
            tensor.requires_grad_(False)


def test_inference_mode(backend):
    with torch.inference_mode():
        for call, _, _ in inplace_calls(backend.device):
            call()
    for call, written, _ in inplace_calls(backend.device):
        before = written[0]._version
        with torch.inference_mode():
            call()
        assert written[0]._version == before + 1


def test_every_op_that_writes_is_registered_as_such():
    written = [op for op in op_table() if getattr(torch.ops.tranche, op).default._schema.is_mutable]
    assert {"tree_write_cache_", "tree_compact_cache_"} <= set(written)
    for namespace in _library.NAMESPACES:
        for op in written:
            for key in ("ADInplaceOrView", "Autograd"):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op}", key), (op, key)


def test_opcheck(backend):
    states, caches, seqlens, tree, _ = write_case(backend.device, torch.float32)
    rope = tables(40, 32, torch.float32, backend.device)
    ops = backend.ops()
    arguments = (*states, *caches, seqlens, tree.depth, tree.n_nodes, None, *rope)
    torch.library.opcheck(ops.tree_write_cache_.default, arguments)
    accepted = accept([[0, 2], [0], [0, 3, 4]], 7, backend.device)
    torch.library.opcheck(ops.tree_compact_cache_.default, (caches, accepted.path, accepted.length, seqlens))


def test_a_step_compiles_in_one_graph(backend):
    def step(q, k, v, keys, values, seqlens, tree, accepted):
        write_cache_(k, v, keys, values, seqlens, tree)
        out = tree_attention(q, keys, values, seqlens, tree)
        compact_cache_([keys, values], accepted, seqlens)
        return out

    states, caches, seqlens, tree, _ = write_case(backend.device, torch.float32)
    accepted = accept([[0, 2], [], [0, 1, 2]], 7, backend.device)
    other, other_seqlens = [copy_of(c) for c in caches], seqlens.clone()
    want = step(states[0], *states, *caches, seqlens, tree, accepted)
    with torch.no_grad():
        got = torch.compile(step, fullgraph=True)(states[0], *states, *other, other_seqlens, tree, accepted)
    assert torch.equal(got, want)
    assert torch.equal(other_seqlens, seqlens)
    assert_same_caches(other, caches)
