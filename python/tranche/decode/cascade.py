"""`CascadeDrafter`: at each step the drafter and the size of tree that promise the most tokens a second."""

from __future__ import annotations

import dataclasses
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tranche.decode.drafter import Context, Drafter
from tranche.decode.pace import Clock, Pace
from tranche.tree import Accepted, Tree

_FORGET = 0.9  # what a drafter earns is followed over about ten of its steps: text changes its character
_EXPLORE_EVERY = 16  # steps between two of a drafter that promises less, all of them in turn
_EXPLORE_SIZE = 24  # nodes that tell enough


@dataclasses.dataclass
class _Step:
    """A step under way: whose it is, of which size, when it began, and what came of its nodes."""

    drafter: int
    size: int
    start: Any
    end: Any = None
    worth: Tensor | None = None  # [2, size]: in how many trees each node was accepted, and stood
    ready: torch.cuda.Event | None = None


class CascadeDrafter:
    """Chooses among drafters by what they earned and what they cost, both measured while it runs.

    After CAS-Spec's dynamic tree cascade (arXiv 2510.26843): with a_i the rate at which node i of a drafter's tree is
    accepted, an average that forgets, and t_n the time of a whole step of n nodes (the draft, the target's pass, the
    bookkeeping), the choice is the drafter and the n with the greatest (1 + sum_{0 < i < n} a_i) / t_n. A tree of one
    node is plain decoding, so that drafters that cost more than they give are left alone; each is tried again now and
    then. What was measured is kept for later calls with the same model.

    All drafters observe all steps. Only one that is chosen drafts.
    """

    chooses_size = True

    def __init__(self, drafters: Sequence[Drafter]):
        """`drafters` are those to choose among.

        Raises:
            ValueError: there are none.
        """
        if not drafters:
            raise ValueError(
                "tranche.CascadeDrafter: expected at least one drafter, got none. NgramDrafter() is a good first."
            )
        self.drafters = list(drafters)
        self._known: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[int, int], list[Pace]]] = (
            weakref.WeakKeyDictionary()
        )
        #: how often each drafter was chosen since `prepare`
        self.chosen = [0] * len(self.drafters)

    def prepare(self, model: PreTrainedModel, batch: int, capacity: int, device: torch.device) -> None:
        """Prepare all drafters."""
        for drafter in self.drafters:
            drafter.prepare(model, batch, capacity, device)
        self._paces_of = self._known.setdefault(model, {})
        self._clock = Clock(device)
        self._current: _Step | None = None
        self._unread: deque[_Step] = deque()
        self._steps = 0
        self.chosen = [0] * len(self.drafters)

    def _paces(self, batch: int, largest: int) -> list[Pace]:
        if (batch, largest) not in self._paces_of:
            self._paces_of[batch, largest] = [Pace(largest, _FORGET) for _ in self.drafters]
        return self._paces_of[batch, largest]

    def _choose(self, paces: list[Pace]) -> tuple[int, int]:
        """The next step's drafter and size."""
        self._steps += 1
        learning = [i for i, pace in enumerate(paces) if pace.learning]
        if learning:
            choice = learning[self._steps % len(learning)]
            return choice, paces[choice].size()
        choice = max(range(len(paces)), key=lambda i: paces[i].best()[1])
        others = [i for i in range(len(paces)) if i != choice]
        if others and self._steps % _EXPLORE_EVERY == 0:
            other = others[self._steps // _EXPLORE_EVERY % len(others)]
            return other, min(_EXPLORE_SIZE, paces[other].sizes[-1])
        return choice, paces[choice].size()

    def propose(self, context: Context) -> tuple[Tree, Tensor]:
        """The chosen drafter's tree, of the chosen size."""
        root = context.root
        paces = self._paces(root.size(0), context.tree_size)
        choice, size = self._choose(paces)
        self._largest = context.tree_size
        self._current = _Step(choice, size, self._clock.now())
        self.chosen[choice] += 1
        if size == 1:
            return Tree.chain(1, root.size(0), root.device), root[:, None]
        tree, tokens = self.drafters[choice].propose(dataclasses.replace(context, tree_size=size))
        if tokens.size(1) > size:
            tree = Tree.from_parent(tree.parent[:, :size].contiguous(), tree.n_nodes.clamp(max=size))
        return tree, tokens[:, :size]

    def observe(self, context: Context, accepted: Accepted) -> None:
        """Tell all drafters, and learn what the choice was worth."""
        for drafter in self.drafters:
            drafter.observe(context, accepted)
        step, self._current = self._current, None
        if step is not None:
            step.end = self._clock.now()
            self._unread.append(self._counted(step, context))
        while self._unread and (self._unread[0].ready is None or self._unread[0].ready.query()):
            self._learn(self._unread.popleft(), context.root.size(0))

    def _counted(self, step: _Step, context: Context) -> _Step:
        """Count on the device; the host reads it when it is there, and waits for nothing."""
        took_part = (context.committed > 0)[:, None]
        path = context.path[:, : step.size]
        place = torch.where((path >= 0) & took_part, path, step.size).clamp(max=step.size).long()
        accepted = torch.zeros(step.size + 1, dtype=torch.float32, device=path.device)
        accepted.index_add_(0, place.flatten(), torch.ones_like(place.flatten(), dtype=torch.float32))
        tried = took_part.sum().expand(step.size).to(torch.float32)
        worth = torch.stack([accepted[: step.size], tried])
        if worth.device.type == "cuda":
            step.worth = worth.to("cpu", non_blocking=True)
            step.ready = torch.cuda.Event()
            step.ready.record()
        else:
            step.worth = worth
        return step

    def _learn(self, step: _Step, batch: int) -> None:
        assert step.worth is not None
        accepted, tried = step.worth.tolist()
        for i, pace in enumerate(self._paces(batch, self._largest)):
            if i == step.drafter:
                pace.earned(accepted, tried)
                pace.timed(step.size, Clock.seconds(step.start, step.end))
            else:
                pace.fade()
