"""The shared text and the small model that demos and end-to-end tests stand on."""

from __future__ import annotations

import pytest
import torch

from tranche import byte_llama, corpus

TINY = byte_llama.Recipe(
    hidden_size=32, intermediate_size=64, layers=1, heads=2, kv_heads=1, steps=30, batch=4, length=64
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("models")
    return home, byte_llama.load_or_train(TINY, cache_dir=home, progress=False)


def test_the_two_texts_share_no_file():
    files = [
        set(bytes(corpus.standard_library(split).tolist()).split(b"\0")) for split in ("train", "held_out")
    ]
    common = {file for file in files[0] & files[1] if len(file) > 200}
    assert not common
    assert sum(len(file) for file in files[1]) > 100_000


def test_training_lowers_the_loss(trained):
    text = corpus.standard_library("held_out")[:20_000]
    before = byte_llama.bits_per_byte(byte_llama.build(TINY).eval(), text, length=64)
    after = byte_llama.bits_per_byte(trained[1], text, length=64)
    assert before > 7.5
    assert after < before - 1


def test_a_second_call_reads_the_cache(trained):
    home, model = trained
    paths = list(home.iterdir())
    again = byte_llama.load_or_train(TINY, cache_dir=home, progress=False)
    assert list(home.iterdir()) == paths
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_another_recipe_is_another_model(trained):
    home, _ = trained
    byte_llama.load_or_train(
        byte_llama.Recipe(**{**TINY.__dict__, "steps": 2}), cache_dir=home, progress=False
    )
    assert len(list(home.iterdir())) == 2


def test_a_diverging_run_is_reported(tmp_path):
    recipe = byte_llama.Recipe(**{**TINY.__dict__, "learning_rate": 1e30})
    with pytest.raises(FloatingPointError, match="learning rate"):
        byte_llama.load_or_train(recipe, cache_dir=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_unknown_split():
    with pytest.raises(ValueError, match="expected split"):
        corpus.standard_library("test")


def test_too_short_a_text():
    with pytest.raises(ValueError, match="longer text"):
        byte_llama.bits_per_byte(torch.nn.Identity(), torch.zeros(10, dtype=torch.uint8))
