"""The modules: published keys, and real blocks of transformers swapped in place."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from tranche import bits
from tranche.moe import BitSwitchExperts, JakiroMoE, SparseMoE, convert_moe, pack_experts, reference


def test_jakiro_has_the_published_keys():
    head = JakiroMoE(16, 24)
    projections = ("gate_proj", "up_proj", "down_proj")
    keys = {"gate.weight"} | {f"experts.{i}.{p}.weight" for i in range(2) for p in projections}
    state = head.state_dict()
    assert set(state) == keys
    assert state["experts.1.down_proj.weight"].shape == (16, 24)
    assert state["experts.1.up_proj.weight"].data_ptr() == head.w_up[1].data_ptr()  # a view
    other = JakiroMoE(16, 24)
    other.load_state_dict(state)
    assert torch.equal(other.w_gate, head.w_gate)
    x = torch.randn(2, 3, 16)
    assert torch.equal(other(x), head(x))
    del state["experts.0.up_proj.weight"]
    state["experts.7.up_proj.weight"] = torch.zeros(24, 16)
    with pytest.raises(
        RuntimeError, match=r"(?s)Missing.*experts\.0\.up_proj.*Unexpected.*experts\.7\.up_proj"
    ):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "foo"}, "expected variant 'jakiro' or 'topk', got 'foo'. Name one of these."),
        ({"variant": "star"}, "expected variant 'jakiro' or 'topk', got 'star'."),
        (
            {"num_experts": 4},
            "expected num_experts == 2 and top_k == 2 for variant 'jakiro', got 4 and 2. Other",
        ),
        ({"top_k": 1}, "expected num_experts == 2 and top_k == 2 for variant 'jakiro', got 2 and 1."),
        ({"variant": "topk", "top_k": 3}, "expected 1 <= top_k <= num_experts"),
        ({"variant": "topk", "num_experts": 0, "top_k": 0}, "expected 1 <= top_k <= num_experts"),
        ({"variant": "topk", "num_experts": 1025}, "got top_k 2 and num_experts 1025."),
    ],
)
def test_jakiro_refuses_what_it_could_not_run(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        JakiroMoE(16, 24, **options)
    assert str(caught.value).startswith("tranche.JakiroMoE: expected ")


def test_jakiro_says_what_x_it_takes():
    head = JakiroMoE(64, 32)
    for x, got in ((torch.zeros(3, 32), "32"), (torch.zeros(()), "a scalar")):
        message = (
            f"tranche.JakiroMoE: expected x.size(-1) == H (64), got {got}. It is the head's hidden_size."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            head(x)
    with pytest.raises(ValueError, match=r"expected residual of x's shape \[3, 64\], got \[2, 64\]"):
        head(torch.zeros(3, 64), torch.zeros(2, 64))


def test_jakiro_runs(backend):
    head = JakiroMoE(32, device=backend.device)
    x, residual = (torch.randn(2, 3, 32, device=backend.device) for _ in range(2))
    with torch.no_grad():
        first, second = head(x, residual, contrast=True)
        weights = (head.gate.weight, head.w_gate, head.w_up, head.w_down)
        want = reference.draft_moe(x.view(6, 32), *weights, residual=residual.view(6, 32), contrast=True)
    assert torch.allclose(first.double(), want[0].view(2, 3, 32), atol=1e-5)
    assert torch.allclose(second.double(), want[1].view(2, 3, 32), atol=1e-5)


def test_jakiro_trains():
    head = JakiroMoE(8, num_experts=3, variant="topk")
    first, second = head(torch.randn(4, 8), contrast=True)
    (first.square().sum() + second.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def small_model(kind):
    common = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 16,
    }  # fmt: skip
    if kind == "mixtral":
        from transformers import MixtralConfig, MixtralForCausalLM

        return MixtralForCausalLM(MixtralConfig(**common, num_local_experts=4))
    if kind == "qwen2":
        from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

        common.pop("head_dim")
        sizes = {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, "num_experts": 4}
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**common, **sizes))
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, moe_intermediate_size=20, num_experts=4))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2", "qwen3"])
def test_blocks_of_transformers(kind):
    torch.manual_seed(0)
    theirs = small_model(kind)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.2)
    ours = copy.deepcopy(theirs)
    keys = set(ours.state_dict())
    assert convert_moe(ours) == 2
    assert convert_moe(ours) == 0
    assert set(ours.state_dict()) == keys
    tokens = torch.randint(0, 50, (2, 7))
    losses = []
    for model in (theirs, ours):
        model.train()
        out = model(input_ids=tokens, labels=tokens)
        out.loss.backward()
        losses.append(out)
    assert torch.allclose(losses[0].logits, losses[1].logits, atol=1e-4)
    named = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        got = named[name].grad
        assert (p.grad is None) == (got is None), name
        if p.grad is not None:
            assert torch.allclose(p.grad, got, atol=1e-4 * (1 + float(p.grad.abs().max()))), name


def test_a_block_that_does_not_fit():
    with pytest.raises(ValueError, match=r"expected a Mixtral-.*got Linear\. Call fused_experts"):
        SparseMoE(torch.nn.Linear(2, 2))


def test_packed_blocks_switch_precision():
    torch.manual_seed(0)
    model = small_model("qwen3").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    tokens = torch.randint(0, 50, (2, 7))
    weights = model.model.layers[0].mlp.experts
    dense = [*weights.gate_up_proj.detach().chunk(2, 1), weights.down_proj.detach()]
    with torch.no_grad():
        exact = model(tokens).logits
        assert convert_moe(model, bits=8) == 2
        eight = model(tokens).logits
        with bits.at_bits(model, 3):
            three = model(tokens).logits
        assert torch.equal(model(tokens).logits, eight)
        bits.set_bits(model, 3)
        assert torch.equal(model(tokens).logits, three)
    assert 0 < float((eight - exact).abs().max()) < float((three - exact).abs().max())
    assert not any("gate_up_proj" in key for key in model.state_dict())
    experts = model.model.layers[0].mlp.experts
    for name, weight in zip(("gate", "up", "down"), dense, strict=True):
        packed = experts.packed(name)
        assert torch.equal(packed.data, pack_experts(weight).data)
        assert (reference.dense(packed) - weight).abs().max() <= packed.scale.max()


def test_packed_experts_are_saved_and_moved():
    stacks = (torch.randn(3, 8, 16), torch.randn(3, 8, 16), torch.randn(3, 16, 8))
    ours, other = BitSwitchExperts(*stacks, bits=4), BitSwitchExperts(*(w * 2 for w in stacks))
    other.load_state_dict(ours.state_dict())
    arguments = (torch.randn(4, 16), torch.rand(4, 2), torch.tensor([[0, 2]] * 4, dtype=torch.int32))
    want = ours(*arguments)
    assert not torch.equal(other(*arguments), want)
    bits.set_bits(other, 4)
    assert torch.equal(other(*arguments), want)
    assert other.bfloat16().up_scale.dtype == torch.float32
    assert torch.equal(other(*arguments), want)
    without_gate = BitSwitchExperts(None, *stacks[1:], "relu")
    assert without_gate.packed("gate") is None
    assert without_gate(*arguments).shape == (4, 16)
    state = ours.state_dict()
    larger = BitSwitchExperts(torch.randn(3, 9, 16), torch.randn(3, 9, 16), torch.randn(3, 16, 9))
    with pytest.raises(ValueError, match=r"expected packed experts with .*'up': \(9, 16, 1\)"):
        larger.set_extra_state(state["_extra_state"])
    with pytest.raises(ValueError, match="expected bits in"):
        BitSwitchExperts(*stacks, bits=9)
