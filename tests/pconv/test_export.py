"""ONNX files of folded and unfolded networks compute what the networks compute, and leave them as they were."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.pconv.networks import randomise
from tranche.pconv import PartialNet, export_onnx, fold


def tiny(**kw):
    given = {"num_classes": 5, "embed_dim": 16, "depths": (1, 1, 1), "patch_size": 2, "feature_dim": 24}
    return randomise(PartialNet(3, **(given | kw))).eval()


def run(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.numpy()})
    return torch.from_numpy(np.asarray(y))


@pytest.mark.parametrize("spatial", [False, True])
def test_folded(tmp_path, spatial):
    model = fold(tiny(spatial_attention=spatial, activation="gelu" if spatial else "relu"))
    path, example = tmp_path / "folded.onnx", torch.randn(1, 3, 24, 40)
    before, state = model(example), {k: v.clone() for k, v in model.state_dict().items()}
    export_onnx(model, path, example)

    # eager use afterwards: the same bits, at this size and at others
    assert torch.equal(model(example), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    other = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(other), fold(model)(other))

    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 24, 40)
        want = model(x)
        torch.testing.assert_close(run(path, x), want, rtol=0, atol=1e-5 * float(want.abs().max()))

    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert kinds["Split"] >= 3 and kinds["Conv"] >= 3 * 3 and kinds["Concat"] >= 3
    assert not any(name.startswith("Scatter") for name in kinds)
    assert not {node.domain for node in onnx.load(path).graph.node} - {""}


def test_the_bias_table_goes_along(tmp_path):
    model = fold(tiny())
    path, x = tmp_path / "table.onnx", torch.randn(2, 3, 24, 40)
    export_onnx(model, path, x)
    with_table = run(path, x)
    for name, value in model.named_parameters():
        if name.endswith("lookup_table_bias"):
            value.zero_()
    without = fold(model)(x)
    assert (with_table - without).abs().max() > 1e-3 * without.abs().max()


def test_unfolded_and_fixed_batch(tmp_path):
    model = tiny(attention=False)
    path, x = tmp_path / "plain.onnx", torch.randn(3, 3, 16, 24)
    with torch.no_grad():
        want = model(x)
    export_onnx(model, path, x, dynamic_batch=False)
    torch.testing.assert_close(run(path, x), want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="in evaluation"):
        export_onnx(tiny().train(), tmp_path / "x.onnx", torch.randn(1, 3, 16, 16))
