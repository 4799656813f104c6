"""The worked example of docs/tree-growing.md runs, and gives the text that decoding token by token gives."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tranche.tree import Tree, sample

PAGE = Path(__file__).parents[2] / "docs" / "tree-growing.md"


def test_the_worked_example(backend):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    with torch.device(backend.device):
        exec(compile(example, str(PAGE), "exec"), names)

    accepted, committed, node_tokens = names["accepted"], names["committed"], names["node_tokens"]
    assert accepted.length.sum() > 0, "an example in which no draft token is accepted shows little"
    assert torch.equal(names["cache_seqlens"], committed + accepted.length + 1)
    for b in range(names["batch"]):
        path = accepted.path[b, : int(accepted.length[b]) + 1].long()
        kept = node_tokens[b, path]
        end = int(names["cache_seqlens"][b])
        for cache, weight in ((names["k_cache"], names["w_k"]), (names["v_cache"], names["w_v"])):
            rows = (names["embedding"][kept] @ weight).unflatten(-1, cache.shape[-2:])
            torch.testing.assert_close(cache[b, int(committed[b]) : end], rows)

    # one token at a time, from the same committed caches
    plain = [[] for _ in range(names["batch"])]
    names["cache_seqlens"] = committed.clone()
    tokens = node_tokens[:, :1]
    for step in range(int(accepted.length.max()) + 1):
        logits = names["target"](tokens, Tree.chain(1, names["batch"], backend.device))[:, 0]
        position = committed.long() + 1 + step
        drawn = sample(logits, temperature=0.8, seed=1, position=position)
        for b, token in enumerate(drawn.tolist()):
            plain[b].append(token)
        names["cache_seqlens"] += 1
        tokens = drawn[:, None]
    for b in range(names["batch"]):
        length = int(accepted.length[b])
        text = node_tokens[b, accepted.path[b, 1 : length + 1].long()].tolist()
        assert [*text, int(accepted.next_token[b])] == plain[b][: length + 1]
