"""The Talker's second objective: of two spoken answers to the same the better one is to be the likelier.

Direct preference optimisation (paper section 4.3, equation 1; https://arxiv.org/abs/2305.18290). Log-probabilities are
sums over the codes of an answer and its end, in float32. Those of the reference, which is the model that a run begins
from, are computed once (``training.pair_scores``), stand in the rows, and carry its fingerprint; so no second model is
held.

Letters: B rows, P positions of the Talker, U utterances of a row, N pairs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from omni_jax.batch import PADDING, Array
from omni_jax.checkpoint.fingerprint import fingerprint
from omni_jax.checkpoint.train_checkpoints import REFERENCE_FILE, resolve_checkpoint
from omni_jax.data.config import DataConfig
from omni_jax.data.preference_pairs import PairBatch, PairPacking, PreparePairs
from omni_jax.data.spoken_packing import SpokenBatch
from omni_jax.data.spoken_rows import ANSWERS
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.plain_files import has_file, read_object
from omni_jax.processing.processor import Processor
from omni_jax.training.objective import Loss, Metrics, Params
from omni_jax.training.objectives.talker import make_models
from omni_jax.training.objectives.talker_base import TalkerObjective
from omni_jax.training.options import TalkerDPOOptions
from omni_jax.training.recipe import Recipe

_COMPONENTS = ("thinker", "talker")


class PreferenceLoss(NamedTuple):
    """Of pairs.

    Attributes:
      losses: -log sigmoid of the margin.
      margins: beta times what the better answer has gained over the other, against the reference.
    """

    losses: Float[jax.Array, "*pairs"]
    margins: Float[jax.Array, "*pairs"]


def preference_loss(
    log_probs: Float[Array, "*pairs 2"], reference: Float[Array, "*pairs 2"], beta: float
) -> PreferenceLoss:
    """Equation (1) of the paper, for each pair.

    Args:
      log_probs: of the better answer and of the other, by the model that trains.
      reference: by the reference.
      beta: of the loss.
    """
    log_ratios = jnp.asarray(log_probs) - reference  # [*pairs, 2]
    margins = beta * (log_ratios[..., 0] - log_ratios[..., 1])  # [*pairs]
    return PreferenceLoss(-jax.nn.log_sigmoid(margins), margins)


def sum_by_utterance(values: Float[Array, "B P"], batch: SpokenBatch, num_utterances: int) -> Float[jax.Array, "B U"]:
    """The values of target positions, added up over each utterance of a row."""
    utterance = jnp.asarray(batch.segment_ids) - PADDING - 1  # [B, P], -1 for padding
    is_own = utterance[..., None] == jnp.arange(num_utterances)  # [B, P, U]
    weighted = jnp.asarray(values) * batch.weights  # [B, P]
    return jnp.sum(jnp.where(is_own, weighted[..., None], 0), axis=1)


# compared and hashed by identity, as the step that holds it
@dataclass(frozen=True, eq=False)
class TalkerDPO(TalkerObjective):
    """The mean loss of the pairs of a step.

    Attributes:
      init: the checkpoint that a run begins from, which is its reference.
    """

    init: Path | None = None

    def extra_files(self) -> dict[str, str]:
        # asked for once, when a run is made; all later starts read the file
        assert self.init is not None
        digest = fingerprint(resolve_checkpoint(self.init), _COMPONENTS)
        return {REFERENCE_FILE: json.dumps({"fingerprint": digest}) + "\n"}

    def make_packing(self, data: DataConfig, processor: Processor, num_streams: int) -> PairPacking:
        prepare = PreparePairs(
            **self.prepare_arguments(data, processor, num_streams),
            max_length_gap=self.options.max_length_gap,
            reference=_read_fingerprint(processor.folder),
        )
        return PairPacking(prepare, self.budget(data), processor.config, self.dtype)

    def abstract_row(self, data: DataConfig) -> PairBatch:
        spoken: SpokenBatch = super().abstract_row(data)
        shape = (1, self.options.pairs)
        return PairBatch(spoken, np.zeros((*shape, len(ANSWERS)), np.float32), np.zeros(shape, bool))

    def denominators(self, batch: PairBatch) -> Metrics:
        weights = jnp.asarray(batch.spoken.weights)
        # a batch of padding alone has no pair
        return {
            "pairs": jnp.maximum(jnp.sum(batch.is_pair), 1e-6),
            "codes": jnp.maximum(jnp.sum(weights), 1e-6),
            "chosen_codes": jnp.maximum(jnp.sum(jnp.where(_is_chosen(batch.spoken), weights, 0)), 1e-6),
        }

    def loss(
        self, params: Params, batch: PairBatch, denominators: Metrics, key: jax.Array, trained: Collection[str]
    ) -> Loss:
        options: TalkerDPOOptions = self.options
        spoken = batch.spoken
        streams = self.run_models(params, spoken, trained)
        token_log_probs = self.code_log_probs(params, streams, spoken).log_probs  # [B, P]
        log_probs = sum_by_utterance(token_log_probs, spoken, options.utterances)  # [B, U]
        log_probs = log_probs.reshape(batch.reference.shape)  # [B, N, 2]
        found = preference_loss(log_probs, batch.reference, options.beta)
        weights = jnp.asarray(batch.is_pair) / denominators["pairs"]  # [B, N]
        loss = jnp.sum(weights * found.losses)
        log_ratios = jnp.where(jnp.asarray(batch.is_pair)[..., None], log_probs - batch.reference, 0)  # [B, N, 2]
        terms = {
            "margin": jnp.sum(weights * found.margins),
            "preference_accuracy": jnp.sum(weights * (found.margins > 0)),
            # the answers were drawn from the reference, so this estimates KL(reference, model) of a code
            "kl": -jnp.sum(log_ratios) / denominators["codes"],
        }
        if options.anchor_weight:
            chosen = jnp.where(_is_chosen(spoken), spoken.weights, 0) / denominators["chosen_codes"]  # [B, P]
            anchor = -jnp.sum(chosen * token_log_probs)
            terms["anchor_loss"] = anchor
            loss += options.anchor_weight * anchor
        return Loss(loss, {"loss": loss, **terms})

    def count_work(self, batch: PairBatch) -> Metrics:
        return self.count_spoken(batch.spoken)


def _is_chosen(batch: SpokenBatch) -> jax.Array:
    """Which positions are of a better answer, the first of its pair; [..., B, P]."""
    return (jnp.asarray(batch.segment_ids) - PADDING) % len(ANSWERS) == 1


def _read_fingerprint(folder: Path | None) -> str | None:
    """That of the reference of a run, by the folder of its model; None outside of a run, as in a dry one.

    Raises:
      CheckpointError: if the file is damaged.
    """
    if folder is None or not has_file(folder / REFERENCE_FILE):
        return None
    values: Mapping[str, Any] = read_object(folder / REFERENCE_FILE)
    digest = values.get("fingerprint")
    if not isinstance(digest, str):
        raise CheckpointError(f"{folder / REFERENCE_FILE} is damaged; it must have a fingerprint")
    return digest


def make_talker_dpo(recipe: Recipe) -> TalkerDPO:
    """The recipe's objective.

    Raises:
      ConfigError: if the mesh does not divide the Talker's positions, or there is nothing that could be a reference.
    """
    assert isinstance(recipe.objective, TalkerDPOOptions)
    if recipe.is_random or recipe.parts.folders:
        raise ConfigError("preferences are measured against what a run begins from; --init must be a checkpoint")
    models = make_models(recipe, recipe.objective)
    return TalkerDPO(*models, recipe.model, recipe.objective, recipe.init)
