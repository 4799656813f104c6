"""What the demo's head is worth on held-out sources. Trains the model and the head if they are not in the cache."""

from __future__ import annotations

import pytest

from tranche import byte_llama
from tranche.decode import JakiroDrafter, NgramDrafter, generate
from tranche.decode.demo import held_out_prompts
from tranche.decode.demo_head import load_or_train_head


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_head_on_held_out_sources_with_60_nodes():
    model = byte_llama.load_or_train(progress=False)
    head = load_or_train_head(model, progress=False)
    prompts = held_out_prompts(12, 256)

    def tokens_per_pass(drafter):
        drafter.chooses_size = True  # every tree has its 60 nodes, whatever they cost
        settings = {"max_new_tokens": 96, "eos_token_id": None, "tree_size": 60}
        statistics = generate(model, drafter, prompts, **settings).statistics
        assert statistics.drafter_error is None
        return statistics.tokens_per_pass

    ours = tokens_per_pass(JakiroDrafter(head))
    assert ours >= 3.0
    assert ours > tokens_per_pass(NgramDrafter())
    assert ours > tokens_per_pass(JakiroDrafter(head, contrast=False))
