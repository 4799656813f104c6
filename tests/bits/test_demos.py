"""The demos, small: that they run, and that what they compare is what they say."""

from __future__ import annotations

import math

import pytest
import torch

from tranche import bits, byte_llama
from tranche.bits import lm_demo, reference, train_demo

pytest.importorskip("sklearn")
pytest.importorskip("transformers")


def test_training_demo(tmp_path):
    settings = train_demo.Settings(seeds=1, float_epochs=1, epochs=1, batch=400)
    findings = train_demo.run(settings, methods=("joint",), progress=False)
    assert set(findings.table) == {"fp32", "joint"} and len(findings.table["joint"][2]) == 1
    assert all(0 <= value[0] <= 100 for value in findings.table["joint"].values())
    assert sum(findings.allocations[0].values()) <= 3 * len(train_demo.BLOCKS)
    train_demo.plot(findings, tmp_path / "sub" / "picture.png")
    assert (tmp_path / "sub" / "picture.png").stat().st_size > 1000


def test_language_demo():
    recipe = byte_llama.Recipe(hidden_size=64, intermediate_size=96, layers=1, heads=2, kv_heads=1)
    model = byte_llama.build(recipe).eval()
    text = torch.randint(256, (400,), dtype=torch.uint8)
    findings = lm_demo.run(model, text, windows=2, length=32, progress=False)
    assert findings.fp32 == pytest.approx(8, abs=0.5)  # it knows nothing
    for method, by_bits in findings.table.items():
        assert all(math.isfinite(value) for value in by_bits.values()), method
    assert findings.table["weight-only"][8] == pytest.approx(findings.fp32, rel=1e-2)


def test_roundings():
    weight = torch.randn(6, 64)
    codes, scale = bits.quantize(weight)
    for width in (2, 4, 8):
        rounded = reference.round_bits(codes, width) * 2 ** (8 - width) * scale[:, None]
        errors = {
            name: float((f(weight, width) - weight).square().mean()) for name, f in lm_demo.ROUNDINGS.items()
        }
        errors["double"] = float((rounded - weight).square().mean())
        assert errors["double"] <= errors["truncation"]
    assert torch.equal(lm_demo.truncated(weight, 8), codes * scale[:, None])
