"""Lossless means equal: not one token in a hundred thousand, in the exact configuration, over all drafters.

The soak runs the demo's trained model on held-out sources; its slice in the ordinary tests runs a tiny one.
"""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedModel

from tests.decode.cases import drafters, exact_model, ragged_prompts
from tranche import bits, byte_llama
from tranche.decode import generate
from tranche.decode.demo import held_out_prompts, mismatches_of

CONFIGURATIONS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp32-int8": (torch.float32, 8),
    "bf16-int8": (torch.bfloat16, 8),
}
SAMPLING = {"greedy": {}, "sampling": {"temperature": 0.8, "top_p": 0.95, "seed": 3}}
NEW = 256


@functools.lru_cache(maxsize=1)
def trained(configuration: str) -> PreTrainedModel:
    dtype, activation_bits = CONFIGURATIONS[configuration]
    model = byte_llama.load_or_train().to(dtype)
    return bits.convert(model, skip=(), activation_bits=activation_bits)


def text_of(model, drafter, prompts, mask, settings):
    made = generate(model, drafter, prompts, attention_mask=mask, exact=True, eos_token_id=None, **settings)
    assert made.statistics.guarantee == "exact", made.statistics.reason
    assert made.statistics.drafter_error is None
    return made.sequences


@pytest.mark.soak
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("batch", [1, 8])
def test_no_token_differs(configuration, sampling, batch):
    """4 configurations x 2 x (2 calls of 8 and 8 of 1) x 256 tokens x 6 drafters: 295 thousand tokens compared."""
    model = trained(configuration)
    settings = SAMPLING[sampling] | {"max_new_tokens": NEW}
    texts = held_out_prompts(16 if batch == 8 else 8, 96)
    for prompts in texts.split(batch):
        mask = torch.ones_like(prompts)
        for row in range(1, batch):
            mask[row, : 11 * row] = 0  # ragged
        plain = text_of(model, None, prompts, mask, settings)
        for name, drafter in drafters().items():
            made = text_of(model, drafter, prompts, mask, settings)
            differ = mismatches_of(made, plain)
            assert differ == 0, f"{name}: {differ} tokens differ"


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_slice_of_the_soak(configuration):
    """A call of 8 ragged sequences for each configuration, sampled so that the text does not run in circles."""
    dtype, activation_bits = CONFIGURATIONS[configuration]
    model = exact_model("llama", dtype, activation_bits)
    prompts, mask = ragged_prompts(8, longest=30)
    settings = {"max_new_tokens": 100, "temperature": torch.tensor([0.0, 0.9] * 4)}
    plain = text_of(model, None, prompts, mask, settings)
    for name in ("recycling", "layerskip-none", "bitswitch"):
        assert mismatches_of(text_of(model, drafters()[name], prompts, mask, settings), plain) == 0, name


PEAK = """
import resource, sys
import torch
from tests.decode.cases import drafters, exact_model
from tranche.decode import generate
torch.set_num_threads(1)
model = exact_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=4096,
                    max_position_embeddings=8192)
prompts = torch.ones(8, 512, dtype=torch.int64)
drafter = drafters()[sys.argv[1]] if sys.argv[1] != "plain" else None
generate(model, drafter, prompts, max_new_tokens=int(sys.argv[2]), exact=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.soak
@pytest.mark.parametrize("name", ["ngram", "recycling", "layerskip"])
def test_peak_memory_is_that_of_plain_decoding(name):
    """Within 5% of plain decoding with the same cache: plain decoding gets the tree's slots as more tokens."""

    def peak(*arguments: str) -> int:
        command = [sys.executable, "-c", PEAK, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    assert peak(name, "40") <= 1.05 * peak("plain", "99")
