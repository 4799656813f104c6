"""Rows of the family `tree`: attention of a draft tree over a long cache; tree_growth.py has the other ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import tree_growth, tree_verify
from benchmarks.harness import Row, Workload
from tranche.tree import Tree, reference, tree_attention

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Model:
    """The attention of one model."""

    name: str
    heads_q: int
    heads_kv: int
    head_dim: int = 128


LLAMA_8B = Model("llama-3-8b", 32, 8)
LLAMA_70B = Model("llama-3-70b", 64, 8)
VICUNA_7B = Model("vicuna-7b", 32, 32)
QWEN_8B = Model("qwen3-8b", 32, 8)


def draft_tree(nodes: int, batch: int, device: str) -> Tree:
    """A random tree; its shape does not change what any of the compared functions do."""
    draw = torch.rand(nodes, generator=torch.Generator().manual_seed(0))
    parents = (draw * torch.arange(nodes)).int()
    parents[0] = -1
    return Tree.from_parent(parents.expand(batch, nodes).contiguous()).to(device)


class Attention:
    """Tree attention of one shape over rotating caches, and the same in other libraries' words.

    Caches are kept as transformers keeps them, [B, Hkv, S, D]: torch's functions read them as they are, and ours
    through a transposed view.
    """

    def __init__(
        self, model: Model, nodes: int, length: int, batch: int, dtype: torch.dtype, device: str, buffers: int
    ):
        slots = length + nodes
        self.model, self.batch, self.nodes, self.length = model, batch, nodes, length
        self.group = model.heads_q // model.heads_kv
        shape = (batch, model.heads_kv, slots, model.head_dim)
        first = [torch.randn(shape, dtype=dtype, device=device) for _ in range(2)]
        self.keys = [first[0].clone() for _ in range(buffers)]
        self.values = [first[1].clone() for _ in range(buffers)]
        # expanded in advance, so that the form that needs it is not charged for making it
        expanded = -(-buffers // self.group)
        self.expanded_keys = [t.repeat_interleave(self.group, dim=1) for t in self.keys[:expanded]]
        self.expanded_values = [t.repeat_interleave(self.group, dim=1) for t in self.values[:expanded]]
        self.q = torch.randn(batch, nodes, model.heads_q, model.head_dim, dtype=dtype, device=device)
        self.tree = draft_tree(nodes, batch, device)
        self.seqlens = torch.full((batch,), length, dtype=torch.int32, device=device)
        # the torch forms get their mask ready-made
        prefix = torch.ones(batch, nodes, length, dtype=torch.bool, device=device)
        self.mask = torch.cat([prefix, self.tree.dense_mask()], dim=2)[:, None]
        self.heads_first = self.q.transpose(1, 2).contiguous()
        packed = self.heads_first.view(batch, model.heads_kv, self.group * nodes, model.head_dim)
        self.packed_q = packed * model.head_dim**-0.5
        self.packed_mask = ~self.mask.expand(batch, self.group, nodes, slots).reshape(batch, 1, -1, slots)

    def ours(self, i: int) -> Tensor:
        return tree_attention(
            self.q, self.keys[i].transpose(1, 2), self.values[i].transpose(1, 2), self.seqlens, self.tree
        )

    def ours_exact(self, i: int) -> Tensor:
        k, v = self.keys[i].transpose(1, 2), self.values[i].transpose(1, 2)
        return tree_attention(self.q, k, v, self.seqlens, self.tree, exact=True)

    def sdpa(self, i: int) -> Tensor:
        return F.scaled_dot_product_attention(
            self.heads_first, self.keys[i], self.values[i], attn_mask=self.mask, enable_gqa=True
        )

    def sdpa_expanded(self, i: int) -> Tensor:
        k, v = (pool[i % len(pool)] for pool in (self.expanded_keys, self.expanded_values))
        return F.scaled_dot_product_attention(self.heads_first, k, v, attn_mask=self.mask)

    def packed(self, i: int) -> Tensor:
        scores = self.packed_q @ self.keys[i].transpose(-1, -2)
        return torch.softmax(scores.masked_fill_(self.packed_mask, -torch.inf), dim=-1) @ self.values[i]

    def flex(self):
        """FlexAttention, compiled, with its block mask ready-made."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        ancestors, length = self.tree.dense_mask(), self.length

        def mask_mod(b, h, row, slot):
            node = (slot - length).clamp(min=0)
            return (slot < length) | ancestors[b, row, node]

        slots = self.length + self.nodes
        block_mask = create_block_mask(mask_mod, self.batch, None, self.nodes, slots, device=self.q.device)
        compiled = torch.compile(flex_attention)
        return lambda i: compiled(
            self.heads_first, self.keys[i], self.values[i], block_mask=block_mask, enable_gqa=self.group > 1
        )

    def baselines(self) -> dict:
        calls = {"sdpa": self.sdpa, "sdpa-expanded": self.sdpa_expanded, "packed": self.packed}
        if self.q.is_cuda:
            calls["flex"] = self.flex()
        return calls

    def workload(self, exact: bool) -> Workload:
        k, v = self.keys[0].transpose(1, 2), self.values[0].transpose(1, 2)
        if self.length * self.batch <= 65536:
            expected = reference.tree_attention(self.q, k, v, self.seqlens, self.tree)
        else:  # fp64 at this size takes minutes; fp32 is right to 1e-6
            expected = reference.tree_attention(
                self.q, k, v, self.seqlens, self.tree, compute_dtype=torch.float32
            )
        heads_first = {"sdpa", "sdpa-expanded", "flex"}

        def from_packed(out: Tensor) -> Tensor:
            return out.view(self.batch, self.model.heads_q, self.nodes, self.model.head_dim).transpose(1, 2)

        return Workload(
            ours=self.ours_exact if exact else self.ours,
            baselines=self.baselines(),
            error=lambda out: float((out.double() - expected).abs().max()),
            tolerance=4 * torch.finfo(self.q.dtype).eps,
            layouts={"packed": from_packed}
            | {name: (lambda out: out.transpose(1, 2)) for name in heads_first},
        )


def attention_row(
    model: Model,
    nodes: int,
    length: int,
    dtype: str,
    device: str,
    *,
    batch: int = 1,
    exact: bool = False,
    bars: dict[str, float] | None = None,
    quick: bool = False,
) -> Row:
    """One shape of tree_attention."""
    slots = length + nodes
    size = DTYPES[dtype].itemsize
    return Row(
        op="tree_attention",
        shape=f"{model.name} B{batch} N{nodes} L{length}" + (" exact" if exact else ""),
        dtype=dtype,
        bytes_read=2 * batch * slots * model.heads_kv * model.head_dim * size,
        operations=4 * batch * nodes * slots * model.heads_q * model.head_dim,
        math="fp32" if dtype == "fp32" else "bf16",
        build=lambda buffers: Attention(model, nodes, length, batch, DTYPES[dtype], device, buffers).workload(
            exact
        ),
        bars=bars or {},
        quick=quick,
    )


def rows(device: str) -> list[Row]:
    """All rows for a device."""
    cpu_bf16 = {"sdpa": 4.0, "packed": 1.5} if device == "cpu" else {}
    cpu_fp32 = {"sdpa": 2.2} if device == "cpu" else {}
    table = []
    for length in (2048, 16384):
        table.append(attention_row(LLAMA_8B, 60, length, "bf16", device, bars=cpu_bf16, quick=True))
        table.append(attention_row(LLAMA_8B, 60, length, "fp32", device, bars=cpu_fp32, quick=length == 2048))
        table.append(attention_row(LLAMA_8B, 60, length, "bf16", device, exact=True))
    for model in (LLAMA_70B, VICUNA_7B, QWEN_8B):
        table.append(attention_row(model, 60, 2048, "bf16", device))
    for nodes in (1, 8, 16, 256):
        table.append(attention_row(LLAMA_8B, nodes, 2048, "bf16", device, quick=nodes == 1))
    table.append(attention_row(LLAMA_8B, 60, 2048, "fp16", device))
    table.append(attention_row(LLAMA_8B, 60, 2048, "bf16", device, batch=8))
    return table + tree_growth.rows(device) + tree_verify.rows(device)
