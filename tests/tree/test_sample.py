"""sample: the distribution, its order, its random numbers, and what it does with odd numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tranche.tree import reference, sample

CUTS = [(0, 1.0), (5, 1.0), (0, 0.8), (7, 0.6), (3, 0.999), (1, 0.5), (0, 0.0), (10_000, 0.3)]


def as_float32(value: float) -> float:
    return torch.tensor(value).item()


def check_against_the_reference(logits, seed, position, temperature, top_k, top_p):
    got = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, position=position)
    assert got.dtype == torch.int64
    assert got.shape == logits.shape[:1]
    cpu = logits.cpu()
    want = reference.sample(
        cpu, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, position=position
    )
    for b in (got.cpu() != want).nonzero().flatten().tolist():
        p = reference.probabilities(cpu[b], as_float32(temperature), top_k, as_float32(top_p))
        assert reference.is_near_a_step(p, reference.uniform(seed + b, position)), b


def test_philox_gives_the_published_numbers():
    ones = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5e169c58dbc57ac4c9b00dbd8"),
        ((ones,) * 4, (ones,) * 2, "408f276d41c83b0ea20bc7c66d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe0994fdcceb5001e42024126ea1",
        ),
    ]
    for counter, key, words in known:
        assert "".join(f"{word:08x}" for word in reference.philox(counter, key)) == words


@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
@pytest.mark.parametrize("vocab", [1, 2, 17, 300, 2049])
def test_tokens_are_the_references(backend, vocab, top_k, top_p):
    if backend.name == "sim" and vocab > 17 and (top_k, top_p) not in CUTS[:4]:
        vocab = 40  # slow there
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(4, vocab, generator=generator)).to(backend.device)
    for temperature in (0.7, 1.5):
        check_against_the_reference(logits, 11, 100, temperature, top_k, top_p)


def test_a_real_vocabulary(backend):
    logits = 4 * torch.randn(backend.pick(2, 1), backend.pick(128256, 4500), device=backend.device)
    for top_k, top_p in backend.pick(((0, 1.0), (50, 1.0), (0, 0.9), (40, 0.95)), ((40, 0.95),)):
        check_against_the_reference(logits, 3, 7, 0.8, top_k, top_p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_many_ties(backend, dtype):
    logits = torch.randn(3, 400).to(dtype).to(backend.device)
    assert logits[0].unique().numel() < 400
    for top_k, top_p in backend.pick(CUTS, CUTS[2:4]):
        check_against_the_reference(logits, 5, 9, 1.0, top_k, top_p)


@given(
    st.integers(1, 60),
    st.integers(0, 70),
    st.floats(0, 1, width=32, allow_subnormal=False),
    st.floats(0.0625, 4, width=32, allow_subnormal=False),
    st.integers(-(2**63), 2**63 - 4),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
)
def test_property(vocab, top_k, top_p, temperature, seed, position, ties):
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    check_against_the_reference(logits.round() if ties else logits, seed, position, temperature, top_k, top_p)


def histogram(tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    return torch.bincount(tokens.cpu(), minlength=vocab)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.8), (5, 0.7)])
def test_many_seeds_follow_the_distribution(backend, top_k, top_p):
    draws = backend.pick(100_000, 40)
    row = torch.tensor([0.3, -1.0, 2.0, 1.9, 0.0, -0.5, 1.2])
    p = reference.probabilities(row, as_float32(0.9), top_k, as_float32(top_p))
    logits = row.to(backend.device).expand(draws, 7)
    counts = histogram(sample(logits, temperature=0.9, top_k=top_k, top_p=top_p, seed=77, position=3), 7)
    assert (counts[p == 0] == 0).all()
    kept = p > 0
    assert stats.chisquare(counts[kept], draws * p[kept].numpy()).pvalue > 1e-3


def test_positions_and_seeds_are_independent_streams():
    logits = torch.zeros(40_000, 4)
    position = torch.arange(40_000)
    one = sample(logits, temperature=1.0, seed=torch.zeros(40_000, dtype=torch.int64), position=position)
    other = sample(logits, temperature=1.0, seed=torch.ones(40_000, dtype=torch.int64), position=position)
    pairs = torch.bincount(one * 4 + other, minlength=16)
    following = torch.bincount(one[:-1] * 4 + one[1:], minlength=16)
    assert stats.chisquare(pairs).pvalue > 1e-3
    assert stats.chisquare(following).pvalue > 1e-3


def test_rows_with_equal_prompts_and_different_seeds_differ(backend):
    rows = backend.pick(64, 16)
    logits = torch.zeros(rows, 50, device=backend.device)
    number = sample(logits, temperature=1.0, seed=5, position=1)
    assert number.unique().numel() > rows // 3
    seeds = torch.arange(5, 5 + rows, device=backend.device)
    assert torch.equal(sample(logits, temperature=1.0, seed=seeds, position=1), number)
    same = sample(logits, temperature=1.0, seed=torch.full_like(seeds, 5), position=1)
    assert same.unique().numel() == 1


def test_numbers_and_tensors_mean_the_same(backend):
    logits = torch.randn(4, 60, device=backend.device)
    numbers = {"temperature": 0.75, "top_k": 9, "top_p": 0.5, "seed": 8, "position": 4}
    dtypes = {
        "temperature": torch.float32,
        "top_k": torch.int32,
        "top_p": torch.float32,
        "position": torch.int64,
    }
    tensors = {
        name: torch.full((4,), numbers[name], dtype=d, device=backend.device) for name, d in dtypes.items()
    }
    tensors["seed"] = torch.arange(8, 12, device=backend.device)
    assert torch.equal(sample(logits, **numbers), sample(logits, **tensors))


def test_every_row_has_its_own_numbers(backend):
    logits = torch.randn(1, 90).expand(5, 90).to(backend.device)
    options = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0, 1.0]),
        "top_k": torch.tensor([0, 0, 5, 0, 3], dtype=torch.int32),
        "top_p": torch.tensor([1.0, 0.5, 1.0, 0.9, 0.7]),
        "seed": torch.tensor([1, 2, 3, -4, 2**62]),
        "position": torch.tensor([9, 2**40, 0, 5, 5]),
    }
    want = reference.sample(logits.cpu(), **options)
    on_device = {name: value.to(backend.device) for name, value in options.items()}
    assert torch.equal(sample(logits, **on_device).cpu(), want)


def test_dyadic_probabilities_are_exact(backend):
    """p = 1/2, 1/4, 1/8, 1/8: every draw is the reference's, with no exception near steps."""
    logits = torch.log2(torch.tensor([0.25, 0.125, 0.5, 0.125])) * torch.log(torch.tensor(2.0))
    count = backend.pick(20_000, 32)
    rows = logits.to(backend.device).expand(count, 4)
    got = sample(rows, temperature=1.0, seed=0, position=0).cpu()
    u = torch.tensor([reference.uniform(b, 0) for b in range(count)], dtype=torch.float64)
    steps = torch.tensor([0.25, 0.375, 0.875], dtype=torch.float64)
    assert torch.equal(got, torch.searchsorted(steps, u, right=True))


def test_top_p_keeps_tokens_while_the_sum_before_them_is_below_it(backend):
    logits = (
        torch.log(torch.tensor([0.125, 0.5, 0.25, 0.125])).to(backend.device).expand(backend.pick(400, 32), 4)
    )
    # before the four in order: 0, 1/2, 3/4, 7/8
    for top_p, kept in (
        (0.5, {1}),
        (0.5001, {1, 2}),
        (0.75, {1, 2}),
        (0.7501, {0, 1, 2}),
        (0.876, {0, 1, 2, 3}),
    ):
        tokens = sample(logits, temperature=1.0, top_p=top_p, seed=0, position=0)
        assert set(tokens.tolist()) == kept, top_p


def test_top_p_counts_what_top_k_left(backend):
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1])).to(backend.device).expand(backend.pick(300, 32), 4)
    # renormalised to the first two: 4/7, 3/7; alone, 0.5 would keep two
    options = {"temperature": 1.0, "seed": 0, "position": 0}
    assert set(sample(logits, top_k=2, top_p=0.5, **options).tolist()) == {0}
    assert set(sample(logits, top_p=0.5, **options).tolist()) == {0, 1}
    assert set(sample(logits, top_k=2, top_p=0.6, **options).tolist()) == {0, 1}


def test_ties_at_the_cut_go_to_lower_ids(backend):
    logits = (
        torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 1.0, -0.0, 0.0])
        .to(backend.device)
        .expand(backend.pick(200, 32), 8)
    )
    options = {"temperature": 1.0, "seed": 0, "position": 0}
    assert set(sample(logits, top_k=1, **options).tolist()) == {1}
    assert set(sample(logits, top_k=4, **options).tolist()) == {0, 1, 2, 3}
    assert set(sample(logits, top_k=7, **options).tolist()) == set(range(7))
    equal = torch.zeros(backend.pick(300, 32), 8, device=backend.device)
    assert set(sample(equal, top_p=0.5, **options).tolist()) == {0, 1, 2, 3}
    assert set(sample(equal, top_k=6, top_p=0.5, **options).tolist()) == {0, 1, 2}


def test_temperature_0_is_argmax_and_so_is_top_k_1(backend):
    logits = torch.randn(backend.pick(6, 2), backend.pick(3000, 2100)).round(decimals=1).to(backend.device)
    want = logits.cpu().numpy().argmax(axis=1).tolist()
    assert sample(logits, temperature=0.0, seed=0, position=0).tolist() == want
    assert sample(logits, temperature=0.0, top_k=3, top_p=0.1, seed=0, position=0).tolist() == want
    assert sample(logits, temperature=1.0, top_k=1, seed=0, position=0).tolist() == want
    assert sample(logits, temperature=1.0, top_p=0.0, seed=0, position=0).tolist() == want


@pytest.mark.parametrize("temperature", [1e-40, 1e-3, 1e30])
def test_extreme_temperatures(backend, temperature):
    logits = torch.tensor([[0.0, 3.0, -torch.inf, 1.0]], device=backend.device).expand(
        backend.pick(200, 32), 4
    )
    tokens = set(sample(logits, temperature=temperature, seed=0, position=0).tolist())
    assert tokens == ({0, 1, 3} if temperature > 1 else {1})


def test_nan_is_minus_infinity(backend):
    nan, inf = torch.nan, torch.inf
    rows = torch.tensor(
        [[nan, 1.0, nan, 1.0], [-inf, nan, -inf, 0.0], [nan, inf, 0.0, inf]], device=backend.device
    )
    for options in ({}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 2, "top_p": 0.9}):
        for row, tokens in zip(rows, ({1, 3}, {3}, {1, 3}), strict=True):
            logits = row.expand(backend.pick(100, 32), 4)
            assert set(sample(logits, temperature=1.0, seed=0, position=0, **options).tolist()) == tokens
    greedy = sample(rows, temperature=0.0, seed=0, position=0)
    assert greedy.tolist() == [1, 3, 1]


def test_a_row_of_nothing_gives_token_0(backend):
    for value in (torch.nan, -torch.inf):
        logits = torch.full((3, 70), value, device=backend.device)
        for options in ({}, {"top_k": 3, "top_p": 0.5}):
            assert sample(logits, temperature=1.0, seed=0, position=0, **options).tolist() == [0, 0, 0]
        assert sample(logits, temperature=0.0, seed=0, position=0).tolist() == [0, 0, 0]


def test_a_zero_probability_is_never_drawn_at_r_0(backend):
    """`r <= p` accepts p = 0 at r = 0. Seeds are searched for the smallest u, and the first tokens have p = 0."""
    seed = min(range(20_000), key=lambda seed: reference.uniform(seed, 0))
    assert reference.uniform(seed, 0) < 1e-3
    logits = torch.full((1, 40), -torch.inf)
    logits[0, 20:] = 0
    seeds = torch.tensor([seed], device=backend.device)
    for options in ({}, {"top_k": 4}, {"top_p": 0.3}):
        token = sample(logits.to(backend.device), temperature=1.0, seed=seeds, position=0, **options)
        assert token.item() == 20


def test_rows_do_not_depend_on_their_neighbours(backend):
    logits = torch.randn(7, backend.pick(2500, 70), device=backend.device) * 2
    seeds = torch.arange(7, device=backend.device)
    for options in ({"top_k": 30, "top_p": 0.9}, {}):
        together = sample(logits, temperature=0.9, seed=seeds, position=5, **options)
        for b in backend.pick(range(7), (0, 6)):
            alone = sample(logits[b : b + 1], temperature=0.9, seed=seeds[b : b + 1], position=5, **options)
            assert alone.item() == together[b].item()


def test_strides(backend):
    wide = torch.randn(3, 4, 101, device=backend.device)
    view = wide[:, 2, 1:]
    assert not view.is_contiguous()
    options = {"temperature": 1.0, "top_k": 9, "seed": 4, "position": 1}
    assert torch.equal(sample(view, **options), sample(view.contiguous(), **options))


def test_cpu_and_cuda_kernels_draw_the_same_tokens(backend):
    """Weights are integers made of the same float operations, so nothing is near enough to a step to differ."""
    rows = backend.pick(2000, 16)
    numbers = (
        torch.full((rows,), 0.8),
        torch.full((rows,), 60, dtype=torch.int32),
        torch.full((rows,), 0.95),
        torch.arange(rows),
        torch.arange(rows) * 3,
    )
    arguments = (torch.randn(rows, 500) * 3, *numbers)
    got = backend.ops().tree_sample(*(t.to(backend.device) for t in arguments))
    assert torch.equal(got.cpu(), torch.ops.tranche.tree_sample(*arguments))


def test_empty_batch(backend):
    assert sample(torch.zeros(0, 5, device=backend.device), temperature=1.0, seed=0, position=0).shape == (0,)


def test_bad_input_by_name(backend):
    logits = torch.zeros(2, 5, device=backend.device)
    good = {"temperature": 1.0, "seed": 0, "position": 0}
    wrong = [
        (
            logits.double(),
            {},
            "logits of dtype torch.float32 or torch.float16 or torch.bfloat16, got torch.float64",
        ),
        (logits[0], {}, r"logits of shape \[B, V\], got \[5\]"),
        (logits.T.contiguous().T, {}, r"logits\.stride\(-1\) == 1"),
        (logits[:, :0], {}, r"logits\.size\(-1\) in \[1, 16777216\], got 0"),
        (
            logits,
            {"temperature": torch.ones(2, device=backend.device).double()},
            "temperature of dtype torch.float32, got torch.float64",
        ),
        (
            logits,
            {"top_k": torch.ones(2, device=backend.device)},
            "top_k of dtype torch.int32, got torch.float32",
        ),
        (
            logits,
            {"seed": torch.ones(3, device=backend.device).long()},
            r"seed of shape \[B\] = \[2\], got \[3\]",
        ),
        (
            logits,
            {"position": torch.ones(2, device=backend.device).int()},
            "position of dtype torch.int64, got torch.int32",
        ),
    ]
    for rows, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            sample(rows, **{**good, **options})


def test_numbers_out_of_range(backend, monkeypatch):
    logits = torch.tensor([[0.0, 2.0, 1.0]], device=backend.device).expand(backend.pick(200, 32), 3)
    good = {"temperature": 1.0, "seed": 0, "position": 0}
    wrong = [
        ({"temperature": -1.0}, r"temperature\[0\] finite and >= 0, got -1", {1}),
        ({"temperature": float("nan")}, r"temperature\[0\] finite and >= 0, got nan", {1}),
        ({"top_k": -3}, r"top_k\[0\] in \[0, \d+\], got -3", {0, 1, 2}),
        ({"top_p": 1.5}, r"top_p\[0\] in \[0, 1\], got 1\.5", {0, 1, 2}),
        ({"top_p": -0.5}, r"top_p\[0\] in \[0, 1\], got -0\.5", {1}),
        ({"top_p": float("nan")}, r"top_p\[0\] in \[0, 1\], got nan", {0, 1, 2}),
    ]
    for options, message, clamped in wrong:
        if backend.name != "cpu":
            assert set(sample(logits, **{**good, **options}).tolist()) == clamped
            monkeypatch.setenv("TRANCHE_CHECK", "1")
        with pytest.raises(IndexError, match=message):
            sample(logits, **{**good, **options})
        monkeypatch.delenv("TRANCHE_CHECK", raising=False)


def raw_arguments(device: str) -> tuple[torch.Tensor, ...]:
    numbers = (torch.tensor([0.7, 1.0]), torch.tensor([3, 0], dtype=torch.int32), torch.tensor([0.9, 1.0]))
    return tuple(
        t.to(device) for t in (torch.randn(2, 30), *numbers, torch.tensor([1, 2]), torch.tensor([5, 6]))
    )


def test_opcheck(backend):
    torch.library.opcheck(backend.ops().tree_sample.default, raw_arguments(backend.device))


def test_compiles_in_one_graph_without_recompiling_per_seed(backend):
    def step(logits, position, seed, temperature):
        return sample(logits, temperature=temperature, top_k=5, top_p=0.9, seed=seed, position=position)

    logits = torch.randn(2, 30, device=backend.device)
    position = torch.tensor([3, 4], device=backend.device)
    temperature = torch.tensor([0.5, 1.0], device=backend.device)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for seed in (1, 2, 3):
        assert torch.equal(
            compiled(logits, position, seed, temperature), step(logits, position, seed, temperature)
        )
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in (4, 5):
            assert torch.equal(
                compiled(logits, position, seed, temperature), step(logits, position, seed, temperature)
            )
