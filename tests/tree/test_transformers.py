"""A real Llama on real text evaluates a draft tree in one pass, as if each path were decoded alone."""

from __future__ import annotations

import ast

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tree.cases import random_parents
from tranche.tree import Accepted, Tree
from tranche.tree.transformers import TreeCache, evaluate, prefill


@pytest.fixture(scope="module")
def source() -> torch.Tensor:
    """A file of the Python standard library, as bytes."""
    with open(ast.__file__, "rb") as file:
        return torch.tensor(list(file.read()), dtype=torch.int64)


def make_model(attention: str, dtype: torch.dtype = torch.float32, **config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "initializer_range": 0.1,
    }  # fmt: skip
    return LlamaForCausalLM._from_config(
        LlamaConfig(**settings | config), attn_implementation=attention, dtype=dtype
    ).eval()


def path_to(parents: list[int], node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


@pytest.mark.parametrize("kind", ["random", "binary", "chain"])
@torch.inference_mode()
def test_every_node_equals_its_path_decoded_alone(backend, source, kind):
    lengths, nodes = backend.pick(((300, 41), 24), ((40, 11), 8))
    model = make_model("tranche_tree").to(backend.device)
    plain = make_model("sdpa").to(backend.device)
    prompts = torch.stack([source[100:][: lengths[0]], source[4000:][: lengths[0]]]).to(backend.device)
    prompt_lengths = torch.tensor(lengths, dtype=torch.int32, device=backend.device)
    cache = TreeCache(model, batch=2, capacity=lengths[0] + nodes)
    first = prefill(model, cache, prompts, prompt_lengths)

    parents = random_parents(2, nodes, kind)
    counts = torch.tensor([nodes, nodes - 3], dtype=torch.int32)
    tokens = torch.stack([source[9000:][:nodes], source[500:][:nodes]]).to(backend.device)
    tree = Tree.from_parent(parents.to(backend.device), counts.to(backend.device))
    logits = evaluate(model, cache, tokens, tree)

    for b in range(2):
        prompt = prompts[b, : lengths[b]]
        torch.testing.assert_close(first[b], plain(prompt[None]).logits[0, -1], rtol=1e-4, atol=1e-4)
        for node in range(int(counts[b])):
            text = torch.cat([prompt, tokens[b, path_to(parents[b].tolist(), node)]])
            want = plain(text[None]).logits[0, -1]
            torch.testing.assert_close(logits[b, node], want, rtol=1e-4, atol=1e-4)
            assert logits[b, node].argmax() == want.argmax()


@torch.inference_mode()
def test_a_prompt_longer_than_a_chunk(source):
    model, plain = make_model("tranche_tree"), make_model("sdpa")
    prompt = source[None, :2500]
    cache = TreeCache(model, batch=1, capacity=2600)
    last = prefill(model, cache, prompt)
    torch.testing.assert_close(last, plain(prompt).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert cache.seqlens.tolist() == [2500]


@torch.inference_mode()
def test_a_full_cache_says_so(source):
    model = make_model("tranche_tree")
    cache = TreeCache(model, batch=1, capacity=20)
    with pytest.raises(IndexError, match=r"cache_seqlens\[0\] \+ n_nodes\[0\] <= 20, got 25\. Allocate"):
        prefill(model, cache, source[None, :25])


@torch.inference_mode()
def test_a_model_called_without_a_tree(source):
    model = make_model("tranche_tree")
    with pytest.raises(ValueError, match="expected the model's keyword arguments tree and cache_seqlens"):
        model(source[None, :4])


@torch.inference_mode()
def test_a_committed_path_is_as_if_it_had_been_the_prompt(backend, source):
    """`TreeCache.commit_`, of paths of different lengths: what follows is what follows the same text as a prompt."""
    length, nodes = backend.pick((60, 12), (20, 6))
    model = make_model("tranche_tree").to(backend.device)
    prompts = torch.stack([source[100:][:length], source[4000:][:length]]).to(backend.device)
    cache = TreeCache(model, batch=2, capacity=length + 2 * nodes)
    prefill(model, cache, prompts)
    tokens = torch.stack([source[9000:][:nodes], source[500:][:nodes]]).to(backend.device)
    tree = Tree.from_parent(random_parents(2, nodes, "deep").to(backend.device))
    evaluate(model, cache, tokens, tree)
    paths = [path_to(tree.parent[0].tolist(), nodes - 1), [0]]  # the deepest numbering, and the root alone
    path = torch.full((2, nodes), -1, dtype=torch.int32, device=backend.device)
    for b, row in enumerate(paths):
        path[b, : len(row)] = torch.tensor(row, dtype=torch.int32)
    lengths = torch.tensor([len(row) - 1 for row in paths], dtype=torch.int32, device=backend.device)
    cache.commit_(Accepted(path, lengths, torch.zeros(2, dtype=torch.int64, device=backend.device)))
    assert cache.seqlens.tolist() == [length + len(row) for row in paths]

    follow = torch.tensor([[65], [66]], device=backend.device)
    got = evaluate(model, cache, follow, Tree.chain(1, 2, backend.device))[:, 0]
    for b, row in enumerate(paths):
        text = torch.cat([prompts[b], tokens[b, row], follow[b]])[None]
        fresh = TreeCache(model, batch=1, capacity=text.size(1))
        torch.testing.assert_close(got[b], prefill(model, fresh, text)[0], rtol=1e-4, atol=1e-4)
