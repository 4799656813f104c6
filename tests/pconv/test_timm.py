"""Registration with timm: where timm is, its registry; else a stand-in with the same calls."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

from tranche.pconv import PartialNet

NAMES = [f"partialnet_{size}" for size in ("t0", "t1", "t2", "s", "m", "l")]


@pytest.fixture
def registry(monkeypatch):
    """What timm's `register_model` was called with, by name."""
    found = {}

    def register_model(function):
        found[function.__name__] = function
        return function

    models = types.ModuleType("timm.models")
    models.register_model = register_model
    timm = types.ModuleType("timm")
    timm.models = models
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    monkeypatch.delitem(sys.modules, "tranche.pconv.timm", raising=False)
    importlib.import_module("tranche.pconv.timm")
    yield found
    sys.modules.pop("tranche.pconv.timm", None)


def test_all_six_are_registered(registry):
    assert sorted(registry) == sorted(NAMES)


def test_built_as_timm_builds(registry):
    model = registry["partialnet_t0"](
        pretrained=False,
        pretrained_cfg=None,
        pretrained_cfg_overlay=None,
        cache_dir=None,
        num_classes=7,
        in_chans=1,
        device="meta",
    )
    assert isinstance(model, PartialNet) and model.head.out_features == 7 and model.in_chans == 1
    with pytest.raises(ValueError, match="pretrained=False"):
        registry["partialnet_t0"](pretrained=True)


def test_timm_itself():
    timm = pytest.importorskip("timm")
    importlib.import_module("tranche.pconv.timm")
    assert set(NAMES) <= set(timm.list_models("partialnet_*"))
    assert isinstance(timm.create_model("partialnet_t0", num_classes=3), PartialNet)
