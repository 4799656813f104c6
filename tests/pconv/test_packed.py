"""Packed weights give the bits that the weights themselves give, and are refused where they do not belong."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.pconv.convolutions import make_case, same_bits
from tests.pconv.networks import randomise
from tests.pconv.test_partial_mlp import BLOCKS, FLOATS, make_block
from tranche import _host, testing
from tranche.pconv import (
    PartialNet,
    conv2d_pack,
    conv2d_slice,
    fold,
    partial_conv2d,
    partial_conv2d_,
    partial_mlp,
    partial_mlp_pack,
)
from tranche.pconv.fold import FoldedConv

WEIGHTS = ("conv_weight", "w1", "b1", "w2", "b2")
CONVOLUTIONS = {
    "3x3": {},
    "with bias": {"bias": True, "out": 40},
    "strided": {"stride": 2, "out": 12, "bias": True},
    "patches": {"shape": (1, 3, 12, 8), "width": 3, "out": 33, "kernel": (4, 4), "stride": 4, "padding": 0},
    "1x1": {"kernel": (1, 1), "width": 24, "out": 70},
    "dilated": {"dilation": 2, "width": 5},
    "groups": {"groups": 2},
    "depthwise": {"groups": 8, "bias": True},
    "a row": {"kernel": (1, 5), "start": 3},
}


def pack(case):
    options = {k: v for k, v in case.options.items() if k in ("stride", "dilation", "groups")}
    return conv2d_pack(case.weight, case.bias, **options)


def pack_block(block):
    return partial_mlp_pack(*(block.tensors[name] for name in WEIGHTS))


def check_convolution(name, dtype, device, packs):
    case = make_case(dtype=dtype, channels_last=True, device=device, **CONVOLUTIONS[name])
    packed = pack(case)
    assert packed.dtype == torch.uint8 and (packed.numel() > 0) == packs
    want = case.run(conv2d_slice)
    assert same_bits(case.run(lambda *args, **kw: conv2d_slice(*args, **kw, packed=packed)), want)
    # of any image, and instead of the weights
    case.x = torch.cat([case.x, case.x.flip(3)], dim=3)[:, :, 1:]
    want = case.run(conv2d_slice)
    if packs:
        case.weight = torch.zeros_like(case.weight)
    assert same_bits(case.run(lambda *args, **kw: conv2d_slice(*args, **kw, packed=packed)), want)


def check_block(name, dtype, device, packs):
    block = make_block(dtype=dtype, channels_last=True, device=device, **BLOCKS[name])
    want = block.run()
    block.options["packed"] = pack_block(block)
    assert same_bits(block.run(), want)
    if packs:
        block.tensors |= {name: torch.zeros_like(block.tensors[name]) for name in WEIGHTS}
        assert same_bits(block.run(), want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(backend, name, dtype):
    check_convolution(name, dtype, backend.device, backend.name == "cpu")


@pytest.mark.parametrize("name", ["3x3", "1x1", "dilated", "groups", "depthwise"])
def test_partial_convolutions(backend, name):
    for dtype in FLOATS:
        for channels_last in (False, True):
            options = CONVOLUTIONS[name] | {"out": None, "bias": True, "start": 1, "shape": (3, 25, 9, 7)}
            case = make_case(dtype=dtype, channels_last=channels_last, device=backend.device, **options)
            packed, want = pack(case), case.run(partial_conv2d)
            if backend.name == "cpu":
                case.weight, case.bias = torch.zeros_like(case.weight), torch.zeros_like(case.bias)
            case.options["packed"] = packed
            assert same_bits(case.run(partial_conv2d), want)
            case.run(partial_conv2d_)
            assert same_bits(case.x, want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BLOCKS)
def test_block(backend, name, dtype):
    check_block(name, dtype, backend.device, backend.name == "cpu")


def test_fp64():
    for name in CONVOLUTIONS:
        check_convolution(name, torch.float64, "cpu", True)
    for name in BLOCKS:
        check_block(name, torch.float64, "cpu", True)


def test_large_weights_and_any_number_of_threads():
    block = make_block(channels=256, width=64, hidden=512, size=(7, 7), channels_last=True)
    threads, packed = torch.get_num_threads(), pack_block(block)
    want = block.run()
    block.options["packed"] = packed
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(pack_block(block), packed)
            assert same_bits(block.run(), want)
    finally:
        torch.set_num_threads(threads)


def test_without_elements_is_without(backend):
    case = make_case(device=backend.device)
    nothing = torch.empty(0, dtype=torch.uint8, device=backend.device)
    assert same_bits(
        case.run(lambda *args, **kw: conv2d_slice(*args, **kw, packed=nothing)), case.run(conv2d_slice)
    )


def test_without_memory_there_is_nothing_to_pack():
    case, block = make_case(), make_block()
    weights = [block.tensors[name].to("meta") for name in WEIGHTS]
    for packed in (conv2d_pack(case.weight.to("meta")), partial_mlp_pack(*weights)):
        assert packed.is_meta and packed.shape == (0,) and packed.dtype == torch.uint8
    y = conv2d_slice(case.x.to("meta"), case.weight.to("meta"), packed=conv2d_pack(case.weight.to("meta")))
    assert y.shape == conv2d_slice(case.x, case.weight).shape


def test_gradients():
    block = make_block(dtype=torch.float64, gated=True)
    packed = pack_block(block)
    leaves = block.mapped(lambda t: t.requires_grad_())
    want = torch.autograd.grad(leaves.run().sum(), list(leaves.tensors.values()))
    leaves.options["packed"] = packed
    got = torch.autograd.grad(leaves.run().sum(), list(leaves.tensors.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    case = make_case(dtype=torch.float64)
    packed = pack(case)
    case.weight.requires_grad_()
    for function in (conv2d_slice, partial_conv2d):
        y = function(case.x, case.weight, padding=1, packed=packed)
        assert torch.autograd.grad(y.sum(), case.weight)[0].abs().sum() > 0


def test_opcheck(backend):
    block, case = make_block(device=backend.device), make_case(device=backend.device)
    ops = backend.ops()
    torch.library.opcheck(ops.partial_mlp_pack.default, tuple(block.tensors[name] for name in WEIGHTS))
    torch.library.opcheck(ops.conv2d_pack.default, (case.weight,))
    tensors = tuple(block.tensors[name] for name in ("x", *WEIGHTS))
    torch.library.opcheck(ops.partial_mlp.default, tensors, {"packed": ops.partial_mlp_pack(*tensors[1:])})
    packed = {"padding": [1, 1], "packed": ops.conv2d_pack(case.weight)}
    for op in (ops.conv2d_slice, ops.partial_conv2d, ops.partial_conv2d_):
        torch.library.opcheck(op.default, (case.x, case.weight), packed)


def test_refused():
    case, block = make_case(), make_block()
    packed, x = pack(case), case.x

    def run(packed, weight=case.weight, **options):
        return conv2d_slice(x, weight, padding=1, packed=packed, **options)

    for wrong in (packed[:-1], packed[:8], torch.zeros_like(packed), pack_block(block)):
        with pytest.raises(ValueError, match="packed"):
            run(wrong)
        for function in (partial_conv2d, partial_conv2d_):
            with pytest.raises(ValueError, match=rf"tranche\.{function.__name__}: expected packed"):
                function(x, case.weight, padding=1, packed=wrong)
    with pytest.raises(ValueError, match=r"packed made by conv2d_pack, got other bytes\. Make it anew"):
        run(packed[1:])
    with pytest.raises(ValueError, match="a contiguous packed"):
        run(packed.repeat_interleave(2)[::2])
    with pytest.raises(ValueError, match=r"packed of dtype torch\.uint8"):
        run(packed.float())
    for weight, options in (
        (case.weight[:4], {}),
        (case.weight, {"stride": 2}),
        (case.weight, {"dilation": 2}),
    ):
        with pytest.raises(ValueError, match="packed made of these weights"):
            run(packed, weight, **options)
    with pytest.raises(ValueError, match="packed made of these weights"):
        conv2d_slice(x.double(), case.weight.double(), packed=packed)
    with pytest.raises(ValueError, match="packed made of these weights"):
        partial_mlp(*(block.tensors[n] for n in ("x", *WEIGHTS)), packed=packed)
    with testing.use_simulator(), pytest.raises(ValueError, match="packed without elements"):
        run(packed)


def test_in_place_they_lie_apart():
    weight = torch.randn(8, 8, 3, 3)
    packed = conv2d_pack(weight)
    x = packed[:1024].view(torch.float32).view(1, 8, 4, 8)
    with pytest.raises(ValueError, match="packed outside the memory of x"):
        partial_conv2d_(x, weight, padding=1, packed=packed)


def test_a_damaged_one_reads_nothing_outside():
    """A header that lies about what follows, and a body of any bytes."""
    case, block = make_case(), make_block()
    packed = pack(case)[:-64].clone()
    packed[8:16].view(torch.int64).sub_(64)
    with pytest.raises(ValueError, match=r"packed with \d+ bytes of weights, got \d+\. Make it anew"):
        case.run(lambda *args, **kw: conv2d_slice(*args, **kw, packed=packed))
    block.options["packed"] = pack_block(block)
    block.options["packed"][64:] = 0x7F
    assert block.run().shape == block.tensors["x"].shape


def test_bad_weights(backend):
    block = make_block(device=backend.device)
    weights = [block.tensors[name] for name in WEIGHTS]
    for i, message in (
        (0, "conv_weight of shape"),
        (1, "w1 of shape"),
        (2, "b1 of shape"),
        (3, "w2 of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            partial_mlp_pack(*weights[:i], weights[i][None], *weights[i + 1 :])
    with pytest.raises(ValueError, match=r"tranche\.conv2d_pack: expected groups >= 1"):
        conv2d_pack(weights[0], groups=5)
    with pytest.raises(ValueError, match="bias of shape"):
        conv2d_pack(weights[0], weights[1])


@pytest.mark.skipif(_host.build_info()["isa"] == "baseline", reason="no lower instruction set")
def test_of_another_instruction_set(tmp_path):
    path, case = tmp_path / "packed.pt", make_case()
    script = (
        "import sys, torch; from tranche.pconv import conv2d_pack;"
        f"torch.save(conv2d_pack(torch.zeros({tuple(case.weight.shape)})), sys.argv[1])"
    )
    environment = os.environ | {"TRANCHE_ISA": "baseline"}
    subprocess.run([sys.executable, "-c", script, path], env=environment, check=True)
    with pytest.raises(ValueError, match=r"packed made for instruction set \w+, layout \d+, got baseline"):
        conv2d_slice(case.x, case.weight, packed=torch.load(path))


# ---- folded networks, which keep what they packed


@pytest.fixture
def network():
    given = {"num_classes": 5, "embed_dim": 16, "depths": (1, 1, 1), "patch_size": 2, "feature_dim": 24}
    return fold(randomise(PartialNet(3, **given)))


def kept(model):
    return [module._kept for module in model.modules() if getattr(module, "_kept", None) is not None]


def test_a_network_keeps_its_own(network):
    x = torch.randn(2, 3, 16, 24)
    want, keys = network(x), list(network.state_dict())
    count = len(kept(network))
    assert count > 3 and list(network.state_dict()) == keys
    assert not any(t.dtype == torch.uint8 for t in network.buffers())
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert not kept(other) and torch.equal(other(x), want)
    before = kept(network)
    network(x)
    assert all(a is b for a, b in zip(kept(network), before, strict=True))
    with torch.inference_mode():
        network(torch.randn(1, 3, 16, 16))
    tensors = [t for k in kept(network) for t in (k.packed if isinstance(k.packed, tuple) else (k.packed,))]
    assert len(tensors) > len(kept(network)) and not any(t.is_inference() for t in tensors)


def test_a_network_follows_its_weights(network):
    x, other = (
        torch.randn(2, 3, 16, 24),
        fold(randomise(PartialNet(3, 5, 16, (1, 1, 1), patch_size=2, feature_dim=24))),
    )
    network(x)
    network.load_state_dict(other.state_dict())
    assert torch.equal(network(x), other(x))
    with torch.no_grad():
        for model in (network, other):
            for name, value in model.named_buffers():
                if name.endswith("w2"):
                    value.mul_(2)
    assert torch.equal(network(x), copy.deepcopy(other)(x))
    for model in (network, other):
        block = model.stages[0].blocks[0]
        block.w1 = block.w1.clone().neg_()
    assert torch.equal(network(x), copy.deepcopy(other)(x))
    network.double()
    assert not kept(network) and network(x.double()).dtype == torch.float64


@pytest.fixture
def convolution():
    return FoldedConv(torch.randn(8, 4, 3, 3), torch.randn(8), padding=1)


def assert_follows(module, x):
    torch.testing.assert_close(module(x), F.conv2d(x, module.weight, module.bias, padding=1))


def test_what_is_kept_is_of_no_other_tensor(convolution):
    """Tensors that come and go have the same ids."""
    x = torch.randn(1, 4, 5, 5)
    convolution(x)
    for _ in range(5):
        weight = torch.randn(8, 4, 3, 3)
        want = F.conv2d(x, weight, convolution.bias, padding=1)
        torch.testing.assert_close(torch.func.functional_call(convolution, {"weight": weight}, (x,)), want)
        del weight
    for _ in range(5):
        del convolution.weight
        convolution.register_buffer("weight", torch.randn(8, 4, 3, 3))
        assert_follows(convolution, x)
    convolution.weight.data = torch.randn(8, 4, 3, 3)
    assert_follows(convolution, x)


def test_whoever_watches_sees_the_weights(convolution):
    x = torch.randn(1, 4, 5, 5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert convolution(mode.from_tensor(x)).shape == (1, 8, 5, 5)
    graph = make_fx(convolution, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    assert "conv2d_pack" not in graph.code
    others = [copy.deepcopy(convolution) for _ in range(3)]
    for i, other in enumerate(others):
        other.weight.mul_(i)
    weights = torch.func.stack_module_state(others)

    def call(*weights):
        return torch.func.functional_call(convolution, weights, (x,))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, which is old, and of images one after the other
        assert "conv2d_pack" not in str(torch.jit.trace(convolution, x).graph)
        together = torch.func.vmap(call)(*weights)
    torch.testing.assert_close(together, torch.stack([other(x) for other in others]))
    assert_follows(convolution, x)


def test_a_network_elsewhere(network):
    x = torch.randn(1, 3, 16, 16)
    want = network(x)
    with testing.use_simulator():
        torch.testing.assert_close(network(x), want)
    exported = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(exported(x), want)
