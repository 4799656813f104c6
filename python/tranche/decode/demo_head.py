"""The demo's draft head: trained for the byte-level Llama in a few minutes, then cached beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from tranche import _cache, corpus
from tranche.decode.head import JakiroHead, Mlp
from tranche.decode.head_training import HeadRecipe, train_head

_FORMAT = 1  # of what is cached: to be raised when training or the head changes

# The published rate is made for a hundred thousand steps of a head of thousands of features; in 400 steps of a head of
# 256 it gets nowhere. 3e-3, the rate of the model itself, trained best.
RECIPE = HeadRecipe(steps=400, batch=8, length=256, learning_rate=3e-3)


def load_or_train_head(
    model: PreTrainedModel,
    recipe: HeadRecipe = RECIPE,
    *,
    mlp: Mlp = "moe",
    cache_dir: Path | str | None = None,
    progress: bool = True,
) -> JakiroHead:
    """The head of a model of `tranche.byte_llama`: from the cache, or trained now and put there.

    A training that is interrupted goes on at the next call.

    Args:
        model: the target, in floating point.
        recipe: how it is trained.
        mlp: "moe" or "plain".
        cache_dir: where heads are kept; default `$XDG_CACHE_HOME/tranche`, or `~/.cache/tranche`.
        progress: show a progress bar while it trains.
    """
    home = _cache.folder(cache_dir)
    text = corpus.standard_library("train")
    weight = model.get_output_embeddings().weight
    assert isinstance(weight, Tensor)
    identity = hashlib.sha256(repr((_FORMAT, recipe, mlp)).encode())
    identity.update(text.numpy().tobytes())
    identity.update(weight.detach().cpu().numpy().tobytes())
    path = home / f"jakiro-head-{identity.hexdigest()[:16]}"
    if not path.exists():
        checkpoint = path.with_suffix(".training")
        head = JakiroHead.for_model(model, mlp=mlp, seed=recipe.seed)
        train_head(model, head, text, recipe, checkpoint=checkpoint, checkpoint_every=50, progress=progress)
        with _cache.filled(path) as partial:
            head.save(partial)
        checkpoint.unlink(missing_ok=True)
    return JakiroHead.load(path)
