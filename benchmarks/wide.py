"""The byte-level Llama made large: the same text from a model of which every pass reads hundreds of megabytes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tranche import byte_llama
from tranche.decode import JakiroHead
from tranche.decode.demo_head import RECIPE, load_or_train_head


def widened(model: LlamaForCausalLM, hidden: int, inner: int) -> LlamaForCausalLM:
    """The same function of a larger model: the residual stream `hidden` times over, each MLP's neurons `inner` times.

    Each matrix is repeated along its outputs, and along its inputs divided by the repeats, which are powers of two:
    the products are the same up to the order of their sums. Heads stay as they are.
    """
    config = type(model.config)(
        **model.config.to_dict()
        | {
            "hidden_size": model.config.hidden_size * hidden,
            "intermediate_size": model.config.intermediate_size * inner,
            "head_dim": model.config.hidden_size // model.config.num_attention_heads,
        }
    )
    with torch.device("meta"):
        wide = LlamaForCausalLM(config)
    wide.to_empty(device="cpu")
    wide.model.rotary_emb = model.model.rotary_emb

    repeats = {  # of outputs, of inputs
        "embed_tokens": (1, hidden), "lm_head": (1, hidden), "q_proj": (1, hidden), "k_proj": (1, hidden),
        "v_proj": (1, hidden), "o_proj": (hidden, 1), "gate_proj": (inner, hidden), "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }  # fmt: skip
    source = dict(model.named_parameters())

    def repeated(name: str) -> Tensor:
        weight = source[name].detach()
        if weight.dim() == 1:
            return weight.repeat(hidden)
        outputs, inputs = repeats[name.split(".")[-2]]
        shrink = 1 if "embed_tokens" in name else inputs
        return weight.repeat(outputs, inputs) / shrink

    wide.load_state_dict({name: repeated(name) for name in source})
    return wide.eval()


def wide_llama(hidden: int = 4, inner: int = 16) -> LlamaForCausalLM:
    """The trained model of `tranche.byte_llama`, widened to 160 million weights."""
    return widened(byte_llama.load_or_train(), hidden, inner)


def widened_head(head: JakiroHead, hidden: int) -> JakiroHead:
    """The head that drafts for a widened model what `head` drafts for the model."""
    config = type(head.config)(
        **head.config.to_dict()
        | {"hidden_size": head.config.hidden_size * hidden, "head_dim": head.config.head_dim}
    )
    source = head.state_dict()
    inner = head.layers[0].mlp_moe.w_up.size(1)
    wide = JakiroHead(
        config, intermediate_size=inner, embedding=source["embed_tokens.weight"].repeat(1, hidden)
    )

    def repeated(name: str) -> Tensor:
        weight = source[name]
        if weight.dim() == 1:
            return weight.repeat(hidden)
        if name == "fc.weight":  # reads an embedding and a feature, each of them repeated
            halves = [half.repeat(hidden, hidden) / hidden for half in weight.chunk(2, dim=1)]
            return torch.cat(halves, dim=1)
        if "o_proj" in name or "down_proj" in name:
            return weight.repeat(hidden, 1)
        return weight.repeat(1, hidden) / (1 if "embed_tokens" in name else hidden)

    wide.load_state_dict({name: repeated(name) for name in source})
    return wide.eval()


def wide_head(hidden: int = 4, seed: int = RECIPE.seed) -> JakiroHead:
    """The demo's head, for `wide_llama` of the same `hidden`; `seed` is that of its training."""
    recipe = dataclasses.replace(RECIPE, seed=seed)
    return widened_head(load_or_train_head(byte_llama.load_or_train(), recipe), hidden)
