"""Folded networks compute what the networks compute, whatever their statistics."""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.pconv.networks import randomise
from tranche import pconv
from tranche.pconv import PartialBlock, PartialNet, fold

VARIANTS = {
    "channel and self": {},
    "with spatial": {"spatial_attention": True, "activation": "gelu"},
    "plain": {"attention": False},
    "searched": {"search": True, "attention": False},
    "ratios": {"n_div": [2, 8, 16], "num_heads": 2},
}


def tiny(**kw):
    given = {"num_classes": 5, "embed_dim": 16, "depths": (1, 1, 1), "patch_size": 2, "feature_dim": 24}
    return PartialNet(3, **(given | kw))


@pytest.mark.parametrize("variant", VARIANTS)
def test_folding_is_exact(variant):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = randomise(tiny(dtype=dtype, **VARIANTS[variant])).eval()
        x = torch.randn(2, 3, 24, 40, dtype=dtype)
        with torch.no_grad():
            want = model(x)
            torch.testing.assert_close(fold(model)(x), want, rtol=0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("name", ["t0", "t1", "t2"])
def test_published_networks(name):
    model = randomise(getattr(pconv, f"partialnet_{name}")()).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(fold(model)(x), want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_backends(backend):
    model = randomise(tiny(spatial_attention=True)).to(backend.device).eval()
    x = torch.randn(2, 3, 16, 24, device=backend.device)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(fold(model)(x), want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_bf16():
    model = randomise(tiny()).eval()
    x = torch.randn(2, 3, 24, 40)
    folded = fold(model).bfloat16()
    with torch.no_grad():
        want, plain = model(x), model.bfloat16()(x.bfloat16()).float()
        got = folded(x.bfloat16()).float()
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max() + 2**-8 * want.abs().max()


def test_nothing_is_shared_and_nothing_requires_grad():
    model = randomise(tiny(spatial_attention=True))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold(model)
    x = torch.randn(2, 3, 16, 16)
    want = folded(x)
    assert not want.requires_grad and model.training and not folded.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    own = {t.data_ptr() for t in (*folded.parameters(), *folded.buffers()) if t.numel()}
    assert not own & {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(folded(x), want)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_any_size_one_after_the_other():
    """The mask of one size must not serve another."""
    model = randomise(tiny()).eval()
    folded = fold(model)
    with torch.no_grad():
        for size in ((16, 32), (32, 16), (24, 24), (16, 32)):
            x = torch.randn(1, 3, *size)
            want = model(x)
            torch.testing.assert_close(folded(x), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    with torch.inference_mode():
        folded(torch.randn(1, 3, 40, 40))
    assert not folded.stages[4].blocks[0].mixing.rpe_k.mask.is_inference()


def test_a_large_batch_goes_in_pieces(monkeypatch):
    folded = fold(randomise(tiny()).eval())
    x = torch.randn(7, 3, 16, 24)
    want = folded(x)
    image = 16 * 8 * 12 * 4  # bytes of the first stage
    module = importlib.import_module("tranche.pconv.fold")
    sizes = []
    folded.patch_embed.register_forward_pre_hook(lambda _, args: sizes.append(args[0].size(0)))
    for whole, taken in ((7 * image, [7]), (6 * image, [3, 3, 1]), (2 * image, [1] * 7), (1, [1] * 7)):
        monkeypatch.setattr(module, "WHOLE_BYTES", whole)
        sizes.clear()
        torch.testing.assert_close(folded(x), want)
        assert sizes == taken
    with pytest.raises(ValueError, match="expected x of shape"):
        folded(x[0])
    assert folded(x[:0]).shape == (0, 5)


PASSES = """
import resource, torch
from tranche.pconv import fold, partialnet_t2
model, images = fold(partialnet_t2().eval()), torch.zeros(32, 3, 224, 224).to(memory_format=torch.channels_last)
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(images)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory by other rules")
def test_a_large_batch_keeps_its_memory():
    """25 MB of activations, some times over, are 20,000 pages: a pass is not to get them anew."""
    done = subprocess.run([sys.executable, "-c", PASSES], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500


def test_a_class_of_its_own_stays():
    class Doubled(PartialNet):
        def forward_features(self, x):
            return 2 * super().forward_features(x)

    model = randomise(Doubled(3, 5, 16, (1, 1), patch_size=2, feature_dim=24)).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(fold(model)(x), model(x))


def test_a_new_classifier():
    folded = fold(randomise(PartialNet(embed_dim=16, depths=(1, 1, 1, 1))).double())
    folded.reset_classifier(5)
    y = folded(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert y.shape == (2, 5) and y.dtype == torch.float64


def test_state_dict_round_trip():
    model = randomise(tiny(spatial_attention=True)).eval()
    folded, other = fold(model), fold(randomise(tiny(spatial_attention=True)))
    x = torch.randn(2, 3, 16, 16)
    other(x)
    other.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(other(x), folded(x))


def test_features_and_parts():
    backbone = randomise(tiny(features_only=True)).eval()
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        for got, want in zip(fold(backbone)(x), backbone(x), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
        block = randomise(PartialBlock(16, spatial=True)).eval()
        x = torch.randn(2, 16, 5, 6)
        torch.testing.assert_close(fold(block)(x), block(x), rtol=1e-4, atol=1e-5)
        around = nn.Sequential(nn.Conv2d(3, 16, 1), block)
        torch.testing.assert_close(fold(around)(x[:, :3]), around(x[:, :3]), rtol=1e-4, atol=1e-5)


def test_compile():
    folded = fold(randomise(tiny(spatial_attention=True)))
    x = torch.randn(2, 3, 16, 24)
    compiled = torch.compile(folded, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), folded(x))


def test_statistics_are_needed():
    model = tiny()
    model.stages[0].blocks[0].mlp[1] = nn.BatchNorm2d(32, track_running_stats=False)
    with pytest.raises(ValueError, match=r"got stages.0.blocks.0.mlp.1 without"):
        fold(model)


def test_counted_operations():
    """A folded network costs its convolutions and linear layers, less what lies between 1x1 convolutions of PAT_sp."""
    model = tiny(spatial_attention=False, device="meta").eval()
    counts = []
    for network in (model, fold(tiny()).to("meta")):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(2, 3, 24, 40, device="meta"))
        counts.append(counter.get_total_flops())
    last_pixels = 2 * 3 * 5
    assert counts[1] == counts[0] + 2 * 9 * last_pixels  # the convolution of one channel that changes nothing
