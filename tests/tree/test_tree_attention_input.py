"""Bad input to tree_attention: each its own clear error, and nothing read or written out of bounds."""

from __future__ import annotations

import pytest
import torch

from tests.tree.cases import assert_same_bits, make_case


def expect(case, message, error=ValueError, **options):
    with pytest.raises(error, match=message):
        case.run(**options)


@pytest.fixture
def case(backend):
    return make_case(40, nodes=4, lengths=(20, 3), spare_slots=0, device=backend.device)


def test_dtypes(backend, case):
    case.q = case.q.int()
    expect(
        case,
        r"tranche\.tree_attention: expected q of dtype torch.float32 or .*got torch.int32\. Convert it with",
    )
    case.q = case.q.to(torch.bfloat16)
    expect(case, "expected k_cache of dtype torch.bfloat16 or torch.float8_e4m3fn, got torch.float32")
    case.k = case.k.to(torch.bfloat16)
    expect(case, "expected v_cache of dtype torch.bfloat16, got torch.float32")
    if backend.name != "cpu":
        case.q, case.k, case.v = case.q.double(), case.k.double(), case.v.double()
        expect(
            case, "expected q of dtype torch.float32 or torch.float16 or torch.bfloat16, got torch.float64"
        )


def test_shapes(case):
    q, k, v = case.q, case.k, case.v
    case.q = q[0]
    expect(case, r"expected q of shape \[B, N, Hq, D\], got \[4, 4, 64\]")
    case.q = q[..., :40]
    expect(case, r"expected q\.size\(-1\) in \{32, 64, 80, 96, 128, 160, 192, 256\}, got 40\. Pad")
    case.q = q[..., :32]
    expect(case, r"expected k_cache\.size\(-1\) == q\.size\(-1\) \(32\), got 64")
    case.q, case.k = q, k[0]
    expect(case, r"expected k_cache of shape \[B, S, Hkv, D\], got")
    case.k, case.v = k, v[:, :-1]
    expect(case, r"expected v_cache\.size\(1\) == k_cache\.size\(1\) \(24\), got 23")
    case.k, case.v = k[:1], v[:1]
    expect(case, r"expected k_cache\.size\(0\) == q\.size\(0\) \(2\), got 1")
    case.k, case.v, case.q = k, v, q[:, :, :3]
    expect(case, r"expected q\.size\(2\) a multiple of k_cache\.size\(2\) \(2\), got 3")
    case.k, case.v, case.q = k[:, :, :0], v[:, :, :0], q
    expect(case, r"a multiple of k_cache\.size\(2\) \(0\)")


def test_index_tensors(case):
    case.seqlens = case.seqlens.long()
    expect(case, "expected cache_seqlens of dtype torch.int32, got torch.int64")
    case.seqlens = case.seqlens.int()[:1]
    expect(case, r"expected cache_seqlens of shape \[B\] = \[2\], got \[1\]")


def test_a_tree_of_another_size(case):
    case.q = case.q[:, :3]
    expect(case, r"expected ancestors of shape \[B, N, ceil\(N/64\)\] = \[2, 3, 1\], got \[2, 4, 1\]")


@pytest.mark.parametrize(("tree", "kind"), [(None, "NoneType"), (torch.zeros(2, 4), "Tensor")])
def test_no_tree(case, tree, kind):
    case.tree = tree
    message = rf"^tranche\.tree_attention: expected tree a tranche\.tree\.Tree, got {kind}\. Use Tree\.chain"
    expect(case, message, TypeError)


def test_strides(case):
    good_q, good_k = case.q, case.k
    case.q = good_q.transpose(2, 3).contiguous().transpose(2, 3)
    expect(case, r"expected q\.stride\(-1\) == 1, got 4\. Call q\.contiguous\(\)")
    case.q, case.k = good_q, good_k.transpose(2, 3).contiguous().transpose(2, 3)
    expect(case, r"expected k_cache\.stride\(-1\) == 1")


def test_numbers(case):
    expect(case, "expected window > 0, got 0", window=0)
    expect(case, "expected a finite softcap > 0, got -1", softcap=-1.0)
    expect(case, "expected a finite scale, got nan", scale=float("nan"))


def test_sinks_and_scales(case):
    ones = torch.ones(4, device=case.q.device)
    expect(case, r"expected sinks of shape \[Hq\] = \[4\], got \[3\]", sinks=ones[:3])
    expect(case, "expected sinks of dtype torch.float32, got torch.float64", sinks=ones.double())
    expect(case, "expected no k_scale for caches of dtype torch.float32", k_scale=ones[:2])
    case.k, case.v = case.k.to(torch.float8_e4m3fn), case.v.to(torch.float8_e4m3fn)
    expect(case, r"expected v_scale of shape \[Hkv\] = \[2\], got \[4\]", v_scale=ones)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_devices():
    case = make_case(40)
    case.k = case.k.cuda()
    expect(case, "expected k_cache on the device of q")


def test_lengths_past_the_cache(backend, case, monkeypatch):
    good = case.run()
    wrong = (
        (21, 0, r"cache_seqlens\[0\] \+ n_nodes\[0\] <= 24, got 25\. Allocate a longer cache"),
        (-1, 1, r"cache_seqlens\[1\] in \[0, 24\], got -1"),
    )
    for length, b, message in wrong:
        bad = make_case(40, nodes=4, lengths=(20, 3), spare_slots=0, poison=False, device=backend.device)
        bad.seqlens[b] = length
        if backend.name == "cpu":
            expect(bad, message, IndexError)
            continue
        clamped = make_case(40, nodes=4, lengths=(20, 3), spare_slots=0, poison=False, device=backend.device)
        clamped.seqlens[b] = min(max(length, 0), 20)
        assert_same_bits(bad.run(), clamped.run())
        monkeypatch.setenv("TRANCHE_CHECK", "1")
        expect(bad, message, IndexError)
        monkeypatch.delenv("TRANCHE_CHECK")
    assert_same_bits(case.run(), good)


def test_block_tables(backend):
    case = make_case(41, nodes=4, lengths=(20, 3), page_size=8, poison=False, device=backend.device)
    # a clamped page number may lead to any page, so none may hold NaN here
    case.k, case.v = case.k.nan_to_num(0), case.v.nan_to_num(0)
    table = case.options["block_table"]
    case.options["block_table"] = table.long()
    expect(case, "expected block_table of dtype torch.int32, got torch.int64")
    case.options["block_table"] = table[:1]
    expect(case, r"expected block_table\.size\(0\) == q\.size\(0\) \(2\), got 1")
    case.options["block_table"] = table[0]
    expect(case, r"expected block_table of shape \[B, max_pages\]")
    case.options["block_table"] = table[:, :2].contiguous()
    if backend.name == "cpu":
        expect(case, r"cache_seqlens\[0\] in \[0, 16\], got 20", IndexError)
    else:
        assert case.run().isfinite().all()
    bad = table.clone()
    bad[1, 0] = 10_000
    for cache in (case.k, case.v):  # clamped to the last page, which no sequence owns
        cache.nan_to_num_(0)
    case.options["block_table"] = bad
    if backend.name == "cpu":
        expect(case, r"block_table\[1, 0\] in \[0, \d+\), got 10000", IndexError)
    else:
        assert case.run().isfinite().all()


def test_unused_pages_are_never_looked_at(backend):
    case = make_case(42, nodes=4, lengths=(20, 3), page_size=8, device=backend.device)
    want = case.run()
    case.options["block_table"][1, 1:] = 2**31 - 1
    assert_same_bits(case.run(), want)
