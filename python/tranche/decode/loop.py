"""The loop of `generate`: prefill, then draft, verify and commit until every sequence has ended."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tranche.decode import target
from tranche.decode.drafter import Context, Drafter
from tranche.decode.pace import Clock, Pace
from tranche.decode.settings import Settings
from tranche.decode.statistics import Guarantee, Statistics
from tranche.tree import Accepted, Tree, sample, verify_sample
from tranche.tree.transformers import TreeCache

_CHUNK = 512  # prompt tokens of a pass
_CHECK_EVERY = 4  # steps between two reads of "all ended?" where a read waits for the device


class Loop:
    """One call of `generate`. Counts live on the device; the host reads them at checks only."""

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter | None,
        settings: Settings,
        pace: Pace | None,
        exact: bool,
    ):
        self._model, self._drafter, self._settings, self._pace, self._exact = (
            model,
            drafter,
            settings,
            pace,
            exact,
        )
        device = settings.tokens.device
        batch = settings.tokens.size(0)
        self._on_host = device.type == "cpu"
        self._cache = TreeCache(model, batch, settings.capacity)
        self._tokens = settings.tokens
        self._active = torch.ones(batch, dtype=torch.bool, device=device)
        # a sequence's length once it has ended; until then the most it can get
        self._end = settings.lengths + settings.max_new_tokens
        self._roots = Tree.chain(1, batch, device).parent
        self._column = torch.arange(settings.tree_size, device=device)
        self._vocabulary = target.vocabulary(model)
        self._context: Context | None = None
        self._error: str | None = None

        self._clock = Clock(device)
        self._marks: list[tuple[int, list]] = []
        self._seconds = {"prefill": 0.0, "draft": 0.0, "verify": 0.0, "bookkeeping": 0.0}
        self._prefill_passes = self._steps = self._nodes = 0
        self._made = 0
        # passes by how many nodes they committed
        self._committed = torch.zeros(settings.tree_size + 1, dtype=torch.int64, device=device)
        # by node, how often it was accepted and how often it stood in a tree, since the last check
        self._worth = torch.zeros(2, settings.tree_size, device=device)

    def run(self) -> Iterator[int]:
        """Decode; yields, at each check, how many new tokens there are."""
        start = self._clock.now()
        self._prefill()
        prefilled = self._clock.now()
        running = self._check()
        self._seconds["prefill"] = Clock.seconds(start, prefilled)
        yield self._made
        while running:
            for _ in range(1 if self._on_host else _CHECK_EVERY):
                self._step()
            running = self._check()
            yield self._made

    # ---- the target's passes ------------------------------------------------------------------------------------

    def _prefill(self) -> None:
        lengths = self._settings.lengths
        batch = lengths.size(0)
        for start in range(0, self._settings.longest, _CHUNK):
            nodes = min(_CHUNK, self._settings.longest - start)
            counts = (lengths - start).clamp(0, nodes)
            tokens = self._tokens[:, start : start + nodes].contiguous()
            column = torch.arange(nodes, dtype=torch.int32, device=tokens.device)
            tree = Tree.from_parent((column - 1).repeat(batch, 1), counts)
            hidden = target.forward(self._model, self._cache, tokens, tree, exact=self._exact)
            self._prefill_passes += 1
            self._cache.seqlens += counts
            # where the prompt ends in this chunk, the token after it is the target's
            last = (counts - 1).clamp(min=0).long()[:, None, None].expand(-1, 1, hidden.size(2))
            logits = target.logits_of(self._model, hidden.gather(1, last))[:, 0]
            drawn = sample(logits, **self._sampling(), position=lengths.long())
            here = (counts > 0) & (self._cache.seqlens == lengths)
            place = lengths.long()[:, None]
            known = self._tokens.gather(1, place)
            self._tokens.scatter_(1, place, torch.where(here[:, None], drawn[:, None], known))
            following = self._tokens.gather(1, self._cache.seqlens.long()[:, None])[:, 0]
            path = torch.where(column < counts[:, None], column, -1)
            accepted = Accepted(path, (counts - 1).clamp(min=0), following)
            self._observe(accepted, tree, tokens, hidden, None, counts)
        root = self._tokens.gather(1, lengths.long()[:, None])
        ended = torch.isin(root[:, 0], self._settings.end_tokens)
        self._end = torch.where(ended, lengths + 1, self._end)
        self._active = lengths + 1 < self._end

    def _step(self) -> None:
        asked = self._size()
        times = [self._clock.now()]
        tree, tokens = self._propose(asked)
        times.append(self._clock.now())
        hidden = target.forward(self._model, self._cache, tokens, tree, exact=self._exact)
        logits = target.logits_of(self._model, hidden)
        position = self._cache.seqlens.long() + 1
        accepted = verify_sample(tokens, tree, logits, **self._sampling(), position=position)
        times.append(self._clock.now())
        committed = self._commit(tokens, accepted, asked)
        times.append(self._clock.now())
        self._observe(accepted, tree, tokens, hidden, logits, committed)
        times.append(self._clock.now())
        self._marks.append((asked, times))
        self._steps += 1
        self._nodes += tokens.size(1)

    def _size(self) -> int:
        if self._drafter is None:
            return 1
        return self._settings.tree_size if self._pace is None else self._pace.size()

    def _sampling(self) -> dict[str, Tensor]:
        settings = self._settings
        return {
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "seed": settings.seed,
        }

    # ---- the drafter --------------------------------------------------------------------------------------------

    def _propose(self, size: int) -> tuple[Tree, Tensor]:
        """The drafter's trees in order: no larger than asked, empty for sequences that have ended."""
        root = self._tokens.gather(1, self._cache.seqlens.long()[:, None])
        alone = Tree.from_parent(self._roots, self._active.to(torch.int32)), root
        if self._drafter is None or size == 1:
            return alone
        assert self._context is not None
        self._context.tree_size = size
        try:
            proposal = self._drafter.propose(self._context)
            if proposal is None or proposal[1].size(1) == 0:
                return alone
            tree, tokens = proposal
            parent, tokens = tree.parent[:, :size], tokens[:, :size]
            if parent.shape != tokens.shape or tokens.size(0) != root.size(0) or tokens.dtype != torch.int64:
                raise ValueError(
                    f"tranche.generate: expected a tree and tokens int64 of one shape [{root.size(0)}, N], got "
                    f"{list(parent.shape)} and {tokens.dtype} {list(tokens.shape)}. Correct propose()."
                )
            n_nodes = tree.n_nodes.clamp(1, tokens.size(1)) * self._active
            if self._on_host:  # nodes that no tree has would be computed for nothing
                used = max(1, int(n_nodes.max()))
                parent, tokens = parent[:, :used], tokens[:, :used]
            made = Tree.from_parent(parent.contiguous(), n_nodes.to(torch.int32))
            return made, torch.cat([root, tokens[:, 1:].clamp(0, self._vocabulary - 1)], 1)
        except Exception as error:
            self._dismiss(error)
            return alone

    def _observe(
        self,
        accepted: Accepted,
        tree: Tree,
        tokens: Tensor,
        hidden: Tensor,
        logits: Tensor | None,
        committed: Tensor,
    ) -> None:
        if self._drafter is None:
            return
        settings = self._settings
        self._context = Context(
            model=self._model,
            cache=self._cache,
            tokens=self._tokens,
            active=self._active,
            tree_size=settings.tree_size,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed,
            exact=self._exact,
            tree=tree,
            node_tokens=tokens,
            node_hidden=hidden,
            logits=logits,
            path=accepted.path,
            committed=committed,
        )
        try:
            self._drafter.observe(self._context, accepted)
        except Exception as error:
            self._dismiss(error)

    def _dismiss(self, error: Exception) -> None:
        name = type(self._drafter).__name__
        self._error = f"{name} raised {type(error).__name__}: {error}"
        self._drafter = None
        warnings.warn(f"tranche.generate goes on without its drafter. {self._error}", stacklevel=2)

    # ---- bookkeeping --------------------------------------------------------------------------------------------

    def _commit(self, tokens: Tensor, accepted: Accepted, asked: int) -> Tensor:
        """Keep the accepted paths: cache, text, ends. Returns how many nodes each sequence committed, int32 [B]."""
        before = self._cache.seqlens.clone()
        self._cache.commit_(accepted)
        committed = self._cache.seqlens - before
        nodes = tokens.size(1)
        column = self._column[:nodes]

        # what the pass added: the path's tokens without the root, then the target's own
        path = accepted.path.clamp(min=0).long()
        last = (committed - 1)[:, None]
        added = torch.where(
            column == last, accepted.next_token[:, None], tokens.gather(1, path).roll(-1, dims=1)
        )
        place = before[:, None] + 1 + column
        is_new = column <= last
        self._tokens.scatter_(1, torch.where(is_new, place, self._tokens.size(1) - 1), added)
        if self._settings.end_tokens.numel():
            ends = is_new & torch.isin(added, self._settings.end_tokens)
            end = torch.where(ends, place + 1, self._end[:, None]).amin(1)
            self._end = torch.minimum(self._end, end.to(torch.int32))

        if self._pace is not None:
            self._worth[0].index_add_(0, path.flatten(), is_new.flatten().to(self._worth.dtype))
            self._worth[1, :asked] += self._active.sum()
        self._committed.index_add_(0, committed, torch.ones_like(committed, dtype=torch.int64))
        self._active = self._active & (self._cache.seqlens + 1 < self._end)
        return committed

    def _check(self) -> bool:
        """Read the counts; whether a sequence is still under way."""
        made = (torch.minimum(self._cache.seqlens + 1, self._end) - self._settings.lengths).sum()
        self._made, running = torch.stack([made, self._active.any()]).tolist()
        if self._pace is not None:
            accepted, tried = self._worth.tolist()
            self._pace.earned(accepted, tried)
            self._worth.zero_()
        for asked, (start, drafted, verified, kept, end) in self._marks:
            draft = Clock.seconds(start, drafted) + Clock.seconds(kept, end)
            verify, bookkeeping = Clock.seconds(drafted, verified), Clock.seconds(verified, kept)
            self._seconds["draft"] += draft
            self._seconds["verify"] += verify
            self._seconds["bookkeeping"] += bookkeeping
            if self._pace is not None and self._drafter is not None:
                self._pace.timed(asked, draft + verify + bookkeeping)
        self._marks.clear()
        return bool(running)

    # ---- what came of it ----------------------------------------------------------------------------------------

    def new_tokens(self, row: int) -> Tensor:
        """A sequence's new tokens so far, int64 [n]; n is as of the last check for a single sequence."""
        first = int(self._settings.lengths[row])
        last = min(int(self._cache.seqlens[row]) + 1, int(self._end[row]))
        return self._tokens[row, first:last]

    def sequences(self, input_ids: Tensor) -> Tensor:
        """The prompts as given, and behind them the new tokens, padded."""
        counts = self._end - self._settings.lengths
        column = torch.arange(int(counts.max()), device=input_ids.device)
        place = self._settings.lengths[:, None] + column
        new = self._tokens.gather(1, place.long())
        return torch.cat([input_ids, torch.where(column < counts[:, None], new, self._settings.padding)], 1)

    def statistics(self, seconds: float, guarantee: tuple[Guarantee, str]) -> Statistics:
        """How it went, in `seconds` altogether."""
        batch = self._tokens.size(0)
        by_length = self._committed.tolist()[1:]  # ended sequences commit none
        passes = sum(by_length)
        per_pass = (self._made - batch) / passes if passes else 0.0
        return Statistics(
            guarantee=guarantee[0],
            reason=guarantee[1],
            new_tokens=self._made,
            target_passes=self._prefill_passes + self._steps,
            tokens_per_pass=per_pass,
            mean_accepted=per_pass - 1 if passes else 0.0,
            accepted_lengths=tuple(by_length),
            tokens_per_second=self._made / seconds,
            seconds=dict(self._seconds),
            mean_tree_size=self._nodes / self._steps if self._steps else 0.0,
            drafter_error=self._error,
        )
