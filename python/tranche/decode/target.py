"""The target model while `generate` holds it: its attention exchanged, and everything put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tranche import rows
from tranche.bits import BitSwitchLinear
from tranche.tree import Tree
from tranche.tree.transformers import TreeCache

# What the exact configuration knows to compute by rows that depend on nothing but themselves.
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_NORMS = tuple(f"{family}RMSNorm" for family in _FAMILIES)
_MLPS = tuple(f"{family}MLP" for family in _FAMILIES)
_ROTARIES = tuple(f"{family}RotaryEmbedding" for family in _FAMILIES)
_SILUS = ("SiLU", "SiLUActivation")
_POSITIONWISE_ROPE = ("default", "linear", "llama3", "yarn")
_ROPE_BLOCK = (
    256  # positions computed at a time: the bits of a position must not depend on the table's length
)


def forward(
    model: PreTrainedModel, cache: TreeCache, tokens: Tensor, tree: Tree, *, exact: bool = False
) -> Tensor:
    """One pass of the model over the nodes of the trees, as far as its output embeddings.

    Args:
        model: a causal model attached by `attached`.
        cache: committed tokens; the nodes' keys and values go behind them, uncommitted.
        tokens: int64 [B, N].
        tree: the trees.
        exact: as `tree_attention`'s.

    Returns:
        [B, N, H], the last hidden states.
    """
    cache.tree = tree
    try:
        return model.get_decoder()(
            input_ids=tokens,
            position_ids=tree.positions(cache.seqlens),
            past_key_values=cache,
            use_cache=True,
            tree=tree,
            cache_seqlens=cache.seqlens,
            exact=exact,
        ).last_hidden_state
    finally:
        cache.tree = None


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The model's output embeddings: [..., H] to [..., V]."""
    return model.get_output_embeddings()(hidden)


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings of."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.size(0)


def check_supported(model: PreTrainedModel) -> None:
    """Refuse a model whose passes `forward` and `logits_of` would not compute.

    Raises:
        TypeError: not a model of transformers.
        ValueError: no decoder and output embeddings, no rotary attention, or something done to the logits besides.
    """
    # By attribute: what torch.compile and adapters wrap around a model passes for one.
    if not isinstance(getattr(model, "config", None), PretrainedConfig):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"tranche.generate: expected a causal language model of transformers, got {got}. "
            "Load one with AutoModelForCausalLM."
        )
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if head is None or model.config.is_encoder_decoder:
        raise ValueError(
            f"tranche.generate: expected a causal language model with output embeddings, got {type(model).__name__}. "
            "Load it with AutoModelForCausalLM."
        )
    # The cache takes its shape from the configuration, and positions reach the model by its rotary embedding.
    rotary = any(type(module).__name__.endswith("RotaryEmbedding") for module in model.modules())
    if not rotary or getattr(config, "num_key_value_heads", None) is None:
        raise ValueError(
            "tranche.generate: expected a model with rotary attention and num_key_value_heads in its configuration "
            f"({', '.join(_FAMILIES)}), got {type(model).__name__}. This model is not supported."
        )
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"tranche.generate: expected a model whose logits are its output embeddings' (Llama, Mistral, Qwen2, "
                f"Qwen3), got one with {name}={getattr(config, name)}. This model is not supported."
            )


def _rope_type(module: nn.Module) -> str:
    return getattr(module, "rope_type", "default")


def _is_gated_mlp(module: nn.Module) -> bool:
    return type(module).__name__ in _MLPS and type(getattr(module, "act_fn", None)).__name__ in _SILUS


def _covered(module: nn.Module) -> bool:
    """Whether a module without children computes rows that depend on nothing but themselves."""
    name = type(module).__name__
    if name in _ROTARIES:
        return _rope_type(module) in _POSITIONWISE_ROPE
    return name in _NORMS or name in _SILUS or isinstance(module, nn.Embedding | BitSwitchLinear)


def obstacles(model: PreTrainedModel) -> list[str]:
    """What keeps the model's rows from being their own, by module; empty for the exact configuration."""
    found = []
    for name, module in model.named_modules():
        if type(module).__name__ in _MLPS and not _is_gated_mlp(module):
            found.append(f"{name} (activation {type(getattr(module, 'act_fn', None)).__name__})")
        elif not any(True for _ in module.children()) and not _covered(module):
            found.append(f"{name} ({type(module).__name__})")
    return found


def _own_norm(module: Any) -> Callable[[Tensor], Tensor]:
    def norm(x: Tensor) -> Tensor:
        return rows.rms_norm(x, module.weight, module.variance_epsilon)

    return norm


def _own_mlp(module: Any) -> Callable[[Tensor], Tensor]:
    def mlp(x: Tensor) -> Tensor:
        return module.down_proj(rows.silu_mul(module.gate_proj(x), module.up_proj(x)))

    return mlp


def _own_rotary(
    module: nn.Module, like: Tensor, positions: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    blocks = []
    for start in range(0, positions, _ROPE_BLOCK):
        block = torch.arange(start, start + _ROPE_BLOCK, device=like.device)
        blocks.append(module(like, block[None]))
    cos, sin = (torch.cat([block[i][0] for block in blocks]) for i in (0, 1))

    def rotary(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return cos[position_ids], sin[position_ids]

    return rotary


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    before = module.__dict__.get("forward")  # another's replacement, if there is one
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextlib.contextmanager
def attached(model: PreTrainedModel, *, exact: bool, capacity: int) -> Iterator[None]:
    """Within this context the model's attention is `tranche_tree` and it is in eval mode.

    Args:
        model: the model. Do not call it elsewhere meanwhile.
        exact: also compute norms, gated MLPs and rotary embeddings by rows that depend on nothing but themselves,
            wherever the model has the known kinds of them.
        capacity: positions that the rotary embedding must know.
    """
    with contextlib.ExitStack() as stack:
        training = [module for module in model.modules() if module.training]

        def restore_mode() -> None:
            for module in training:
                module.training = True

        stack.callback(restore_mode)
        model.eval()
        stack.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation("tranche_tree")
        if exact:
            like = torch.empty(0, dtype=model.dtype, device=model.device)
            for module in model.modules():
                name = type(module).__name__
                if name in _NORMS:
                    stack.enter_context(_replaced_forward(module, _own_norm(module)))
                elif _is_gated_mlp(module):
                    stack.enter_context(_replaced_forward(module, _own_mlp(module)))
                elif name in _ROTARIES and _rope_type(module) in _POSITIONWISE_ROPE:
                    table = _own_rotary(module, like, capacity)
                    stack.enter_context(_replaced_forward(module, table))
        yield
