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
        self,
        model: Model,
        nodes: int,
        length: int,
        batch: int,
        dtype: torch.dtype,
        device: str,
        buffers: int,
        fp8: bool = False,
    ):
        slots = length + nodes
        self.model, self.batch, self.nodes, self.length = model, batch, nodes, length
        self.group = model.heads_q // model.heads_kv
        shape = (batch, model.heads_kv, slots, model.head_dim)
        first = [torch.randn(shape, dtype=dtype, device=device) for _ in range(2)]
        self.stored = [None, None]
        if fp8:  # the torch forms, which cannot read e4m3, get the same numbers in q's dtype
            pairs = [t.to(torch.float8_e4m3fn) for t in first]
            self.stored = [[t.clone() for _ in range(buffers)] for t in pairs]
            first = [t.to(dtype) for t in pairs]
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

    def caches(self, i: int) -> tuple[Tensor, Tensor]:
        """[B, S, Hkv, D] as ours reads them."""
        k, v = ((stored or own)[i] for stored, own in zip(self.stored, (self.keys, self.values), strict=True))
        return k.transpose(1, 2), v.transpose(1, 2)

    def ours(self, i: int) -> Tensor:
        return tree_attention(self.q, *self.caches(i), self.seqlens, self.tree)

    def ours_exact(self, i: int) -> Tensor:
        return tree_attention(self.q, *self.caches(i), self.seqlens, self.tree, exact=True)

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

    def flex_when_called(self):
        """FlexAttention, compiled only if it is asked for."""
        ready: list = []

        def call(i: int) -> Tensor:
            if not ready:
                ready.append(self.flex())
            return ready[0](i)

        return call

    def baselines(self) -> dict:
        calls = {"sdpa": self.sdpa, "sdpa-expanded": self.sdpa_expanded, "packed": self.packed}
        return calls | {"flex": self.flex_when_called()}

    def workload(self, exact: bool) -> Workload:
        k, v = self.caches(0)
        if self.length * self.batch <= 16384:
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
            on_request=frozenset() if self.q.is_cuda else frozenset({"flex"}),
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
    fp8: bool = False,
    bars: dict[str, float] | None = None,
    quick: bool = False,
) -> Row:
    """One shape of tree_attention; `fp8`: over caches of e4m3."""
    slots = length + nodes
    size = 1 if fp8 else DTYPES[dtype].itemsize
    return Row(
        op="tree_attention",
        shape=f"{model.name} B{batch} N{nodes} L{length}"
        + (" exact" if exact else "")
        + (" e4m3" if fp8 else ""),
        dtype=dtype,
        bytes_read=2 * batch * slots * model.heads_kv * model.head_dim * size,
        operations=4 * batch * nodes * slots * model.heads_q * model.head_dim,
        math="fp32" if dtype == "fp32" else "bf16",
        build=lambda buffers: Attention(
            model, nodes, length, batch, DTYPES[dtype], device, buffers, fp8
        ).workload(exact),
        bars=bars or {},
        quick=quick,
    )


class Backward:
    """Gradients of q, k and v of one shape, against autograd through SDPA. The forward pass is not timed."""

    def __init__(self, model: Model, nodes: int, length: int, dtype: torch.dtype, device: str):
        forward = Attention(model, nodes, length, 1, dtype, device, 1)
        self.tree, self.seqlens, mask = forward.tree, forward.seqlens, forward.mask
        with torch.inference_mode(False), torch.enable_grad():
            q, k, v = (t.clone() for t in (forward.q, forward.keys[0], forward.values[0]))
            self.mine = [q.requires_grad_(), *(t.transpose(1, 2).requires_grad_() for t in (k, v))]
            self.out = tree_attention(*self.mine, self.seqlens.clone(), self.own_tree())
            self.theirs = [t.detach().transpose(1, 2).clone().requires_grad_() for t in self.mine]
            mask = mask.clone()
            self.other = F.scaled_dot_product_attention(*self.theirs, attn_mask=mask, enable_gqa=True)
            self.grad = torch.randn_like(self.out)
            self.grad_heads = self.grad.transpose(1, 2).contiguous()
            exact = [t.detach().double().requires_grad_() for t in self.theirs]
            wide = F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
            gradients = torch.autograd.grad(wide, exact, self.grad_heads.double())
            self.expected = [t.transpose(1, 2) for t in gradients]

    def own_tree(self) -> Tree:
        """The tree outside inference mode, where autograd may keep it."""
        t = self.tree
        return Tree(t.parent.clone(), t.n_nodes.clone(), t.depth.clone(), t.ancestors.clone())

    def ours(self, i: int) -> list[Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            return list(torch.autograd.grad(self.out, self.mine, self.grad, retain_graph=True))

    def sdpa(self, i: int) -> list[Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            return list(torch.autograd.grad(self.other, self.theirs, self.grad_heads, retain_graph=True))

    def workload(self) -> Workload:
        def error(gradients: list[Tensor]) -> float:
            pairs = zip(gradients, self.expected, strict=True)
            return max(float((got.double() - want).abs().max() / want.abs().max()) for got, want in pairs)

        return Workload(
            ours=self.ours,
            baselines={"sdpa": self.sdpa},
            error=error,
            tolerance=4 * torch.finfo(self.grad.dtype).eps,
            layouts={"sdpa": lambda gradients: [t.transpose(1, 2) for t in gradients]},
        )


def backward_row(model: Model, nodes: int, length: int, dtype: str, device: str) -> Row:
    """One shape of tree_attention's backward pass."""
    slots = length + nodes
    return Row(
        op="tree_attention_backward",
        shape=f"{model.name} B1 N{nodes} L{length}",
        dtype=dtype,
        bytes_read=4 * slots * model.heads_kv * model.head_dim * DTYPES[dtype].itemsize,
        operations=10 * nodes * slots * model.heads_q * model.head_dim,
        math="fp32" if dtype == "fp32" else "bf16",
        build=lambda buffers: Backward(model, nodes, length, DTYPES[dtype], device).workload(),
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
    for model in (LLAMA_70B, VICUNA_7B, QWEN_8B):  # 8, 1 and 4 query heads to a kv head
        table.append(attention_row(model, 60, 2048, "bf16", device))
    for nodes in (1, 8, 16, 256):
        table.append(attention_row(LLAMA_8B, nodes, 2048, "bf16", device, quick=nodes == 1))
    table.append(attention_row(LLAMA_8B, 60, 512, "bf16", device))
    for length in (2048, 16384):
        table.append(attention_row(LLAMA_8B, 60, length, "bf16", device, fp8=True))
    table.append(attention_row(LLAMA_8B, 60, 2048, "fp16", device))
    table.append(attention_row(LLAMA_8B, 60, 2048, "bf16", device, batch=8))
    if device == "cuda":  # on a CPU the baselines take minutes
        for batch, length in ((1, 131072), (8, 16384), (64, 2048)):
            for nodes in (1, 16, 60, 256):
                table.append(attention_row(LLAMA_8B, nodes, length, "bf16", device, batch=batch))
            table.append(attention_row(LLAMA_8B, 60, length, "bf16", device, batch=batch, fp8=True))
    for length in (512, 2048):
        table.append(backward_row(LLAMA_8B, 60, length, "bf16", device))
    return table + tree_growth.rows(device) + tree_verify.rows(device)
