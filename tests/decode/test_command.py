"""`python -m tranche.decode` on a tiny model."""

from __future__ import annotations

import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.decode.cases import tiny_model
from tranche import byte_llama
from tranche.decode import __main__ as command


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tranche.decode", *arguments])
    command.main()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    words = {f"w{i}": i for i in range(63)} | {"?": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    tiny_model().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("drafter", ["none", "ngram", "bitswitch"])
def test_generate(monkeypatch, capsys, saved, drafter):
    arguments = ["--model", saved, "--prompt", "w1 w2 w3", "--drafter", drafter, "--max-new-tokens", "12"]
    run(monkeypatch, "generate", *arguments, "--dtype", "float32", "--bits", "8", "--compare")
    told = " ".join(capsys.readouterr().out.split())
    assert f"{drafter}: 12 tokens in" in told
    assert "equality with plain decoding: exact" in told
    assert "0 tokens differ" in told


def test_demo(monkeypatch, capsys):
    tiny = byte_llama.build(byte_llama.Recipe(hidden_size=64, intermediate_size=96, layers=2, heads=2)).eval()
    monkeypatch.setattr(byte_llama, "load_or_train", lambda: tiny)
    run(monkeypatch, "demo", "--prompts", "2", "--length", "20", "--new-tokens", "10")
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [line[1].strip() for line in lines] == ["plain", "ngram", "recycling", "layerskip", "bitswitch"]
    assert all(line[-2].strip() == "0" for line in lines)  # mismatches
