"""The Talker's first objective: the next code, and the Thinker's next token beside it.

Of the paper's first stage (section 4.3, in-context continuation) and of the tuning of voices. The stream is that of
inference (``models.talker_conditioning``). The end of the speech is a target; prompts, clips and padding are none. Text
is supervised as it is where the Thinker trains alone: the Talker has no head for text.

Letters: B rows, P positions of the Talker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
from jaxtyping import Int

from omni_jax.batch import Array
from omni_jax.config import TalkerConfig
from omni_jax.data.spoken_packing import SpokenBatch
from omni_jax.errors import ConfigError
from omni_jax.models.talker import NO_CODE, Talker
from omni_jax.models.talker_conditioning import begin_codes
from omni_jax.models.thinker import Thinker
from omni_jax.training.objective import Loss, Metrics, Params
from omni_jax.training.objectives.next_token import NextToken
from omni_jax.training.objectives.talker_base import TalkerObjective
from omni_jax.training.options import NextTokenOptions, TalkerDPOOptions, TalkerOptions
from omni_jax.training.recipe import Recipe


class NextCode(TalkerObjective):
    """Cross-entropy of the next code, over all codes of a step alike."""

    @property
    def has_text_loss(self) -> bool:
        return self.options.text_weight > 0

    def denominators(self, batch: SpokenBatch) -> Metrics:
        text = self.thinker.denominators(batch.dialogues)
        # a batch of padding alone has no weight
        return {"codes": jnp.maximum(jnp.sum(batch.weights), 1e-6), **text}

    def loss(
        self, params: Params, batch: SpokenBatch, denominators: Metrics, key: jax.Array, trained: Collection[str]
    ) -> Loss:
        options = self.options
        # an evaluation trains nothing, and is of all codes
        if options.code_dropout and trained:
            codes = drop_codes(key, batch.codes, options.code_dropout, self.config.talker_config)
            batch = dataclasses.replace(batch, codes=codes)
        streams = self.run_models(params, batch, trained)
        found = self.code_log_probs(params, streams, batch)
        weights = batch.weights / denominators["codes"]  # [B, P]
        code_loss = -jnp.sum(weights * found.log_probs)
        total = options.code_weight * code_loss
        loss = total
        terms = {"code_loss": code_loss, "code_accuracy": jnp.sum(weights * found.is_top)}
        if self.has_text_loss:
            text = self.thinker.loss_of_hidden(
                params["thinker"], streams.thinker, batch.dialogues, denominators, trained
            )
            terms["text_loss"] = text.terms["loss"]
            total += options.text_weight * text.total
            loss += options.text_weight * text.terms["loss"]
        return Loss(total, {"loss": loss, **terms})


def drop_codes(
    key: jax.Array, codes: Int[Array, "B P"], fraction: float, config: TalkerConfig
) -> Int[jax.Array, "B P"]:
    """The codes that are read, ``NO_CODE`` in place of some; those that stand before all speech stay."""
    codes = jnp.asarray(codes)
    is_speech = ~jnp.isin(codes, begin_codes(config))  # [B, P]
    is_dropped = is_speech & jax.random.bernoulli(key, fraction, codes.shape)  # [B, P]
    return jnp.where(is_dropped, NO_CODE, codes)


def make_models(recipe: Recipe, options: TalkerOptions | TalkerDPOOptions) -> tuple[NextToken, Talker]:
    """The recipe's Thinker, with its own objective, and its Talker; both have scanned layers.

    Raises:
      ConfigError: if the mesh does not divide the Talker's positions.
    """
    if options.positions % recipe.mesh.sequence:
        raise ConfigError(
            f"mesh.sequence {recipe.mesh.sequence} does not divide objective.positions {options.positions}"
        )
    dtype = jnp.dtype(recipe.dtype)
    thinker = Thinker(recipe.model.thinker_config, remat=recipe.remat, media_by_rows=True, dtype=dtype)
    talker = Talker(recipe.model.talker_config, remat=recipe.remat, dtype=dtype)
    return NextToken(thinker, recipe.model, NextTokenOptions(chunk=options.chunk)), talker


def make_next_code(recipe: Recipe) -> NextCode:
    """The recipe's objective.

    Raises:
      ConfigError: if the mesh does not divide the Talker's positions.
    """
    assert isinstance(recipe.objective, TalkerOptions)
    return NextCode(*make_models(recipe, recipe.objective), recipe.model, recipe.objective)
