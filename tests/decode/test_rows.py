"""Where equality comes from: a row of the exact configuration has the same bits alone and among others."""

from __future__ import annotations

import pytest
import torch

from tests.decode.cases import exact_model, tiny_model
from tests.tree.cases import random_parents
from tranche.decode import target
from tranche.tree import Tree
from tranche.tree.transformers import TreeCache


def path_to(parents: list[int], node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_every_node_has_the_bits_of_its_path_decoded_token_by_token(dtype, activation_bits):
    model = exact_model(dtype=dtype, activation_bits=activation_bits, hidden_size=96, num_attention_heads=3)
    prompt, nodes = torch.randint(64, (1, 19)), 24
    parents = random_parents(1, nodes, "random")
    tokens = torch.randint(64, (1, nodes))
    with torch.no_grad(), target.attached(model, exact=True, capacity=64):

        def passed(cache: TreeCache, given: torch.Tensor, tree: Tree) -> torch.Tensor:
            hidden = target.forward(model, cache, given, tree, exact=True)
            return target.logits_of(model, hidden)

        cache = TreeCache(model, 1, 64)
        passed(cache, prompt, Tree.chain(19))
        cache.seqlens += 19
        logits = passed(cache, tokens, Tree.from_parent(parents))
        for node in range(nodes):
            alone = TreeCache(model, 1, 64)
            text = torch.cat([prompt, tokens[:, path_to(parents[0].tolist(), node)]], 1)
            for i in range(text.size(1)):
                last = passed(alone, text[:, i : i + 1], Tree.chain(1))
                alone.seqlens += 1
            assert torch.equal(last[0, 0], logits[0, node]), node


def test_obstacles_are_named():
    assert target.obstacles(exact_model()) == []
    found = target.obstacles(tiny_model())
    assert "lm_head (Linear)" in found and "model.layers.0.self_attn.q_proj (Linear)" in found
    assert any("mlp (activation" in name for name in target.obstacles(exact_model(hidden_act="gelu")))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "model.rotary_emb (LlamaRotaryEmbedding)" in target.obstacles(exact_model(rope_parameters=dynamic))
