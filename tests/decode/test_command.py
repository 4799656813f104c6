"""`python -m tranche.decode` on a tiny model."""

from __future__ import annotations

import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.decode.cases import tiny_model
from tranche import byte_llama
from tranche.decode import JakiroHead, demo
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


def test_a_head_is_trained_and_used(monkeypatch, capsys, saved, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "head"
    text.write_text(" ".join(f"w{i % 63}" for i in range(200)))
    training = ["--text", str(text), "--out", str(out), "--steps", "2", "--batch", "2", "--length", "16"]
    run(monkeypatch, "train-head", "--model", saved, *training, "--dtype", "float32")
    drafting = [
        "--drafter",
        "jakiro",
        "--head",
        str(out),
        "--max-new-tokens",
        "12",
        "--bits",
        "8",
        "--compare",
    ]
    run(monkeypatch, "generate", "--model", saved, "--prompt", "w1 w2 w3", "--dtype", "float32", *drafting)
    assert "0 tokens differ" in " ".join(capsys.readouterr().out.split())


def test_a_head_is_asked_for(monkeypatch, saved):
    with pytest.raises(SystemExit, match="train-head makes one"):
        run(monkeypatch, "generate", "--model", saved, "--prompt", "w1", "--drafter", "jakiro")


def test_demo(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    tiny = byte_llama.build(byte_llama.Recipe(hidden_size=64, intermediate_size=96, layers=2, heads=2)).eval()
    monkeypatch.setattr(byte_llama, "load_or_train", lambda: tiny)
    monkeypatch.setattr(demo, "load_or_train_head", JakiroHead.for_model)
    picture = tmp_path / "accepted.png"
    run(monkeypatch, "demo", "--prompts", "2", "--length", "20", "--new-tokens", "10", "--plot", str(picture))
    assert picture.exists()
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [line[1].strip() for line in lines] == [
        "plain",
        "ngram",
        "recycling",
        "layerskip",
        "bitswitch",
        "jakiro",
        "cascade",
    ]
    assert all(line[-2].strip() == "0" for line in lines)  # mismatches
