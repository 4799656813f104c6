"""PartialNet against what is published of it, and against itself in split-cat words."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.split_cat import split_cat
from tests.pconv.networks import PUBLISHED, published_shapes, randomise
from tranche import pconv
from tranche.pconv import PartialNet, partialnet_t0


def build(name, **kw):
    return getattr(pconv, f"partialnet_{name}")(**kw)


def tiny(**kw):
    given = {"num_classes": 5, "embed_dim": 16, "depths": (1, 1, 1, 1), "patch_size": 2, "feature_dim": 24}
    return PartialNet(3, **(given | kw))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys_and_shapes(name):
    model = build(name, device="meta")
    assert [(k, tuple(v.shape)) for k, v in model.state_dict().items()] == list(
        published_shapes(name).items()
    )


def test_a_checkpoint_loads_strictly():
    published = {
        k: torch.rand(s) if s else torch.tensor(7, dtype=torch.int64)
        for k, s in published_shapes("t0").items()
    }
    model = build("t0")
    model.load_state_dict(published, strict=True)
    assert all(torch.equal(v, published[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_and_multiply_adds(name, attention):
    """Convolutions, linear layers and the two products of attention count; half of torch's operations."""
    millions, billions = PUBLISHED[name][3:5] if attention else PUBLISHED[name][5:7]
    model = build(name, attention=attention, device="meta").eval()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert round(counter.get_total_flops() / 2e9, 3) == billions


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_activations_and_drop_paths(name):
    model = build(name, device="meta")
    act, last = {
        "t0": (nn.GELU, 0.0),
        "t1": (nn.GELU, 0.02),
        "t2": (nn.ReLU, 0.05),
        "s": (nn.ReLU, 0.1),
        "m": (nn.ReLU, 0.2),
        "l": (nn.ReLU, 0.3),
    }[name]
    blocks = [m for m in model.modules() if isinstance(m, pconv.PartialBlock)]
    assert all(type(block.mlp[2]) is act for block in blocks) and type(model.avgpool_pre_head[2]) is act
    assert blocks[0].drop_path.probability == 0 and blocks[-1].drop_path.probability == pytest.approx(last)
    assert len(blocks) == sum(PUBLISHED[name][1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"spatial_attention": True, "activation": "gelu"}, {"attention": False}]
)
def test_split_cat_has_the_same_outputs_and_gradients(backend, options, training):
    """To rounding in fp64; CUDA's kernels know fp32, in which batch norms over four images magnify roundings."""
    dtype, tolerance = (torch.float64, 1e-10) if backend.name == "cpu" else (torch.float32, 1e-3)
    size = backend.pick((40, 56), (16, 24))
    model = randomise(tiny(**options, dtype=dtype)).to(backend.device).train(training)
    theirs = split_cat(model)
    x = torch.randn(4, 3, *size, dtype=dtype, device=backend.device)
    results = []
    for network in (model, theirs):
        leaf = x.clone().requires_grad_()
        y = network(leaf)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=dtype, device=y.device).view_as(y)
        (y * upstream).sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters()}
        results.append({"y": y.detach(), "x": leaf.grad} | gradients | dict(network.named_buffers()))
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    for name, theirs_value in results[1].items():
        # some gradients are nothing but rounding: a shift that the next batch norm takes away again
        scale = max(1.0, float(theirs_value.abs().max()))
        torch.testing.assert_close(results[0][name], theirs_value, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (33, 16), (40, 72)])
def test_any_input_size(size):
    model = tiny().eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, *size))
        assert features.shape == (2, 128, size[0] // 16, size[1] // 16)
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)


def test_channels_last_is_kept_and_changes_nothing():
    model = randomise(tiny()).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        model = model.to(memory_format=torch.channels_last)
        got = model.forward_features(x.to(memory_format=torch.channels_last))
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model.forward_head(got), want, rtol=1e-4, atol=1e-4)


def test_features_only():
    whole = tiny().eval()
    backbone = tiny(features_only=True, out_indices=(0, 2, -1)).eval()
    assert not any(k.startswith(("head", "avgpool")) for k in backbone.state_dict())
    missing = backbone.load_state_dict(whole.state_dict(), strict=False)
    assert not missing.missing_keys
    x = torch.randn(2, 3, 32, 48)
    outputs = backbone(x)
    chosen = [backbone.feature_info[i] for i in backbone.out_indices]
    assert [i["reduction"] for i in chosen] == [2, 8, 16]
    assert [y.shape for y in outputs] == [
        (2, info["num_chs"], 32 // info["reduction"], 48 // info["reduction"]) for info in chosen
    ]
    torch.testing.assert_close(outputs[-1], whole.forward_features(x))


def test_reset_classifier():
    model = tiny(dtype=torch.float64).eval()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(9)
    assert model(x).shape == (1, 9) and model.num_classes == 9
    assert model.get_classifier().weight.dtype == torch.float64
    model.reset_classifier(0, "avg")
    assert torch.equal(model(x), features) and features.shape == (1, 24)
    with pytest.raises(ValueError, match="global_pool 'avg'"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="a head"):
        tiny(features_only=True).reset_classifier(3)


def test_one_image_in_training():
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"PATChannel: expected x.size\(0\) >= 2 in training mode, got 1"):
        tiny().train()(x)
    tiny(attention=False).train()(x)
    # frozen statistics need no batch
    model = tiny().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model(x).sum().backward()


def test_drop_path():
    drop = pconv.partialnet.DropPath(0.25).train()
    kept = drop(torch.ones(4000, 2, 1, 1))[:, :, 0, 0]
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(float(kept.mean()) - 1) < 0.05
    assert torch.equal(drop.eval()(torch.ones(3, 1)), torch.ones(3, 1))


def test_ratios_of_blocks():
    model = tiny(n_div=[2, 4, 8, 16], attention=False)
    widths = [m.spatial_mixing.dim_conv3 for m in model.modules() if isinstance(m, pconv.PartialBlock)]
    assert widths == [8, 8, 8, 8]


def test_bad_arguments():
    for message, arguments in {
        "n_div for each of the 4 blocks, got 3": {"n_div": [4, 4, 4]},
        "activation in": {"activation": "silu"},
        "out_indices in": {"out_indices": (4,)},
        "multiple of num_heads": {"num_heads": 5},
    }.items():
        with pytest.raises(ValueError, match=message):
            tiny(**arguments)
    with pytest.raises(ValueError, match="mixing in"):
        pconv.PartialBlock(8, "spatial")
    model = tiny().eval()
    for shape in ((3, 16, 16), (1, 4, 16, 16), (1, 3, 16, 15)):
        with pytest.raises(ValueError, match="H >= 16"):
            model(torch.randn(shape))


def test_compile():
    model = randomise(tiny(spatial_attention=True, depths=(1, 1))).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_initialised_as_published():
    model = partialnet_t0()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert abs(float(module.weight.std()) - 0.02) < 0.004
    bias = [p for name, p in model.named_parameters() if name.endswith("lookup_table_bias")]
    assert len(bias) == 2 and not any(b.any() for b in bias)
