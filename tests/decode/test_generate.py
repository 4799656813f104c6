"""What `generate` promises besides the text: ends, limits, failing drafters, interrupts, streaming, statistics."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.decode.cases import Scripted, drafters, exact_model, ragged_prompts, tiny_model
from tranche.bits import BitSwitchLinear
from tranche.decode import Drafter, LayerSkipDrafter, NgramDrafter, generate
from tranche.tree import Tree

NEW = 30


@pytest.fixture(scope="module")
def model():
    return exact_model()


def run(model, drafter, **settings):
    tokens, mask = ragged_prompts(3)
    return generate(
        model, drafter, tokens, **{"attention_mask": mask, "max_new_tokens": NEW, "exact": True} | settings
    )


@pytest.mark.parametrize("name", drafters())
def test_a_sequence_that_ends(model, name):
    plain = run(model, None).sequences
    width = plain.size(1) - NEW
    # tokens that end a row at once, in the middle, and never
    ends = [int(plain[0, width]), int(plain[1, width + 12])]
    want = plain.clone()
    for row in range(3):
        for column in range(width, plain.size(1)):
            if int(plain[row, column]) in ends:
                want[row, column + 1 :] = ends[0]
                break
    made = run(model, drafters()[name], eos_token_id=ends).sequences
    assert torch.equal(made, want[:, : made.size(1)])
    assert (want[:, made.size(1) :] == ends[0]).all()


def test_all_sequences_end_at_once(model):
    plain = run(model, None)
    ends = plain.sequences[:, -NEW].tolist()
    made = run(model, drafters()["ngram"], eos_token_id=ends)
    assert torch.equal(made.sequences, plain.sequences[:, : -NEW + 1])
    assert made.statistics.target_passes == 1 and made.statistics.new_tokens == 3


def test_the_models_end_token_is_the_default(model):
    plain = run(model, None)
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = int(plain.sequences[0, -NEW + 3])
    ending.generation_config.pad_token_id = 9
    made = run(ending, None)
    assert (made.sequences[0, -NEW + 4 :] == 9).all()
    assert torch.equal(run(ending, None, eos_token_id=None).sequences, plain.sequences)


@pytest.mark.parametrize("new", [0, 1, 2])
def test_few_tokens(model, new):
    plain = run(model, None).sequences
    made = run(model, drafters()["layerskip-none"], max_new_tokens=new)
    assert torch.equal(made.sequences, plain[:, : plain.size(1) - NEW + new])


def test_an_empty_batch(model):
    made = generate(model, None, torch.empty(0, 4, dtype=torch.int64), max_new_tokens=3)
    assert made.sequences.shape == (0, 4)


# ---- drafters that fail -----------------------------------------------------------------------------------------


def raises(context):
    raise RuntimeError("no idea")


def branching(token):
    """A tree of 5 nodes full of one token."""

    def propose(context):
        batch = context.tokens.size(0)
        parents = torch.tensor([[-1, 0, 1, 0, 3]], dtype=torch.int32).repeat(batch, 1)
        return Tree.from_parent(parents), torch.full((batch, 5), token)

    return propose


BAD_DRAFTERS = {
    "raises": raises,
    "raises in observe": None,
    "nothing": lambda context: None,
    "no nodes": lambda context: (Tree.chain(1, 3), torch.empty(3, 0, dtype=torch.int64)),
    "the root alone": lambda context: (Tree.chain(1, 3), context.root[:, None]),
    "another batch": lambda context: (Tree.chain(4, 2), torch.zeros(2, 4, dtype=torch.int64)),
    "another dtype": lambda context: (Tree.chain(4, 3), torch.zeros(3, 4)),
    "too large": lambda context: (Tree.chain(400, 3), torch.ones(3, 400, dtype=torch.int64)),
    "outside the vocabulary": branching(10**9),
    "negative": branching(-5),
    "rubbish": branching(1),
}


@pytest.mark.parametrize("name", BAD_DRAFTERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.filterwarnings("ignore:tranche.generate goes on")
def test_a_bad_drafter_changes_nothing(model, name, temperature):
    observe = (lambda context, accepted: raises(context)) if name == "raises in observe" else None
    made = run(model, Scripted(BAD_DRAFTERS[name], observe), temperature=temperature)
    assert torch.equal(made.sequences, run(model, None, temperature=temperature).sequences)
    failed = name in ("raises", "raises in observe", "another batch", "another dtype")
    assert (made.statistics.drafter_error is not None) == failed


def test_a_failing_drafter_is_told_of(model):
    with pytest.warns(
        UserWarning, match="goes on without its drafter. Scripted raised RuntimeError: no idea"
    ):
        made = run(model, Scripted(raises))
    assert "no idea" in made.statistics.drafter_error


def test_a_drafter_that_proposes_the_end(model):
    end = int(run(model, None).sequences[0, -NEW + 12])
    made = run(model, Scripted(branching(end)), eos_token_id=end)
    assert torch.equal(made.sequences, run(model, None, eos_token_id=end).sequences)


def test_what_a_drafter_is_told(model):
    told = []

    def observe(context, accepted):
        count = int(context.committed[0])
        end = int(context.seqlens[0])
        row = context.tokens[0]
        assert torch.equal(context.following[0, :count], row[end - count + 1 : end + 1])
        assert context.root[0] == row[end]
        assert context.hidden.shape[:2] == context.path.shape
        nodes = context.path[0, :count].long()
        assert torch.equal(context.node_tokens[0, nodes], row[end - count : end])
        told.append((count, context.logits is None))

    run(model, Scripted(branching(1), observe))
    assert told[0] == (11, True) and told[1:] and all(not chunk for _, chunk in told[1:])
    assert all(isinstance(drafter, Drafter) for drafter in drafters().values())


# ---- interrupts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, None])
def test_an_interrupt_leaves_the_model_as_it_was(error):
    model = exact_model()
    tokens, _ = ragged_prompts(1)
    before = model(tokens).logits
    layers, attention = model.model.layers, model.config._attn_implementation
    model.train()
    model.model.norm.eval()

    def interrupt(context):
        assert model.config._attn_implementation == "tranche_tree" and not model.training
        if error is not None:
            raise error
        return None

    # once in a drafter, once in the middle of a draft, once in the streamer
    class Interrupted(LayerSkipDrafter):
        def propose(self, context):
            with self.cheaper(context.model):
                interrupt(context)

    class Streamer:
        def put(self, value):
            interrupt(None)

        def end(self):
            pass

    for settings in ({"drafter": Scripted(interrupt)}, {"drafter": Interrupted()}, {"streamer": Streamer()}):
        drafter = settings.pop("drafter", None)
        if error is None:
            generate(model, drafter, tokens, max_new_tokens=5, exact=True, **settings)
        else:
            with pytest.raises(error):
                generate(model, drafter, tokens, max_new_tokens=5, exact=True, **settings)
        assert model.config._attn_implementation == attention
        assert model.model.layers is layers
        assert model.training and not model.model.norm.training
        assert not any("forward" in module.__dict__ for module in model.modules())
    model.eval()
    assert torch.equal(model(tokens).logits, before)
    assert torch.is_grad_enabled()


# ---- limits, input, output --------------------------------------------------------------------------------------


def test_more_tokens_than_positions(model):
    tokens, _ = ragged_prompts(1)
    with pytest.raises(ValueError, match=r"prompt \+ max_new_tokens <= 512, the positions .* got 11 \+ 502"):
        generate(model, drafters()["ngram"], tokens, max_new_tokens=502)
    made = generate(model, drafters()["layerskip-none"], tokens, max_new_tokens=501, tree_size=200)
    assert made.sequences.shape == (1, 512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"eos_token_id": "12"},
            "expected eos_token_id 'model', a token, tokens or None, got '12'. Give its number.",
        ),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"expected input_ids int64 of shape \[B, T\]"),
        ({"input_ids": torch.full((1, 3), 64)}, r"expected input_ids in \[0, 64\), got \[64\]"),
        ({"attention_mask": torch.ones(1, 2)}, "expected attention_mask of input_ids' shape"),
        ({"attention_mask": torch.zeros(1, 3)}, "expected prompts of at least one token"),
        ({"max_new_tokens": -1}, "expected max_new_tokens >= 0, got -1"),
        ({"tree_size": 0}, r"expected tree_size in \[1, 1024\], got 0"),
        ({"temperature": -1.0}, "expected temperature in"),
        ({"top_p": float("nan")}, "expected top_p in"),
        ({"top_k": torch.tensor([1, 2])}, r"expected top_k a number or of shape \[1\], got \[2\]"),
    ],
)
def test_bad_input(model, change, message):
    arguments = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "max_new_tokens": 4} | change
    tokens = arguments.pop("input_ids")
    with pytest.raises(ValueError, match=message):
        generate(model, drafters()["ngram"], tokens, **arguments)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gpt2", r"rotary attention .*\(Llama, Mistral, Qwen2, Qwen3\), got GPT2LMHeadModel\."),
        ("bert", r"rotary attention .*got BertForMaskedLM\."),
        (
            "t5",
            r"with output embeddings, got T5ForConditionalGeneration\. Load it with AutoModelForCausalLM\.",
        ),
        ("headless", r"with output embeddings, got LlamaModel\. Load it with AutoModelForCausalLM\."),
    ],
)
def test_unfit_models(kind, message):
    made = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)),
        "bert": lambda: BertForMaskedLM(
            BertConfig(
                vocab_size=64,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
            )
        ),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        ),
        "headless": lambda: tiny_model().model,
    }[kind]()
    with pytest.raises(ValueError, match="tranche.generate: expected a .*" + message):
        generate(made, None, torch.ones(1, 3, dtype=torch.int64), max_new_tokens=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": torch.nn.Linear(3, 3)},
            "expected a causal language model of transformers, got Linear. Load one",
        ),
        ({"drafter": "ngram"}, "expected a drafter object or None, got 'ngram'. Use NgramDrafter()."),
        ({"drafter": NgramDrafter}, "got <class 'tranche.decode.ngram.NgramDrafter'>. Use NgramDrafter()."),
        ({"input_ids": [1, 2]}, "expected input_ids int64 of shape [B, T], got a list. Give a tensor: "),
    ],
)
def test_arguments_of_another_kind(model, change, message):
    arguments = {"model": model, "drafter": None, "input_ids": torch.ones(1, 3, dtype=torch.int64)} | change
    with pytest.raises(TypeError, match=re.escape(message)):
        generate(**arguments, max_new_tokens=2)


def test_unfit_drafters():
    model = tiny_model()
    tokens, _ = ragged_prompts(1)
    with pytest.raises(ValueError, match=r"BitSwitchDrafter: expected a model of .*BitSwitchLinear"):
        generate(model, drafters()["bitswitch"], tokens, max_new_tokens=4)
    with pytest.raises(ValueError, match="LayerSkipDrafter: expected skip among the layers 0 to 1"):
        generate(model, LayerSkipDrafter(skip=(0, 1)), tokens, max_new_tokens=4)


def test_streaming(model):
    tokens, _ = ragged_prompts(1)

    class Streamer:
        parts, ended = [], False

        def put(self, value):
            self.parts.append(value)

        def end(self):
            self.ended = True

    made = generate(model, drafters()["layerskip-none"], tokens, max_new_tokens=NEW, streamer=Streamer())
    assert torch.equal(Streamer.parts[0], tokens)
    assert torch.equal(torch.cat(Streamer.parts[1:]), made.sequences[0, tokens.size(1) :])
    assert len(Streamer.parts) > 3
    with pytest.raises(ValueError, match="expected a batch of 1 with a streamer, got 3"):
        run(model, None, streamer=Streamer())


def test_progress(model, capfd):
    run(model, None, progress=True)


def test_statistics(model):
    made = run(model, drafters()["layerskip-none"])
    told = made.statistics
    assert told.new_tokens == 3 * NEW
    assert told.guarantee == "exact" and told.reason == ""
    assert 1 < told.tokens_per_pass <= NEW and told.mean_accepted == told.tokens_per_pass - 1
    assert set(told.seconds) == {"prefill", "draft", "verify", "bookkeeping"}
    assert all(seconds > 0 for seconds in told.seconds.values())
    assert 1 < told.mean_tree_size <= 60
    half = copy.deepcopy(model)
    half.lm_head = torch.nn.Linear(64, 64, bias=False)
    told = run(half, None).statistics
    assert told.guarantee == "up to ties" and "lm_head (Linear)" in told.reason
    assert run(model, None, exact=False).statistics.guarantee == "up to ties"
    assert isinstance(model.lm_head, BitSwitchLinear)
