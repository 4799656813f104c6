"""The demo's head and picture: trained once, cached, resumed; and what the statistics say of accepted lengths."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.decode.cases import exact_model, ragged_prompts
from tranche import byte_llama
from tranche.decode import HeadRecipe, NgramDrafter, generate
from tranche.decode.demo_head import load_or_train_head
from tranche.decode.demo_plot import plot_accepted_lengths

TINY = byte_llama.Recipe(hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1)
RECIPE = HeadRecipe(steps=2, batch=2, length=16)


def test_the_demos_head_is_trained_once(tmp_path):
    model = byte_llama.build(TINY).eval()
    head = load_or_train_head(model, RECIPE, cache_dir=tmp_path, progress=False)
    kept = list(tmp_path.iterdir())
    assert len(kept) == 1 and kept[0].name.startswith("jakiro-head-")  # nothing half-done is left
    written = kept[0].stat().st_mtime_ns
    again = load_or_train_head(model, RECIPE, cache_dir=tmp_path, progress=False)
    assert kept[0].stat().st_mtime_ns == written
    assert torch.equal(head.fc.weight, again.fc.weight)
    load_or_train_head(model, dataclasses.replace(RECIPE, seed=1), cache_dir=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 2


def test_accepted_lengths_add_up():
    tokens, mask = ragged_prompts(3)
    settings = {"attention_mask": mask, "max_new_tokens": 40, "eos_token_id": None, "exact": True}
    told = generate(exact_model(), NgramDrafter(), tokens, **settings).statistics
    passes = sum(told.accepted_lengths)
    # a pass over a text's end may accept more than there is room for
    made = sum((i + 1) * n for i, n in enumerate(told.accepted_lengths))
    assert made >= told.new_tokens - 3
    assert (told.new_tokens - 3) / passes == pytest.approx(told.tokens_per_pass)


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = plot_accepted_lengths(
        {"one": (5, 3, 1), "none": (), "two": (0, 0, 0, 2)}, tmp_path / "new" / "a.png"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
