"""One small call of every raw op: what the support table tries out, and what compute-sanitizer watches on a GPU.

A call gets the namespace to call in, a device, and the dtype of the data. An op refuses a dtype with ValueError.
float8_e4m3fn means bf16 data over caches of that dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.tree.cases import random_parents
from tranche.tree import reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Call:
    """How to call an op, and the dtypes worth trying; none where the op's dtypes are fixed."""

    run: Callable[[Any, str, torch.dtype], Any]
    dtypes: tuple[torch.dtype, ...]


CALLS: dict[str, Call] = {}


def call(op: str, *dtypes: torch.dtype) -> Callable[..., Any]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        CALLS[op] = Call(function, dtypes)
        return function

    return register


def normal(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def integers(device: str, dtype: torch.dtype, high: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(high, shape, generator=generator).to(device, dtype)


def full(device: str, dtype: torch.dtype, value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=device)


# ---- tree ---------------------------------------------------------------------------------------------------------

BATCH, NODES, SLOTS, VOCABULARY = 2, 20, 340, 300


def tree(device: str) -> tuple[Tensor, ...]:
    """parent, n_nodes, depth, ancestors."""
    parent = random_parents(BATCH, NODES, generator=torch.Generator().manual_seed(0))
    n_nodes = torch.tensor([NODES, NODES - 3], dtype=torch.int32)
    ancestors, depth = reference.tree_ancestors(parent, n_nodes)
    return tuple(t.to(device) for t in (parent, n_nodes, depth, ancestors))


def attention(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The arguments of tree_attention."""
    _, n_nodes, depth, ancestors = tree(device)
    rows = torch.bfloat16 if dtype == FLOAT8 else dtype
    cache = normal(device, dtype, BATCH, SLOTS, 2, 64)
    lengths = torch.tensor([300, 17], dtype=torch.int32, device=device)
    return normal(device, rows, BATCH, NODES, 4, 64), cache, cache.clone(), lengths, ancestors, depth, n_nodes


@call("tree_ancestors")
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    parent, n_nodes, _, _ = tree(device)
    ops.tree_ancestors(parent, n_nodes)


@call("tree_attention", *FLOATS, FLOAT8)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    for exact in (False, True):
        ops.tree_attention(*attention(device, dtype), exact=exact)


@call("tree_attention_out", *FLOATS, FLOAT8)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    arguments = attention(device, dtype)
    ops.tree_attention_out(*arguments, out=torch.empty_like(arguments[0]))


@call("tree_attention_backward", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    q, k, v, *rest = attention(device, dtype)
    out, lse = ops.tree_attention(q, k, v, *rest, return_lse=True)
    ops.tree_attention_backward(torch.ones_like(out), None, q, k, v, out, lse, *rest)


@call("tree_merge_state", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    out, lse = normal(device, dtype, BATCH, NODES, 4, 64), normal(device, torch.float32, BATCH, NODES, 4)
    ops.tree_merge_state(out, lse, out, lse)


@call("tree_write_cache_", *FLOATS, FLOAT8)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    q, k_cache, v_cache, lengths, _, depth, n_nodes = attention(device, dtype)
    k = q[:, :, :2]
    ops.tree_write_cache_(k, k, k_cache, v_cache, lengths, depth, n_nodes)


@call("tree_compact_cache_", *FLOATS, FLOAT8)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    _, k_cache, v_cache, lengths, *_ = attention(device, dtype)
    path = full(device, torch.int32, -1, BATCH, NODES)
    path[:, :3] = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    ops.tree_compact_cache_([k_cache, v_cache], path, full(device, torch.int32, 2, BATCH), lengths)


@call("tree_expand_beam", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    scores = torch.float64 if dtype == torch.float64 else torch.float32
    ops.tree_expand_beam(normal(device, dtype, BATCH, 4, VOCABULARY), normal(device, scores, BATCH, 4), 5)


@call("tree_select", torch.float32, torch.float64)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    parents = torch.arange(-1, 39, dtype=torch.int32, device=device).repeat(BATCH, 1)
    tokens, roots = integers(device, torch.int64, 99, BATCH, 40), integers(device, torch.int64, 99, BATCH)
    ops.tree_select(normal(device, dtype, BATCH, 40), parents, tokens, roots, 9)


@call("tree_sample", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.tree_sample(normal(device, dtype, BATCH, VOCABULARY), *sampling(device))


@call("tree_verify_greedy")
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    parent, n_nodes, _, _ = tree(device)
    tokens = integers(device, torch.int64, 3, BATCH, NODES)
    ops.tree_verify_greedy(tokens, parent, n_nodes, tokens)


@call("tree_verify_sample", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.tree_verify_sample(*verification(device, dtype), *sampling(device))


@call("tree_verify_typical", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.tree_verify_typical(*verification(device, dtype), 0.3, 0.09)


def sampling(device: str) -> tuple[Tensor, ...]:
    """temperature, top_k, top_p, seed, position."""
    return (
        full(device, torch.float32, 0.7, BATCH),
        full(device, torch.int32, 40, BATCH),
        full(device, torch.float32, 0.9, BATCH),
        integers(device, torch.int64, 99, BATCH),
        integers(device, torch.int64, 99, BATCH),
    )


def verification(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """tokens, parent, n_nodes, logits."""
    parent, n_nodes, _, _ = tree(device)
    tokens = integers(device, torch.int64, VOCABULARY, BATCH, NODES)
    return tokens, parent, n_nodes, normal(device, dtype, BATCH, NODES, VOCABULARY)


# ---- moe ----------------------------------------------------------------------------------------------------------

TOKENS, HIDDEN, INNER, EXPERTS = 5, 64, 48, 4


@call("moe_route", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.moe_route(normal(device, dtype, TOKENS, HIDDEN), normal(device, dtype, EXPERTS, HIDDEN), 2)


@call("moe_plan")
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.moe_plan(integers(device, torch.int32, EXPERTS, TOKENS, 2), EXPERTS)


@call("moe_experts", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 1]], dtype=torch.int32, device=device).repeat(TOKENS, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weights = normal(device, dtype, TOKENS, HIDDEN), normal(device, wide, TOKENS, 2)
    ops.moe_experts(x, *experts(device, dtype, EXPERTS), weights, ids)
    if dtype == torch.float64:
        return
    tiles = 512 * (INNER // 16) * (HIDDEN // 32), 512 * (HIDDEN // 16) * -(-INNER // 32)
    up, down = (integers(device, torch.int32, 256, EXPERTS, size).to(torch.uint8) for size in tiles)
    of_up, of_down = (full(device, torch.float32, 0.1, EXPERTS, size) for size in (INNER, HIDDEN))
    ops.moe_experts(x, up, up, down, weights, ids, 0, of_up, of_up, of_down, bits=4)


@call("moe_draft", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    x, router = normal(device, dtype, TOKENS, HIDDEN), normal(device, dtype, 4, HIDDEN)
    ops.moe_draft(x, router, *experts(device, dtype, 2), contrast=True, residual=x)


def experts(device: str, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
    """w_gate, w_up, w_down."""
    up = normal(device, dtype, count, INNER, HIDDEN)
    return up, up.clone(), normal(device, dtype, count, HIDDEN, INNER)


# ---- bits ---------------------------------------------------------------------------------------------------------

OUT_FEATURES, IN_FEATURES, LAYOUT = 24, 70, 1


def packed(ops: Any, device: str) -> tuple[Any, ...]:
    """data, out_features, in_features, layout."""
    codes = (integers(device, torch.int32, 256, OUT_FEATURES, IN_FEATURES) - 128).to(torch.int8)
    return ops.bits_pack(codes), OUT_FEATURES, IN_FEATURES, LAYOUT


def learned(device: str, dtype: torch.dtype, count: int) -> Tensor:
    """A scale or zero beside data of a dtype."""
    return full(device, torch.float64 if dtype == torch.float64 else torch.float32, 0.1, count)


@call("bits_pack")
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    packed(ops, device)


@call("bits_unpack")
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.bits_unpack(*packed(ops, device), 4)


@call("bits_materialize")
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.bits_materialize(*packed(ops, device), 4)


@call("bits_dequantize", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    data, *sizes = packed(ops, device)
    ops.bits_dequantize(data, full(device, torch.float32, 0.1, OUT_FEATURES), *sizes, 4, dtype)


@call("bits_round")
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.bits_round(integers(device, torch.int8, 100, 7, 9), 4)


@call("bits_quantize_activations", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.bits_quantize_activations(normal(device, dtype, 3, IN_FEATURES))


@call("bits_int_linear")
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.bits_int_linear(integers(device, torch.int8, 100, 3, IN_FEATURES), *packed(ops, device), 4)


@call("bits_linear", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    data, *sizes = packed(ops, device)
    scale = full(device, torch.float32, 0.1, OUT_FEATURES)
    for activation_bits in (None, 8):
        ops.bits_linear(
            normal(device, dtype, 3, IN_FEATURES), data, scale, *sizes, 4, activation_bits=activation_bits
        )


@call("bits_fake_quantize", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.bits_fake_quantize(normal(device, dtype, 3, 70), learned(device, dtype, 3), 4, 8)


@call("bits_fake_quantize_backward", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    w = normal(device, dtype, 3, 70)
    ops.bits_fake_quantize_backward(w, w, learned(device, dtype, 3), 4, 8)


@call("bits_fake_quantize_activations", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.bits_fake_quantize_activations(normal(device, dtype, 3, 70), learned(device, dtype, 1), None, 4)


@call("bits_fake_quantize_activations_backward", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    x, one = normal(device, dtype, 3, 3000), learned(device, dtype, 1)
    ops.bits_fake_quantize_activations_backward(x, x, one, one, 4)


# ---- pconv --------------------------------------------------------------------------------------------------------


def convolution(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight."""
    return normal(device, dtype, 2, 24, 7, 7), normal(device, dtype, 6, 6, 3, 3)


@call("partial_conv2d", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.partial_conv2d(*convolution(device, dtype), padding=[1, 1])


@call("partial_conv2d_", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.partial_conv2d_(*convolution(device, dtype), padding=[1, 1])


@call("conv2d_slice", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.conv2d_slice(*convolution(device, dtype), padding=[1, 1])


@call("conv2d_slice_weight_grad", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    x, weight = convolution(device, dtype)
    ops.conv2d_slice_weight_grad(normal(device, dtype, 2, 6, 7, 7), x, weight.shape, padding=[1, 1])


@call("conv2d_pack", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.conv2d_pack(convolution(device, dtype)[1])


def mlp_weights(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """conv_weight, w1, b1, w2, b2."""
    w1, b1 = normal(device, dtype, 48, 24), normal(device, dtype, 48)
    return convolution(device, dtype)[1], w1, b1, normal(device, dtype, 24, 48), normal(device, dtype, 24)


@call("partial_mlp", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    x, _ = convolution(device, dtype)
    gates = normal(device, dtype, 2, 18), normal(device, dtype, 48), normal(device, dtype, 1)
    ops.partial_mlp(x, *mlp_weights(device, dtype), 1, *gates)


@call("partial_mlp_pack", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.partial_mlp_pack(*mlp_weights(device, dtype))


@call("channel_stats", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.channel_stats(convolution(device, dtype)[0], 6)


@call("channel_gate", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    x, _ = convolution(device, dtype)
    n = x.size(1) - 6
    ops.channel_gate(x, 6, normal(device, dtype, n, 2 * n), normal(device, dtype, n))


@call("partial_attention", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    x, _ = convolution(device, dtype)
    n = x.size(1) - 4
    qkv = normal(device, dtype, 3 * n, n), normal(device, dtype, 3 * n)
    proj = normal(device, dtype, n, n), normal(device, dtype, n)
    ops.partial_attention(x, 4, *qkv, *proj, normal(device, dtype, 2, 49, 49), 2)


# ---- rows ---------------------------------------------------------------------------------------------------------


@call("row_rms_norm", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.row_rms_norm(normal(device, dtype, 3, 70), normal(device, dtype, 70), 1e-6)


@call("row_silu_mul", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.row_silu_mul(normal(device, dtype, 3, 70), normal(device, dtype, 3, 70))


# ---- limits -------------------------------------------------------------------------------------------------------


@call("limit_read")
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.limit_read(torch.ones(4096, dtype=torch.int64, device=device))


@call("limit_math")
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    for kind in range(3):
        ops.limit_math(torch.empty(0, device=device), kind, 1)


# ---- rows ---------------------------------------------------------------------------------------------------------


@call("row_silu_mul", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.row_silu_mul(normal(device, dtype, 5, 300), normal(device, dtype, 5, 300))


@call("row_rms_norm", *FLOATS)
def _(ops: Any, device: str, dtype: torch.dtype) -> None:
    ops.row_rms_norm(normal(device, dtype, 5, 300), normal(device, dtype, 300), 1e-5)
