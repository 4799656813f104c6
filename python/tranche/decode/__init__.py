"""Lossless speculative decoding of transformers models: `generate`, and the drafters that speed it up."""

from tranche._extras import needed as _needed

with _needed("tranche.decode", "transformers"):
    from tranche.decode.cascade import CascadeDrafter

from tranche.decode.chains import tree_of_chains
from tranche.decode.drafter import Context, Drafter
from tranche.decode.generation import Output, generate
from tranche.decode.head import JakiroHead
from tranche.decode.head_training import HeadLoss, HeadRecipe, head_loss, train_head
from tranche.decode.jakiro import JakiroDrafter
from tranche.decode.ngram import NgramDrafter
from tranche.decode.recycling import RecyclingDrafter
from tranche.decode.self_drafter import BitSwitchDrafter, LayerSkipDrafter, SelfDrafter
from tranche.decode.statistics import Statistics

__all__ = [
    "BitSwitchDrafter",
    "CascadeDrafter",
    "Context",
    "Drafter",
    "HeadLoss",
    "HeadRecipe",
    "JakiroDrafter",
    "JakiroHead",
    "LayerSkipDrafter",
    "NgramDrafter",
    "Output",
    "RecyclingDrafter",
    "SelfDrafter",
    "Statistics",
    "generate",
    "head_loss",
    "train_head",
    "tree_of_chains",
]
