"""The head's drafter: its trees against a search without cache or ops, and the text."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from tests.decode.cases import exact_model, ragged_prompts, tiny_model
from tranche.decode import JakiroDrafter, JakiroHead, generate
from tranche.tree import expand_beam

BEAM = 3


@pytest.fixture(scope="module")
def model():
    return exact_model()


@pytest.fixture(scope="module")
def head(model):
    return JakiroHead.for_model(model, seed=3)


class Recorder(JakiroDrafter):
    """Keeps what it was told and what it proposed."""

    def prepare(self, *arguments):
        super().prepare(*arguments)
        self.features, self.tokens, self.proposals = [], [], []

    def observe(self, context, accepted):
        super().observe(context, accepted)
        count = int(context.committed[0])
        self.features.append(context.hidden[0, :count])
        self.tokens.append(context.following[0, :count])

    def propose(self, context):
        tree, tokens = super().propose(context)
        pairs = torch.cat(self.tokens), torch.cat(self.features)
        self.proposals.append((pairs, tree, tokens))
        return tree, tokens


def searched(head, model, tokens, features, passes, beam, contrast):
    """All candidates as {path: score}: every path is run through the whole head by itself.

    Children of the contrastive level come from the pass over the path *without* its last token.
    """

    def outputs(path, drafted):
        some = torch.cat([tokens, torch.tensor(path, dtype=torch.int64)])
        given = torch.stack([*features, *drafted])
        first, second = head(some[None], given[None])
        return first[0, -1], None if second is None else second[0, -1]

    def logprobs(feature):
        return model.get_output_embeddings()(feature[None])[0].float().log_softmax(-1)

    def best(scores, count):
        return sorted(scores, key=lambda path: -scores[path])[:count]

    found = {}
    first, second = outputs([], [])
    level = {(): (0.0, first, second, [])}
    for done in range(passes):
        scores = {}
        for path, (score, feature, _, _) in level.items():
            values, ids = logprobs(feature).topk(beam)
            scores |= {(*path, int(i)): score + float(v) for v, i in zip(values, ids, strict=True)}
        found |= scores
        chosen = best(scores, beam)
        below = {}
        for path in chosen:
            _, feature, seen_second, drafted = level[path[:-1]]
            if done == passes - 1:
                below[path] = (scores[path], None, seen_second, drafted)
            else:
                drafted = [*drafted, feature]
                below[path] = (scores[path], *outputs(path, drafted), drafted)
        level = below
    if contrast:
        for path, (score, _, second, _) in level.items():
            values, ids = logprobs(second).topk(beam)
            found |= {(*path, int(i)): score + float(v) for v, i in zip(values, ids, strict=True)}
    return found


def paths(tree, tokens):
    """Every node's path of tokens, in the order of the nodes, the root left out."""
    found = []
    for node in range(1, int(tree.n_nodes[0])):
        path = []
        while node > 0:
            path.append(int(tokens[0, node]))
            node = int(tree.parent[0, node])
        found.append(tuple(path[::-1]))
    return found


def propose_once(model, drafter, tree_size=60, new=8):
    drafter.chooses_size = True  # trees of full size
    tokens, _ = ragged_prompts(1)
    output = generate(model, drafter, tokens, max_new_tokens=new, tree_size=tree_size, exact=True)
    assert output.statistics.drafter_error is None
    return drafter.proposals


@torch.no_grad()
@pytest.mark.parametrize("passes", [1, 2, 4])
@pytest.mark.parametrize("contrast", [True, False])
def test_the_tree_is_that_of_an_exhaustive_search(model, head, passes, contrast):
    proposals = propose_once(model, Recorder(head, passes=passes, beam=BEAM, contrast=contrast))
    assert len(proposals) >= 3
    for (tokens, features), tree, drafted in proposals[:3]:
        want = searched(head, model, tokens, features, passes, BEAM, contrast)
        assert set(paths(tree, drafted)) == set(want)
        scores = [want[path] for path in paths(tree, drafted)]
        assert all(a >= b - 1e-5 for a, b in itertools.pairwise(scores))  # by falling score
        levels = passes + contrast
        assert len(want) == BEAM + (levels - 1) * BEAM**2
        assert int(tree.depth.max()) == levels


@torch.no_grad()
def test_the_contrastive_levels_candidates_hang_under_the_right_beam_nodes(model, head):
    """The published code adds row r of the contrastive output to node r of the *new* beam, whoever its parent is."""
    passes, crossed = 3, 0
    proposals = propose_once(model, Recorder(head, passes=passes, beam=BEAM), new=16)
    for (tokens, features), tree, drafted in proposals:
        levels = {}
        for path in paths(tree, drafted):
            levels.setdefault(len(path), set()).add(path)
        beam = {path[:-1] for path in levels[passes + 1]}
        assert beam <= levels[passes] and len(beam) == BEAM
        want = searched(head, model, tokens, features, passes, BEAM, True)
        for node in beam:
            got = {path[-1] for path in levels[passes + 1] if path[:-1] == node}
            assert got == {path[-1] for path in want if path[:-1] == node}
        # nodes of one parent share their children's tokens; of different parents they would be mixed up
        parents = {node[:-1] for node in beam}
        crossed += len(parents) > 1 or len(beam) > len(parents)
        for parent in parents:
            children = [
                frozenset(path[-1] for path in levels[passes + 1] if path[:-1] == node)
                for node in beam
                if node[:-1] == parent
            ]
            assert len(set(children)) == 1
    assert crossed >= 3


def test_a_smaller_tree_is_the_beginning_of_a_larger(model, head):
    class Sizes(JakiroDrafter):
        chooses_size = True

        def propose(self, context):
            got = [
                super(Sizes, self).propose(dataclasses.replace(context, tree_size=n)) for n in (60, 12, 20)
            ]
            large, *smaller = (paths(*one) for one in got)
            for some in smaller:
                assert some == large[: len(some)]
            compared.append(smaller)
            return got[0]

    compared = []
    tokens, _ = ragged_prompts(1)
    output = generate(model, Sizes(head, beam=BEAM), tokens, max_new_tokens=8, exact=True)
    assert output.statistics.drafter_error is None
    assert [len(some) for some in compared[0]] == [11, 19]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 11}])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"contrast": False}, {"passes": 1}, {"passes": 9, "beam": 2}, {"beam": 40}],
    ids=["published", "no contrast", "one pass", "deep", "wide"],
)
def test_the_text_is_that_of_plain_decoding(model, head, options, batch, sampling):
    tokens, mask = ragged_prompts(batch)
    settings = sampling | {"attention_mask": mask, "max_new_tokens": 24, "exact": True}
    plain = generate(model, None, tokens, **settings)
    drafter = JakiroDrafter(head, **options)
    drafter.chooses_size = True
    for tree_size in (2, 60):
        fast = generate(model, drafter, tokens, tree_size=tree_size, **settings)
        assert torch.equal(fast.sequences, plain.sequences)
        assert fast.statistics.drafter_error is None
        assert fast.statistics.guarantee == "exact"


@pytest.mark.parametrize("kind", ["plain", "bf16", "nan"])
def test_other_heads_leave_the_text_alone_too(model, kind):
    head = JakiroHead.for_model(model, mlp="plain" if kind == "plain" else "moe")
    if kind == "bf16":
        head = head.to(torch.bfloat16)
    if kind == "nan":
        torch.nn.init.constant_(head.fc.weight, torch.nan)
    tokens, mask = ragged_prompts(2)
    settings = {"attention_mask": mask, "max_new_tokens": 20, "exact": True}
    plain = generate(model, None, tokens, **settings)
    fast = generate(model, JakiroDrafter(head), tokens, **settings)
    assert torch.equal(fast.sequences, plain.sequences)
    assert fast.statistics.drafter_error is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_other_families(kind, dtype):
    model = tiny_model(kind, dtype)
    tokens, mask = ragged_prompts(2)
    drafter = JakiroDrafter(JakiroHead.for_model(model))
    fast = generate(model, drafter, tokens, attention_mask=mask, max_new_tokens=12)
    assert fast.statistics.drafter_error is None
    assert fast.sequences.size(1) == tokens.size(1) + 12


def test_a_sequence_in_a_batch_drafts_as_alone(model, head):
    tokens, mask = ragged_prompts(3)
    rows = []
    for row in range(3):
        alone = JakiroDrafter(head, beam=BEAM)
        alone.chooses_size = True
        prompt = tokens[row, mask[row].bool()][None]
        rows.append(generate(model, alone, prompt, max_new_tokens=24, exact=True).statistics)
    together = JakiroDrafter(head, beam=BEAM)
    together.chooses_size = True
    told = generate(model, together, tokens, attention_mask=mask, max_new_tokens=24, exact=True).statistics
    passes = sum(one.target_passes - 1 for one in rows)
    assert told.tokens_per_pass == pytest.approx(sum(one.new_tokens - 1 for one in rows) / passes, rel=1e-6)


@pytest.mark.parametrize("options", [{"passes": 0}, {"beam": 0}, {"beam": 129, "passes": 1}, {"beam": 50}])
def test_numbers_out_of_range(head, options):
    with pytest.raises(ValueError, match=r"passes >= 1 and beam in \[1, 128\]"):
        JakiroDrafter(head, **options)


def test_a_beam_of_the_op_is_what_the_search_expects():
    """The ties of `expand_beam` go to the lower token: `searched` relies on there being none."""
    level = expand_beam(torch.tensor([[[0.0, 1.0, 1.0]]]).log_softmax(-1), torch.zeros(1, 1), 2)
    assert level.tokens.tolist() == [[1, 2]]
