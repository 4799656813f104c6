"""Rows of the family `tree`: verification of draft trees, and sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Row, Workload
from tranche.tree import Accepted, Tree, reference, sample, verify_greedy, verify_sample, verify_typical

ACCEPTED = 3  # draft tokens that the walks of all rows accept
SEED, POSITION = 7, 1000
CHECKED = 4  # sequences that the fp64 reference draws for
SPREAD = 5.0  # of logits: peaked enough that plain torch's fp32 sums find the same tokens
CUTS: dict[str, dict[str, Any]] = {
    "": {},
    "top-p": {"top_p": 0.9},
    "top-k top-p": {"top_k": 50, "top_p": 0.9},
}
VOCABULARIES = {32000: "llama-2", 128256: "llama-3"}


def comb(nodes: int, batch: int, device: str) -> Tree:
    """A path of ACCEPTED + 1 nodes; all others hang from the root."""
    parents = torch.zeros(batch, nodes, dtype=torch.int32)
    parents[:, : ACCEPTED + 1] = torch.arange(-1, ACCEPTED)
    return Tree.from_parent(parents).to(device)


def expected(batch: int, nodes: int, next_token: Tensor) -> Accepted:
    path = torch.full((batch, nodes), -1, dtype=torch.int32, device=next_token.device)
    path[:, : ACCEPTED + 1] = torch.arange(ACCEPTED + 1, device=path.device)
    return Accepted(path, torch.full_like(path[:, 0], ACCEPTED), next_token)


def difference(got: Accepted, want: Accepted) -> float:
    """The share of sequences that differ."""
    same = (got.path == want.path).all(1) & (got.length == want.length) & (got.next_token == want.next_token)
    return 1.0 - float(same.double().mean())


def cut_and_draw(rows: Tensor, u: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Plain torch's way from logits [B, V], divided by the temperature, and u [B] to tokens [B]."""
    p = torch.softmax(rows.float(), dim=-1)
    if top_k > 0:
        values, ids = p.topk(top_k)
    elif top_p < 1:
        values, ids = p.sort(descending=True)
    if top_k > 0 or top_p < 1:
        values = values / values.sum(-1, keepdim=True)
        values = torch.where(values.cumsum(-1) - values < top_p, values, 0)
        p = torch.zeros_like(p).scatter_(-1, ids, values)
    cumulative = p.cumsum(-1)
    target = u[:, None].float() * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


class Walks:
    """Walks that accept ACCEPTED tokens each, over rotating logits.

    Only the visited rows have memory of their own: the rows of other nodes overlap with the next sequences'.
    """

    def __init__(
        self, batch: int, nodes: int, vocab: int, dtype: torch.dtype, device: str, buffers: int, cut: str
    ):
        self.batch, self.nodes = batch, nodes
        self.options = {"temperature": torch.full((batch,), 0.8, device=device)}
        numbers = {"top_k": (0, torch.int32), "top_p": (1.0, torch.float32)}
        self.numbers = {name: CUTS[cut].get(name, default) for name, (default, _) in numbers.items()}
        for name, (_, kind) in numbers.items():
            self.options[name] = torch.full((batch,), self.numbers[name], dtype=kind, device=device)
        self.seed = SEED + torch.arange(batch, device=device)
        self.position = torch.full((batch,), POSITION, device=device)
        visited = ACCEPTED + 1
        pool = (SPREAD * torch.randn(buffers * batch * visited + nodes, vocab, device=device)).to(dtype)
        self.logits, self.tokens, self.want = [], [], []
        self.tree = comb(nodes, batch, device)
        for i in range(buffers):
            first = i * batch * visited * vocab
            view = pool.as_strided((batch, nodes, vocab), (visited * vocab, vocab, 1), first)
            if i == 0:
                for d in range(visited):
                    self.keep_off_steps(view[:CHECKED, d], d)
            drawn = torch.stack([self.draw(view[:, d], d) for d in range(visited)], dim=1)
            if i == 0:  # what is checked holds the reference's tokens, as far as time allows
                for d in range(visited):
                    drawn[:CHECKED, d] = self.reference_draw(view[:CHECKED, d], d).to(device)
            tokens = torch.full((batch, nodes), -1, device=device)
            tokens[:, 1:visited] = drawn[:, :-1]
            self.logits.append(view)
            self.tokens.append(tokens)
            self.want.append(expected(batch, nodes, drawn[:, -1]))
        # the baselines draw with the same random numbers
        u = [[reference.uniform(SEED + b, POSITION + d) for d in range(visited)] for b in range(batch)]
        self.u = torch.tensor(u, device=device)

    def draw(self, rows: Tensor, depth: int) -> Tensor:
        return sample(rows, **self.options, seed=self.seed, position=self.position + depth)

    def keep_off_steps(self, rows: Tensor, depth: int) -> None:
        """Draws anew the rows whose tokens hang on how sums are rounded."""
        for b, row in enumerate(rows):
            u = reference.uniform(SEED + b, POSITION + depth)
            while reference.is_near_a_step(reference.probabilities(row.cpu(), 0.8, **self.numbers), u):
                row.normal_(std=SPREAD)

    def reference_draw(self, rows: Tensor, depth: int) -> Tensor:
        return reference.sample(
            rows.cpu(), temperature=0.8, **self.numbers, seed=SEED, position=POSITION + depth
        )

    def ours(self, i: int) -> Accepted:
        return verify_sample(
            self.tokens[i], self.tree, self.logits[i], **self.options, seed=self.seed, position=self.position
        )

    def batched(self, i: int) -> Accepted:
        """All sequences at once, a level at a time, as far as the longest path; no synchronisation."""
        tokens, parents = self.tokens[i], self.tree.parent
        row = torch.arange(self.batch, device=tokens.device)
        node, walking = torch.zeros_like(row), torch.ones_like(row, dtype=torch.bool)
        path = torch.full((self.batch, self.nodes), -1, dtype=torch.int32, device=tokens.device)
        path[:, 0] = 0
        length, next_token = torch.zeros_like(row), torch.zeros_like(row)
        for depth in range(ACCEPTED + 1):
            token = cut_and_draw(self.logits[i][row, node] / 0.8, self.u[:, depth], **self.numbers)
            next_token = torch.where(walking, token, next_token)
            match = (parents == node[:, None]) & (tokens == token[:, None])
            walking = walking & match.any(1)
            node = torch.where(walking, match.int().argmax(1), node)
            if depth + 1 < self.nodes:
                path[:, depth + 1] = torch.where(walking, node, -1).int()
            length = length + walking
        return Accepted(path, length.int(), next_token)

    def sequential(self, i: int) -> Accepted:
        """A loop over sequences and nodes that reads every token back, as the published codes have it."""
        results = []
        for b in range(self.batch):
            node, path = 0, [0]
            parents, tokens = self.tree.parent[b].tolist(), self.tokens[i][b].tolist()
            while True:
                u = self.u[b : b + 1, len(path) - 1]
                token = cut_and_draw(self.logits[i][b, node][None] / 0.8, u, **self.numbers).item()
                children = (c for c in range(self.nodes) if parents[c] == node and tokens[c] == token)
                child = next(children, None)
                if child is None:
                    break
                node = child
                path.append(node)
            results.append((path + [-1] * (self.nodes - len(path)), len(path) - 1, token))
        paths, lengths, next_tokens = zip(*results, strict=True)
        return Accepted(
            torch.tensor(paths, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            torch.tensor(next_tokens),
        )

    def workload(self) -> Workload:
        baselines = {"torch": self.batched}
        if not self.seed.is_cuda:  # it reads back, which no graph can hold
            baselines["python"] = self.sequential
        return Workload(self.ours, baselines, lambda got: difference(got, self.want[0]), 0.005)


class Greedy:
    """verify_greedy over a tree whose tokens are all random but the path's."""

    def __init__(self, batch: int, nodes: int, device: str):
        self.tree = comb(nodes, batch, device)
        self.target = torch.randint(1, 32000, (batch, nodes), device=device)
        self.tokens = torch.zeros_like(self.target)
        self.tokens[:, 1 : ACCEPTED + 1] = self.target[:, :ACCEPTED]
        self.paths = self.tree.paths().long()  # ready-made, as Medusa and EAGLE keep it
        self.want = expected(batch, nodes, self.target[:, ACCEPTED])

    def ours(self, i: int) -> Accepted:
        return verify_greedy(self.tokens, self.tree, self.target)

    def all_paths(self, i: int) -> Accepted:
        """Every path of the tree compared at once."""
        batch, _, length = self.paths.shape
        nodes = self.paths.clamp(min=0)
        flat = nodes.view(batch, -1)
        tokens = self.tokens.gather(1, flat).view(nodes.shape)
        target = self.target.gather(1, flat).view(nodes.shape)
        same = (tokens[:, :, 1:] == target[:, :, :-1]) & (self.paths[:, :, 1:] >= 0)
        accepted = same.int().cumprod(-1).sum(-1)
        longest, best = accepted.max(1)
        row = self.paths[torch.arange(batch, device=best.device), best]
        keep = torch.arange(length, device=row.device) <= longest[:, None]
        path = torch.full_like(self.tokens, -1, dtype=torch.int32)
        path[:, :length] = torch.where(keep, row, -1).int()
        last = row.gather(1, longest[:, None])
        return Accepted(path, longest.int(), self.target.gather(1, last)[:, 0])

    def sequential(self, i: int) -> Accepted:
        rows = []
        parents, tokens, target = self.tree.parent.tolist(), self.tokens.tolist(), self.target.tolist()
        for b in range(len(tokens)):
            path = [0]
            for node in range(1, len(tokens[b])):
                if parents[b][node] == path[-1] and tokens[b][node] == target[b][path[-1]]:
                    path.append(node)
            rows.append((path + [-1] * (len(tokens[b]) - len(path)), len(path) - 1, target[b][path[-1]]))
        paths, lengths, next_tokens = zip(*rows, strict=True)
        return Accepted(
            torch.tensor(paths, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            torch.tensor(next_tokens),
        )

    def workload(self) -> Workload:
        baselines = {"torch": self.all_paths}
        if not self.target.is_cuda:
            baselines["python"] = self.sequential
        return Workload(self.ours, baselines, lambda got: difference(got, self.want), 0.0)


class Typical:
    """verify_typical against Medusa's own form: the softmax of all rows."""

    def __init__(self, walks: Walks):
        self.walks = walks
        for i, logits in enumerate(walks.logits):
            best = logits[:, : ACCEPTED + 1].argmax(-1)
            walks.tokens[i][:, 1 : ACCEPTED + 1] = best[:, :-1]
            walks.want[i] = expected(walks.batch, walks.nodes, best[:, -1])

    def ours(self, i: int) -> Accepted:
        return verify_typical(
            self.walks.tokens[i], self.walks.tree, self.walks.logits[i], epsilon=1e-4, delta=0.09
        )

    def all_rows(self, i: int) -> Accepted:
        tokens, tree = self.walks.tokens[i], self.walks.tree
        p = torch.softmax(self.walks.logits[i].float(), dim=-1)
        entropy = torch.special.entr(p).sum(-1)
        threshold = torch.minimum(torch.tensor(1e-4, device=p.device), 0.09 * torch.exp(-entropy))
        parent = tree.parent.long().clamp(min=0)
        chance = p[torch.arange(len(p), device=p.device)[:, None], parent, tokens.clamp(min=0)]
        edge = (chance > threshold.gather(1, parent)) & (tokens >= 0)
        edge[:, 0] = True
        # a node is accepted when all its ancestors' edges are
        accepted = (~tree.dense_mask() | edge[:, None, :]).all(-1)
        best = torch.where(accepted, tree.depth, -1).argmax(1)
        row = torch.arange(len(p), device=p.device)
        on_path = tree.dense_mask()[row, best]
        length = tree.depth[row, best]
        path = torch.full((len(p), self.walks.nodes + 1), -1, dtype=torch.int32, device=p.device)
        column = torch.where(on_path, tree.depth, self.walks.nodes).long()
        path.scatter_(1, column, torch.arange(self.walks.nodes, device=p.device).int().expand_as(column))
        return Accepted(path[:, :-1], length, p[row, best].argmax(-1))

    def workload(self) -> Workload:
        return Workload(
            self.ours, {"torch": self.all_rows}, lambda got: difference(got, self.walks.want[0]), 0.0
        )


def sample_row(batch: int, nodes: int, vocab: int, cut: str, device: str, *, quick: bool = False) -> Row:
    """One shape of tree_verify_sample."""
    read = batch * (ACCEPTED + 1) * vocab
    return Row(
        op="tree_verify_sample",
        shape=f"{VOCABULARIES[vocab]} B{batch} N{nodes} V{vocab}" + (f" {cut}" if cut else ""),
        dtype="fp32",
        bytes_read=4 * read,
        operations=16 * read,
        math="fp32",
        build=lambda buffers: Walks(batch, nodes, vocab, torch.float32, device, buffers, cut).workload(),
        bars={"torch": 1.0},
        quick=quick,
    )


def greedy_row(batch: int, nodes: int, device: str, *, quick: bool = False) -> Row:
    """One shape of tree_verify_greedy."""
    return Row(
        op="tree_verify_greedy",
        shape=f"B{batch} N{nodes}",
        dtype="int64",
        bytes_read=20 * batch * nodes,
        operations=0,
        math="fp32",
        build=lambda buffers: Greedy(batch, nodes, device).workload(),
        bars={"torch": 1.0},
        quick=quick,
    )


def typical_row(batch: int, nodes: int, vocab: int, device: str) -> Row:
    """One shape of tree_verify_typical."""
    read = batch * (ACCEPTED + 1) * vocab
    return Row(
        op="tree_verify_typical",
        shape=f"{VOCABULARIES[vocab]} B{batch} N{nodes} V{vocab}",
        dtype="fp32",
        bytes_read=4 * read,
        operations=16 * read,
        math="fp32",
        build=lambda buffers: Typical(
            Walks(batch, nodes, vocab, torch.float32, device, buffers, "")
        ).workload(),
        bars={"torch": 1.0},
    )


def rows(device: str) -> list[Row]:
    """All rows for a device."""
    table = []
    for batch, nodes in ((1, 64), (8, 64), (64, 8), (64, 256)):
        table.append(greedy_row(batch, nodes, device, quick=(batch, nodes) == (8, 64)))
    for batch, nodes in ((1, 64), (8, 64), (64, 8), (64, 256)):
        for vocab in VOCABULARIES:
            table.append(sample_row(batch, nodes, vocab, "", device, quick=batch == 1))
    for cut in ("top-p", "top-k top-p"):
        for batch in (1, 8):
            table.append(sample_row(batch, 64, 128256, cut, device, quick=batch == 1 and cut == "top-p"))
    for batch in (1, 8):
        table.append(typical_row(batch, 64, 32000, device))
    return table
