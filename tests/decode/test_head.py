"""The draft head: its published keys, its files, its arithmetic, and its cache."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.decode.cases import ragged_prompts, tiny_model
from tranche.decode import JakiroDrafter, JakiroHead, generate
from tranche.decode.head_cache import HeadCache
from tranche.moe import reference

PUBLISHED = {
    "embed_tokens.weight", "fc.weight", "fc.bias", "layers.0.post_attention_layernorm.weight",
    *(f"layers.0.self_attn.{p}_proj.weight" for p in "qkvo"), "layers.0.mlp_moe.gate.weight",
    *(f"layers.0.mlp_moe.experts.{i}.{p}_proj.weight" for i in range(2) for p in ("gate", "up", "down")),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def pairs(batch=2, length=9, width=64):
    return torch.randint(64, (batch, length)), torch.randn(batch, length, width)


def test_the_published_keys(model):
    state = JakiroHead.for_model(model).state_dict()
    assert set(state) == PUBLISHED
    assert state["fc.weight"].shape == (64, 128)
    assert state["layers.0.mlp_moe.gate.weight"].shape == (4, 64)
    assert state["layers.0.mlp_moe.experts.1.down_proj.weight"].shape == (64, 64)


def test_both_kinds_have_equally_many_parameters(model):
    moe, plain = (JakiroHead.for_model(model, mlp=mlp) for mlp in ("moe", "plain"))
    count = [sum(p.numel() for p in head.parameters() if p.requires_grad) for head in (moe, plain)]
    assert abs(count[0] / count[1] - 1) < 0.002
    assert moe.contrastive and not plain.contrastive


def test_embeddings_are_the_targets_own_and_frozen(model):
    head = JakiroHead.for_model(model)
    weight = model.get_input_embeddings().weight
    assert head.embed_tokens.weight.data_ptr() == weight.data_ptr()
    assert not head.embed_tokens.weight.requires_grad
    assert weight.requires_grad


def test_seeds_differ_and_the_global_generator_does_not_notice(model):
    before = torch.get_rng_state()
    heads = [JakiroHead.for_model(model, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0].fc.weight, heads[1].fc.weight)
    assert not torch.equal(heads[0].fc.weight, heads[2].fc.weight)


@pytest.mark.parametrize("mlp", ["moe", "plain"])
def test_the_layer_against_its_formula(model, mlp):
    head = JakiroHead.for_model(model, mlp=mlp)
    tokens, features = pairs()
    got = head(tokens, features)
    w = {name: p.double() for name, p in head.state_dict().items()}

    z = torch.cat([w["embed_tokens.weight"][tokens], features.double()], -1) @ w["fc.weight"].T + w["fc.bias"]
    q, k, v = (
        (z @ w[f"layers.0.self_attn.{p}_proj.weight"].T).view(2, 9, -1, 32).transpose(1, 2) for p in "qkv"
    )
    cos, sin = LlamaRotaryEmbedding(head.config)(z, torch.arange(9).expand(2, 9))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q @ k.mT / 32**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    h = z + attended @ w["layers.0.self_attn.o_proj.weight"].T
    scale = (h.square().mean(-1, keepdim=True) + head.config.rms_norm_eps).rsqrt()
    n = h * scale * w["layers.0.post_attention_layernorm.weight"]
    if mlp == "moe":
        experts = [
            torch.stack([w[f"layers.0.mlp_moe.experts.{i}.{p}_proj.weight"] for i in range(2)])
            for p in ("gate", "up", "down")
        ]
        want = reference.draft_moe(
            n.flatten(0, 1),
            w["layers.0.mlp_moe.gate.weight"],
            *experts,
            residual=h.flatten(0, 1),
            contrast=True,
        )
        assert torch.allclose(got[1].double(), want[1].view(h.shape), atol=1e-4)
        first = want[0].view(h.shape)
    else:
        gate, up, down = (w[f"layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        first = h + (F.silu(n @ gate.T) * (n @ up.T)) @ down.T
        assert got[1] is None
    assert torch.allclose(got[0].double(), first, atol=1e-4)


@pytest.mark.parametrize("mlp", ["moe", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_head_comes_back(model, mlp, dtype, tmp_path):
    head = JakiroHead.for_model(model, mlp=mlp).to(dtype)
    head.save(tmp_path / "head")
    again = JakiroHead.load(tmp_path / "head")
    assert again.dtype == dtype and again.contrastive == head.contrastive
    tokens, features = pairs()
    assert torch.equal(again(tokens, features)[0], head(tokens, features)[0])
    described = json.loads((tmp_path / "head" / "config.json").read_text())
    assert described.get("num_local_experts") == (2 if mlp == "moe" else None)


def test_a_head_as_published_loads(model, tmp_path):
    """pytorch_model.bin in half precision, a table of frequencies among the keys, fc without bias."""
    head = JakiroHead.for_model(model)
    state = {key: value.half() for key, value in head.state_dict().items() if key != "fc.bias"}
    torch.save(
        state | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}, tmp_path / "pytorch_model.bin"
    )
    described = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 11008, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 1, "rms_norm_eps": 1e-6, "vocab_size": 64,
        "num_local_experts": 2, "num_experts_per_tok": 2, "rope_scaling": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(described))
    again = JakiroHead.load(tmp_path)
    assert again.dtype == torch.float16 and again.fc.bias is None
    assert torch.equal(again.layers[0].mlp_moe.w_up, head.layers[0].mlp_moe.w_up.half())


def test_files_that_are_no_head(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        JakiroHead.load(tmp_path)
    JakiroHead.for_model(model).save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no Jakiro head"):
        JakiroHead.load(tmp_path)


def test_unknown_mlp(model):
    with pytest.raises(ValueError, match="'moe' or 'plain'"):
        JakiroHead.for_model(model, mlp="dense")


@pytest.mark.parametrize("other", [{"hidden_size": 96, "head_dim": 32}, {"vocab_size": 80}])
def test_a_head_of_the_wrong_size_is_a_clear_error(model, other):
    head = JakiroHead.for_model(tiny_model(**other))
    tokens, mask = ragged_prompts(1)
    with pytest.raises(ValueError, match="expected a head for a target of 64 tokens and hidden size 64, got"):
        generate(model, JakiroDrafter(head), tokens, attention_mask=mask, max_new_tokens=5)


def test_rotary_frequencies_stay_fp32(model):
    head = JakiroHead.for_model(model).to(torch.bfloat16)
    tokens, features = pairs()
    head(tokens, features)
    assert next(iter(head._rotaries.values())).inv_freq.dtype == torch.float32


@torch.no_grad()
def test_the_cache_takes_ragged_chunks_as_the_whole_text(model):
    head = JakiroHead.for_model(model)
    tokens, features = pairs(batch=3, length=12)
    lengths = [12, 7, 1]
    cache = HeadCache(head, 3, 20)
    done = [0, 0, 0]
    for most in (4, 1, 0, 5, 3):
        counts = [min(most, lengths[b] - done[b]) for b in range(3)]
        some = torch.full((3, 6, 64), torch.nan)  # what is not committed must not matter
        following = torch.zeros(3, 6, dtype=torch.int64)
        for b, count in enumerate(counts):
            some[b, :count] = features[b, done[b] : done[b] + count]
            following[b, :count] = tokens[b, done[b] : done[b] + count]
            done[b] += count
        cache.append(some, following, torch.tensor(counts))
        if most == 5:
            cache.advance(contrast=False)
    assert done == lengths
    first, second = cache.advance(contrast=True)
    for b, length in enumerate(lengths):
        want = head(tokens[b : b + 1, :length], features[b : b + 1, :length])
        assert torch.allclose(first[b], want[0][0, -1], atol=1e-4)
        assert torch.allclose(second[b], want[1][0, -1], atol=1e-4)


def test_a_head_can_be_copied(model):
    head = JakiroHead.for_model(model)
    tokens, features = pairs()
    want = head(tokens, features)[0]
    assert torch.equal(copy.deepcopy(head)(tokens, features)[0], want)
