"""Rows of the family `moe`: the draft head, and sparse layers at few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, Workload
from tranche.bits import PackedWeight, dequantize
from tranche.moe import draft_moe, fused_experts, pack_experts, reference, route

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Layer:
    """The sizes of one sparse layer."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int


MIXTRAL = Layer("mixtral-like", 8, 2, 2048, 3584)
QWEN = Layer("qwen3-30b", 64, 8, 2048, 768)
DEEPSEEK = Layer("deepseek-v2", 160, 6, 2048, 512)


class Head:
    """The draft head of one size over rotating weights, with both outputs."""

    def __init__(self, hidden: int, tokens: int, dtype: torch.dtype, device: str, buffers: int):
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=device) * shape[-1] ** -0.5

        self.x = torch.randn(tokens, hidden, dtype=dtype, device=device)
        self.residual = torch.randn_like(self.x)
        self.router = draw(4, hidden)
        first = [draw(2, hidden, hidden) for _ in range(3)]
        # gate and up of both experts are one matrix, and the folded form's down one more: [Wd0 | Wd1]
        self.gate_up = [torch.cat(first[:2], 1).clone() for _ in range(buffers)]
        self.down = [first[2].clone() for _ in range(buffers)]
        self.folded_down = [first[2].transpose(0, 1).reshape(hidden, -1).clone() for _ in range(buffers)]
        self.hidden = hidden

    def ours(self, i: int) -> tuple[Tensor, Tensor]:
        gate, up = self.gate_up[i].chunk(2, 1)
        return draft_moe(self.x, self.router, gate, up, self.down[i], contrast=True, residual=self.residual)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(self.x, self.router)
        a, b = logits[:, :2].softmax(-1), logits[:, 2:].softmax(-1)
        return a, b, torch.where(logits[:, 2:3] > logits[:, 3:], 1.0, -1.0).to(self.x.dtype)

    def eager(self, i: int) -> tuple[Tensor, Tensor]:
        a, b, sign = self.coefficients()
        yields = []
        for e in range(2):
            gate, up = self.gate_up[i][e].chunk(2, 0)
            h = F.silu(F.linear(self.x, gate)) * F.linear(self.x, up)
            yields.append(F.linear(h, self.down[i][e]))
        first = a[:, :1] * yields[0] + a[:, 1:] * yields[1]
        second = sign * (b[:, :1] * yields[0] - b[:, 1:] * yields[1])
        return first + self.residual, second + self.residual

    def folded(self, i: int) -> tuple[Tensor, Tensor]:
        return self.folded_form(self.gate_up[i], self.folded_down[i])

    def compiled(self) -> Callable[[int], tuple[Tensor, Tensor]]:
        form = torch.compile(self.folded_form)  # of tensors: an index would be compiled for each value
        return lambda i: form(self.gate_up[i], self.folded_down[i])

    def folded_form(self, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        a, b, sign = self.coefficients()
        tokens = self.x.shape[0]
        both = F.linear(self.x, gate_up.view(-1, self.hidden)).view(tokens, 2, 2, self.hidden)
        h = F.silu(both[:, :, 0]) * both[:, :, 1]
        contrast = sign * b * torch.tensor([1.0, -1.0], dtype=b.dtype, device=b.device)
        rows = torch.cat([a[:, :, None] * h, contrast[:, :, None] * h]).view(2 * tokens, -1)
        first, second = F.linear(rows, down).chunk(2)
        return first + self.residual, second + self.residual

    def workload(self) -> Workload:
        gate, up = self.gate_up[0].chunk(2, 1)
        expected = reference.draft_moe(
            self.x, self.router, gate, up, self.down[0],
            contrast=True, residual=self.residual, compute_dtype=torch.float32,
        )  # fmt: skip
        logits = self.x.double() @ self.router.double().T
        clear = (logits[:, 2] - logits[:, 3]).abs() > 0.05  # elsewhere rounding decides the sign

        def error(got: tuple[Tensor, Tensor]) -> float:
            pairs = zip(got, expected, strict=True)
            return max(
                float((a[clear].double() - b[clear]).abs().amax()) if clear.any() else 0.0 for a, b in pairs
            )

        return Workload(
            ours=self.ours,
            baselines={"eager": self.eager, "folded": self.folded, "compile": self.compiled()},
            error=error,
            tolerance=max(8 * torch.finfo(self.x.dtype).eps, 1e-5),
        )


class Sparse:
    """A sparse layer, router included. Tokens rotate, and with them the experts, which no cache holds all."""

    def __init__(self, layer: Layer, tokens: int, dtype: torch.dtype, device: str, buffers: int):
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=device) * shape[-1] ** -0.5

        self.layer = layer
        self.x = [torch.randn(tokens, layer.hidden, dtype=dtype, device=device) for _ in range(buffers)]
        self.router = draw(layer.experts, layer.hidden)
        self.gate_up = draw(layer.experts, 2 * layer.inner, layer.hidden)
        self.down = draw(layer.experts, layer.hidden, layer.inner)

    def ours(self, i: int) -> Tensor:
        gate, up = self.gate_up.chunk(2, 1)
        weights, ids = route(self.x[i], self.router, self.layer.top_k)
        return fused_experts(self.x[i], gate, up, self.down, weights, ids)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = F.linear(x, self.router).float().softmax(-1).topk(self.layer.top_k)
        return weights / weights.sum(-1, keepdim=True), ids

    def eager(self, i: int) -> Tensor:
        """A loop over the experts with tokens."""
        x = self.x[i]
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, choice = (ids == e).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], self.gate_up[e]).chunk(2, -1)
            yields = F.linear(F.silu(gate) * up, self.down[e])
            out.index_add_(0, token, (yields * weights[token, choice, None]).to(out.dtype))
        return out

    def batched(self, i: int) -> Tensor:
        """The batched form of transformers: each choice's weights gathered, three batched products."""
        x, top_k = self.x[i], self.layer.top_k
        weights, ids = self.choose(x)
        repeated = x.repeat_interleave(top_k, 0)[..., None]
        gate, up = torch.bmm(self.gate_up[ids.flatten()], repeated).chunk(2, 1)
        yields = torch.bmm(self.down[ids.flatten()], F.silu(gate) * up).view(len(x), top_k, -1)
        return (yields * weights[..., None]).sum(1).to(x.dtype)

    def grouped(self, i: int) -> Tensor:
        return self.grouped_form(self.x[i])

    def compiled(self) -> Callable[[int], Tensor]:
        form = torch.compile(self.grouped_form)
        return lambda i: form(self.x[i])

    def grouped_form(self, x: Tensor) -> Tensor:
        """torch's grouped matmul over tokens sorted by expert."""
        weights, ids = self.choose(x)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = torch.zeros(self.layer.experts, dtype=torch.int32, device=flat.device)
        offsets = counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0).int()
        token = order // self.layer.top_k
        gate_up = torch._grouped_mm(x[token], self.gate_up.transpose(1, 2), offs=offsets)
        gate, up = gate_up.chunk(2, -1)
        yields = torch._grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=offsets)
        weighted = yields * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, token, weighted.to(x.dtype))

    def workload(self) -> Workload:
        gate, up = self.gate_up.chunk(2, 1)
        x, top_k = self.x[0], self.layer.top_k
        some = slice(0, 16)  # of the tokens are checked: in fp32 all experts would not fit
        # ours may choose another expert than torch where rounding decides; the reference takes our choice
        weights, ids = route(x[some], self.router, top_k)
        chosen = ids.unique()
        place = torch.searchsorted(chosen, ids).int()
        matrices = (gate[chosen], up[chosen], self.down[chosen])
        expected = reference.fused_experts(x[some], *matrices, weights, place, compute_dtype=torch.float32)
        _, torch_ids = self.choose(x[some])
        same = (ids.sort(-1).values == torch_ids.sort(-1).values).all(-1)

        def error(got: Tensor) -> float:
            return float((got[some][same].double() - expected[same]).abs().amax()) if same.any() else 0.0

        baselines: dict[str, Callable[[int], Tensor]] = {}
        if not x.is_cuda:
            baselines["eager"] = self.eager  # its host sync forbids a graph
        if x.dtype == torch.bfloat16:
            baselines["grouped_mm"] = self.grouped
            baselines["compile"] = self.compiled()
        if len(x) * top_k <= self.layer.experts:  # with more it would copy more than there is
            baselines["batched"] = self.batched
        return Workload(
            ours=self.ours,
            baselines=baselines,
            error=error,
            tolerance=max(8 * torch.finfo(x.dtype).eps, 1e-5),
        )


class PackedSparse:
    """A sparse layer of packed experts at one precision; its baselines have the weights that this stands for.

    There are as many copies as no cache holds, which rotate with the tokens.
    """

    COPIES_OF_DENSE, COPIES_OF_PACKED = 2, 4

    def __init__(self, layer: Layer, tokens: int, bits: int, dtype: torch.dtype, device: str, buffers: int):
        self.dense = [Sparse(layer, tokens, dtype, device, buffers)]
        first = self.dense[0]
        self.bits, self.x, self.router, self.top_k = bits, first.x, first.router, layer.top_k
        stacks = [pack_experts(w) for w in (*first.gate_up.chunk(2, 1), first.down)]
        gate, up, down = (
            torch.stack(
                [dequantize(s.expert(e), s.scale[e], bits, dtype=dtype) for e in range(layer.experts)]
            )
            for s in stacks
        )
        first.gate_up, first.down = torch.cat([gate, up], 1), down
        for _ in range(1, self.COPIES_OF_DENSE):
            copy = Sparse.__new__(Sparse)
            copy.__dict__.update(first.__dict__, gate_up=first.gate_up.clone(), down=down.clone())
            self.dense.append(copy)
        self.packed = [
            [replace(s, data=s.data.clone()) for s in stacks] for _ in range(self.COPIES_OF_PACKED)
        ]

    def ours(self, i: int) -> Tensor:
        weights, ids = route(self.x[i], self.router, self.top_k)
        stacks = self.packed[i % len(self.packed)]
        return fused_experts(self.x[i], *stacks, weights, ids, bits=self.bits)

    def workload(self) -> Workload:
        workload = self.dense[0].workload()

        def over_copies(name: str) -> Callable[[int], Tensor]:
            calls = [getattr(layer, name) for layer in self.dense]
            return lambda i: calls[i % len(calls)](i)

        names = {"bf16": "ours", "eager": "eager", "grouped_mm": "grouped"}
        if "eager" not in workload.baselines:
            names.pop("eager")
        baselines = {name: over_copies(method) for name, method in names.items()}
        return replace(workload, ours=self.ours, baselines=baselines)


def head_row(
    hidden: int,
    tokens: int,
    dtype: str,
    device: str,
    bars: dict[str, float] | None = None,
    least_percent: float | None = None,
    quick: bool = False,
) -> Row:
    """One shape of draft_moe with both outputs."""
    parameters = 6 * hidden * hidden
    return Row(
        op="moe_draft",
        shape=f"jakiro H{hidden} T{tokens}",
        dtype=dtype,
        bytes_read=parameters * DTYPES[dtype].itemsize,
        operations=2 * parameters * tokens,
        math="fp32" if dtype == "fp32" else "bf16",
        build=lambda buffers: Head(hidden, tokens, DTYPES[dtype], device, buffers).workload(),
        bars=bars or {},
        least_percent=least_percent,
        quick=quick,
    )


def sparse_row(layer: Layer, tokens: int, dtype: str, device: str, quick: bool = False) -> Row:
    """One shape of route and fused_experts; its bytes are those of the experts that random tokens touch."""
    touched = layer.experts * (1 - (1 - layer.top_k / layer.experts) ** tokens)
    parameters = 3 * layer.hidden * layer.inner
    return Row(
        op="moe_experts",
        shape=f"{layer.name} E{layer.experts} K{layer.top_k} T{tokens}",
        dtype=dtype,
        bytes_read=int(touched * parameters * DTYPES[dtype].itemsize),
        operations=2 * parameters * layer.top_k * tokens,
        math="fp32" if dtype == "fp32" else "bf16",
        build=lambda buffers: Sparse(layer, tokens, DTYPES[dtype], device, buffers).workload(),
        quick=quick,
    )


def packed_row(layer: Layer, tokens: int, bits: int, dtype: str, device: str) -> Row:
    """One shape of route and fused_experts over packed experts."""
    touched = layer.experts * (1 - (1 - layer.top_k / layer.experts) ** tokens)
    parameters = 3 * layer.hidden * layer.inner
    read = PackedWeight(torch.empty(parameters, dtype=torch.uint8, device="meta"), 0, 0).bytes_read(bits)
    return Row(
        op="moe_experts",
        shape=f"{layer.name} E{layer.experts} K{layer.top_k} T{tokens} {bits}bit",
        dtype=dtype,
        bytes_read=int(touched * (read + 4 * (layer.hidden + 2 * layer.inner))),
        operations=2 * parameters * layer.top_k * tokens,
        math="bf16",
        build=lambda buffers: PackedSparse(layer, tokens, bits, DTYPES[dtype], device, buffers).workload(),
    )


def rows(device: str) -> list[Row]:
    """All rows for a device."""
    cpu = device == "cpu"
    table = []
    sizes = (2048, 4096) if cpu else (2048, 4096, 5120, 8192)
    for hidden in sizes:
        for tokens in (1, 10, 60, 256):
            few, bf16_bar = tokens <= 10, 1.6 if tokens <= 10 else 1.15
            bars = {"eager": bf16_bar, "folded": bf16_bar} if cpu and tokens <= 60 else {}
            least = 80.0 if cpu and few else None
            table.append(head_row(hidden, tokens, "bf16", device, bars, least, quick=hidden == 2048 and few))
        fp32_bars = {"eager": 2.0, "folded": 2.0} if cpu else {}
        table.append(head_row(hidden, 60, "fp32", device, fp32_bars, quick=False))
    for layer in (MIXTRAL, QWEN, DEEPSEEK):
        for tokens in (1, 10, 64, 256):
            table.append(sparse_row(layer, tokens, "bf16", device, quick=layer is QWEN and tokens == 10))
    for tokens in (1, 10):
        for bits in (8, 4):
            table.append(packed_row(QWEN, tokens, bits, "bf16", device))
    return table
