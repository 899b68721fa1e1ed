"""Speaker vectors: clips of one speaker near each other, those of others far, by an additive angular margin.

The loss is the cross-entropy of the speaker (ArcFace, https://arxiv.org/abs/1801.07698; for speakers
https://arxiv.org/abs/1906.07317). Behind training the directions of the speakers are not needed any more.

Letters: B clips, T frames, M mel bins, S speakers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from omni_jax.checkpoint import store
from omni_jax.data.config import DataConfig
from omni_jax.data.speaker_examples import (
    PERTURBATIONS,
    PrepareSpeakers,
    SpeakerBatch,
    SpeakerPacking,
    make_empty_speakers,
)
from omni_jax.errors import ConfigError
from omni_jax.models.speaker_verifier import SpeakerVerifier, abstract_params, init_params, margin_logits
from omni_jax.processing.processor import Processor
from omni_jax.processing.speaker_mel import MIN_FRAMES
from omni_jax.sharding import map_over_batch
from omni_jax.speaker_verifier_config import SPEAKER_VERIFIER, SPEAKER_VERIFIER_FILE, SpeakerVerifierConfig
from omni_jax.training.objective import Loss, Metrics, Objective, Params
from omni_jax.training.options import SpeakerVerifierOptions
from omni_jax.training.recipe import Recipe

_FLOAT32_BYTES = 4
_MIN_SPEAKERS = 2
# what is computed once for a clip and not for each frame
_POOLED = ("/squeeze/", "/proj/")


# compared and hashed by identity, as the step that holds it
@dataclass(frozen=True, eq=False)
class VerifySpeakers(Objective):
    """The loss of the speaker; see ``Objective`` for its methods.

    Attributes:
      model: the network.
      options: of the loss.
    """

    model: SpeakerVerifier
    options: SpeakerVerifierOptions = dataclasses.field(default_factory=SpeakerVerifierOptions)

    @property
    def components(self) -> tuple[str, ...]:
        return (SPEAKER_VERIFIER,)

    @property
    def dtype(self) -> Any:
        return self.model.dtype

    @property
    def _config(self) -> SpeakerVerifierConfig:
        return self.model.config

    def abstract_params(self) -> dict[str, Any]:
        return {SPEAKER_VERIFIER: abstract_params(self.model)}

    def init_params(self, component: str, key: jax.Array) -> Any:
        return nn.unbox(init_params(self.model, key))

    def check_start(self, folder: Path) -> None:
        if SPEAKER_VERIFIER not in store.components(folder):
            return
        found = SpeakerVerifierConfig.load(folder)
        if found != self._config:
            raise ConfigError(
                f"{folder} has a speaker verifier of {found.num_speakers} speakers, clips of {found.segment} frames "
                f"and {found.channels[0]} channels; this run has one of {self._config.num_speakers}, "
                f"{self._config.segment} and {self._config.channels[0]}"
            )

    def extra_files(self) -> dict[str, str]:
        return {SPEAKER_VERIFIER_FILE: self._config.to_json()}

    def make_packing(self, data: DataConfig, processor: Processor, num_streams: int) -> SpeakerPacking:
        if data.isolate_media:
            raise ConfigError("data.isolate_media is not there for rows of speech; decode files that you trust")
        if len(self.options.speakers) < _MIN_SPEAKERS:
            raise ConfigError(
                f"objective.speakers names {len(self.options.speakers)} voices; name those of the rows, "
                f"{_MIN_SPEAKERS} at least (--objective.speakers NAME NAME ...)"
            )
        prepare = PrepareSpeakers(
            self.options.speakers,
            self.options.perturbations,
            self._config.segment,
            access=data.access,
            media_root=data.media_root,
        )
        return SpeakerPacking(prepare, data.rows // data.streams)

    def abstract_row(self, data: DataConfig) -> SpeakerBatch:
        return make_empty_speakers(1, self._config.segment)

    def denominators(self, batch: SpeakerBatch) -> Metrics:
        return {"clips": jnp.maximum(jnp.sum(jnp.asarray(batch.length) > 0), 1).astype(jnp.float32)}

    def loss(
        self, params: Params, batch: SpeakerBatch, denominators: Metrics, key: jax.Array, trained: Collection[str]
    ) -> Loss:
        is_clip = jnp.asarray(batch.length) > 0  # [B]
        of_clips = map_over_batch(self._clip_terms, params[SPEAKER_VERIFIER], batch)
        terms = {}
        for name, values in of_clips.items():
            terms[name] = jnp.sum(jnp.where(is_clip, values, 0)) / denominators["clips"]
        return Loss(terms["loss"], terms)

    def _clip_terms(self, params: Any, batch: SpeakerBatch) -> dict[str, Float[jax.Array, " B"]]:
        variables = {"params": params}
        speaker = jnp.asarray(batch.speaker)  # [B]
        # a row of padding has frames too, so that its numbers are finite
        length = jnp.maximum(jnp.asarray(batch.length), MIN_FRAMES)  # [B]
        with jax.named_scope("speaker_verifier"):
            vectors: Any = self.model.apply(variables, batch.mel, length)  # [B, D]
            cosines: Any = self.model.apply(variables, vectors, method=SpeakerVerifier.cosines)  # [B, S]
        logits = margin_logits(cosines, speaker, self.options.margin, self.options.scale)  # [B, S]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, speaker)  # [B]
        is_right = jnp.argmax(cosines, axis=-1) == speaker  # [B]
        return {"loss": losses, "accuracy": is_right.astype(jnp.float32)}

    def count_work(self, batch: SpeakerBatch) -> Metrics:
        length = jnp.asarray(batch.length)
        return {"tokens": jnp.sum(length), "target_tokens": jnp.sum(length > 0)}

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        total = 0.0
        for path, size in sizes.items():
            if path.endswith("/bias"):
                continue
            is_pooled = path.endswith("/speakers") or any(name in path for name in _POOLED)
            places = counts["target_tokens"] if is_pooled else counts["tokens"]
            total += 2.0 * size * places * (2 + (path in trained))
        return total

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        num_frames = data.rows // row_parts * self._config.segment
        # of each block the input, and what is inside of it
        num_floats = num_frames * (6 * sum(self._config.channels[:-1]) + 6 * self._config.channels[-1])
        return {"outputs of the blocks": num_floats * _FLOAT32_BYTES}


def make_speaker_verifier(recipe: Recipe) -> VerifySpeakers:
    """The recipe's network, in float32 whatever the recipe's dtype.

    Raises:
      ConfigError: if the recipe asks for what this objective has not.
    """
    options = recipe.objective
    assert isinstance(options, SpeakerVerifierOptions)
    if recipe.parts.folders:
        raise ConfigError("--parts are of the Thinker, which this recipe does not train; leave them out")
    if recipe.eval.samples:
        raise ConfigError("eval.samples asks for answers, which a network of speaker vectors does not give")
    if options.perturbations > len(PERTURBATIONS):
        raise ConfigError(f"objective.perturbations is {options.perturbations}; there are {len(PERTURBATIONS)}")
    if len(set(options.speakers)) < len(options.speakers):
        raise ConfigError("objective.speakers has a name twice")
    if recipe.data.tokens < MIN_FRAMES:
        raise ConfigError(f"data.tokens is {recipe.data.tokens}; a clip must have {MIN_FRAMES} mel frames at least")
    # a dry run may come before the voices are known
    num_speakers = max(len(options.speakers), _MIN_SPEAKERS) * (1 + options.perturbations)
    width = recipe.model.token2wav_config.dit_config.enc_emb_dim
    config = dataclasses.replace(options.model, num_speakers=num_speakers, width=width, segment=recipe.data.tokens)
    return VerifySpeakers(SpeakerVerifier(config), options)
