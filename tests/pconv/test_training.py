"""Networks learn through the kernels' gradients, on real images."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch

from benchmarks.split_cat import split_cat
from tranche.pconv import DPConv, demo, fold, order_loss, resource_at


def gates_of(model):
    return [module for module in model.modules() if isinstance(module, DPConv)]


@pytest.fixture(autouse=True)
def _one_thread():
    """Layers as small as these only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_digits():
    digits, run = demo.load_digits("cpu", 0), demo.Run("test")
    model = demo.partialnet_tiny()
    demo.fit(model, digits, 25, run, lambda run: None)
    assert run.accuracy >= 0.98
    images = digits.test[0]
    with torch.no_grad():
        want = model.eval()(images)
        torch.testing.assert_close(fold(model)(images), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(split_cat(model)(images), want, rtol=1e-5, atol=1e-5)


def test_search():
    """A resource too large shrinks, and the gates come into order."""
    digits, run = demo.load_digits("cpu", 0), demo.Run("test")
    search = demo.partialnet_tiny(search=True)
    target = resource_at(search, 4)
    with torch.no_grad():
        for module in gates_of(search):
            module.gate.fill_(0.02)
    demo.fit(search, digits, 4, run, lambda run: None, target=target)
    found = sum(float(module.resource().detach()) for module in gates_of(search))
    assert found < resource_at(search, 1) / 2
    assert float(order_loss(search).detach()) == 0 and run.accuracy > 0.8


def test_the_demonstration(monkeypatch, tmp_path, capsys):
    picture = tmp_path / "demo" / "digits.png"
    monkeypatch.setattr(sys, "argv", ["tranche.pconv", "train-demo", "--epochs", "1", "--plot", str(picture)])
    runpy.run_module("tranche.pconv", run_name="__main__")
    said = capsys.readouterr().out
    assert "PartialNet-tiny" in said and "n_div of each block" in said and "Folded for inference" in said
    assert picture.stat().st_size > 10_000
