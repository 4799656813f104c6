"""Tiny models, ragged prompts, and drafters whose quality a test can set."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tranche import bits
from tranche.decode import BitSwitchDrafter, LayerSkipDrafter, NgramDrafter, RecyclingDrafter
from tranche.tree import Tree

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **config) -> PreTrainedModel:
    """Two layers of width 64 with weights large enough that the next token is no coin toss."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512,
        "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    made = AutoModelForCausalLM.from_config(CONFIGS[kind](**settings | config))
    return made.to(dtype).eval()


def exact_model(
    kind: str = "llama", dtype: torch.dtype = torch.float32, activation_bits: int | None = None, **config
):
    """The same in the exact configuration."""
    return bits.convert(tiny_model(kind, dtype, **config), skip=(), activation_bits=activation_bits)


def ragged_prompts(
    batch: int, side: str = "left", longest: int = 11, vocabulary: int = 64
) -> tuple[Tensor, Tensor]:
    """Prompts of falling lengths and their mask; what stands in the padding must not matter."""
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(vocabulary, (batch, longest), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(batch):
        padding = min(3 * row, longest - 1)
        if padding:
            columns = slice(0, padding) if side == "left" else slice(longest - padding, longest)
            mask[row, columns] = 0
    return tokens, mask


def drafters() -> dict:
    """One of each kind. Skipping no layer, and switching to all the bits, make drafts that are always right."""
    return {
        "ngram": NgramDrafter(),
        "recycling": RecyclingDrafter(),
        "layerskip": LayerSkipDrafter(),
        "layerskip-none": LayerSkipDrafter(skip=()),
        "bitswitch": BitSwitchDrafter(bits=5),
        "bitswitch-all": BitSwitchDrafter(bits=8),
    }


class OracleDrafter:
    """Knows the text, errs at random, and hides the right path among branches of a random tree."""

    def __init__(self, sequences: Tensor, starts: Tensor, error: float = 0.2):
        """The rows of plain decoding without padding begin at `starts`."""
        self.sequences, self.starts, self.error = sequences, starts, error

    def prepare(self, model, batch, capacity, device):
        self.generator = torch.Generator().manual_seed(7)

    def propose(self, context):
        batch, nodes = context.tokens.size(0), context.tree_size
        parents = torch.full((batch, nodes), -1, dtype=torch.int32)
        tokens = torch.randint(64, (batch, nodes), generator=self.generator)
        counts = torch.randint(1, nodes + 1, (batch,), generator=self.generator, dtype=torch.int32)
        for b in range(batch):
            on_path, at = 0, int(context.seqlens[b] + self.starts[b])
            for node in range(1, nodes):
                draw = float(torch.rand((), generator=self.generator))
                if draw > self.error and at + 1 < self.sequences.size(1):
                    parents[b, node], at = on_path, at + 1
                    tokens[b, node] = self.sequences[b, at]
                    on_path = node
                else:
                    parents[b, node] = int(draw * 1e6) % node
        return Tree.from_parent(parents, counts), tokens

    def observe(self, context, accepted):
        assert torch.equal(context.hidden[:, 0], context.node_hidden[:, 0])


class Scripted:
    """A drafter whose methods a test gives as functions."""

    def __init__(self, propose=None, observe=None):
        self._propose, self._observe = propose, observe

    def prepare(self, model, batch, capacity, device):
        pass

    def propose(self, context):
        return self._propose(context) if self._propose else None

    def observe(self, context, accepted):
        if self._observe:
            self._observe(context, accepted)
