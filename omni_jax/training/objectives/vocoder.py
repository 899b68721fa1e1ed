"""Token2Wav's vocoder: from mel to sound, first by its spectra alone and then against discriminators.

The recipe is BigVGAN's (https://arxiv.org/abs/2206.04658, section 3): the error of the log-mel at several scales, a
least-squares GAN, and the difference of what the discriminators see. A step updates the discriminators first, and then
the vocoder against those. In a phase in which no discriminator trains there is the error of the mel alone.

A segment is cut out of its row at a place that the step draws, with frames of context on either side that the vocoder
reads and that have no loss: the mel of a segment comes of the sound around it, and so do its samples.

Letters: B rows, S frames of a segment, F frames of a segment with its context, W frames of a row of the batch, M mel
bins, N samples of a segment.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.config import BigVGANConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.segment_examples import FRAME_SAMPLES, PrepareSegments
from omni_jax.data.segment_packing import SegmentBatch, SegmentPacking, make_empty_batch
from omni_jax.errors import ConfigError
from omni_jax.models import discriminators, token2wav
from omni_jax.models.bigvgan import BigVGAN
from omni_jax.models.discriminators import DISCRIMINATORS, Discriminators
from omni_jax.models.token2wav import SAMPLE_RATE, Token2Wav
from omni_jax.processing.processor import Processor
from omni_jax.sharding import map_over_batch
from omni_jax.training.adversarial_losses import discriminator_loss, feature_loss, generator_loss
from omni_jax.training.objective import Loss, Metrics, Objective, Params
from omni_jax.training.objectives.vocoder_flops import (
    discriminator_floats,
    discriminator_flops,
    vocoder_floats,
    vocoder_flops,
)
from omni_jax.training.optimizer import flatten_params, learning_rate_scales
from omni_jax.training.options import VocoderOptions
from omni_jax.training.recipe import Recipe
from omni_jax.training.spectral_losses import MIN_SAMPLES, multi_scale_mel_error, stft_distance

VOCODER = "token2wav/bigvgan/"  # what the paths of its parameters begin with
_FLOAT32_BYTES = 4


class _Segments(NamedTuple):
    """What was cut out of rows."""

    mel: Float[jax.Array, "B F M"]
    samples: Float[jax.Array, "B N"]  # without the context


# compared and hashed by identity, as the step that holds it
@dataclass(frozen=True, eq=False)
class AdversarialVocoder(Objective):
    """Losses of the vocoder and of its discriminators; see ``Objective`` for its methods.

    Attributes:
      model: Token2Wav; its DiT is part of the component, and the loss does not read it.
      critics: the discriminators; None where none of them ever trains.
      options: of the losses.
      is_adversarial: whether discriminators train in this phase.
    """

    model: Token2Wav
    critics: Discriminators | None
    options: VocoderOptions = dataclasses.field(default_factory=VocoderOptions)
    is_adversarial: bool = False

    @property
    def components(self) -> tuple[str, ...]:
        return ("token2wav",) if self.critics is None else ("token2wav", DISCRIMINATORS)

    @property
    def dtype(self) -> Any:
        return self.model.dtype

    @property
    def _config(self) -> BigVGANConfig:
        return self.model.config.bigvgan_config

    @property
    def _vocoder(self) -> BigVGAN:
        return BigVGAN(self._config, precision=self.model.precision, single_convs=self.options.single_convs)

    def for_phase(self, paths: Collection[str]) -> AdversarialVocoder:
        return dataclasses.replace(self, is_adversarial=_has_discriminator(paths))

    def abstract_params(self) -> dict[str, Any]:
        params = {"token2wav": token2wav.abstract_params(self.model)}
        if self.critics is not None:
            params[DISCRIMINATORS] = discriminators.abstract_params(self.critics)
        return params

    def init_params(self, component: str, key: jax.Array) -> Any:
        if component == DISCRIMINATORS:
            assert self.critics is not None
            return nn.unbox(discriminators.init_params(self.critics, key))
        return nn.unbox(token2wav.init_params(self.model, key))

    def optimizer_groups(self, paths: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        of_discriminators = []
        of_vocoder = []
        for path in paths:
            (of_discriminators if _has_discriminator([path]) else of_vocoder).append(path)
        return tuple(of_discriminators), tuple(of_vocoder)

    def make_packing(self, data: DataConfig, processor: Processor, num_streams: int) -> SegmentPacking:
        if data.isolate_media:
            raise ConfigError("data.isolate_media is not there for rows of speech; decode files that you trust")
        prepare = PrepareSegments(
            self._segment(data), self.options.context, access=data.access, media_root=data.media_root
        )
        return SegmentPacking(prepare, data.rows // data.streams, self._config.mel_dim)

    def abstract_row(self, data: DataConfig) -> SegmentBatch:
        return make_empty_batch(1, self._segment(data), self.options.context, self._config.mel_dim)

    def _segment(self, data: DataConfig) -> int:
        """Frames of a segment."""
        least = -(-MIN_SAMPLES // FRAME_SAMPLES)
        if data.tokens < least:
            raise ConfigError(
                f"data.tokens is {data.tokens}; a segment must have {least} mel frames, which the longest window of "
                "the loss fits in"
            )
        return data.tokens

    def denominators(self, batch: SegmentBatch) -> Metrics:
        return {"rows": jnp.maximum(jnp.sum(jnp.asarray(batch.places) > 0), 1).astype(jnp.float32)}

    def loss(
        self, params: Params, batch: SegmentBatch, denominators: Metrics, key: jax.Array, trained: Collection[str]
    ) -> Loss:
        segments = self._cut(batch, key)
        weights = (jnp.asarray(batch.places) > 0) / denominators["rows"]  # [B]
        # of what is read alone: a shard of the batch gathers it
        read = {name: tree for name, tree in params.items() if name == DISCRIMINATORS}
        read["bigvgan"] = params["token2wav"]["bigvgan"]
        if _has_discriminator(trained):
            losses = map_over_batch(self._discriminator_losses, read, segments)
            terms = _means(losses, weights)
            return Loss(terms["discriminator"], terms)
        # of held-out sound the distances alone, which are there in every phase
        is_adversarial = self.is_adversarial and len(trained) > 0
        compute = functools.partial(self._vocoder_losses, is_adversarial=is_adversarial, measures=not trained)
        losses = map_over_batch(compute, read, segments)
        terms = _means(losses, weights)
        options = self.options
        total = options.mel_weight * terms["mel"]
        if is_adversarial:
            total += options.adversarial_weight * terms["adversarial"]
            total += options.feature_weight * terms["features"]
        return Loss(total, {"loss": total, **terms})

    def _cut(self, batch: SegmentBatch, key: jax.Array) -> _Segments:
        """A segment of each row with its context."""
        places = jnp.asarray(batch.places)  # [B]
        segment = (batch.mel.shape[1] - 2 * self.options.context + 1) // 2  # S
        drawn = jax.random.uniform(key, places.shape)
        begin = jnp.clip((drawn * places).astype(jnp.int32), 0, jnp.maximum(places - 1, 0))  # [B]
        mel = _take(batch.mel, begin, segment + 2 * self.options.context)  # [B, F, M]
        samples = _take(batch.samples, begin * FRAME_SAMPLES, segment * FRAME_SAMPLES)  # [B, N]
        return _Segments(mel, samples)

    def _generate(self, params: Params, segments: _Segments) -> Float[jax.Array, "B N"]:
        """The vocoder's samples, without those of the context."""
        # of the context there is all, so the rows are of one length
        samples: Any = self._vocoder.apply({"params": params["bigvgan"]}, segments.mel, None)
        begin = self.options.context * FRAME_SAMPLES
        return samples[:, begin : begin + segments.samples.shape[1]]

    def _discriminate(self, params: Params, samples: Float[Array, "B N"]) -> discriminators.FeatureMaps:
        assert self.critics is not None
        with jax.default_matmul_precision(self.model.precision):
            maps: Any = self.critics.apply({"params": params[DISCRIMINATORS]}, samples)
        return maps

    def _discriminator_losses(self, params: Params, segments: _Segments) -> dict[str, Float[jax.Array, " B"]]:
        generated = jax.lax.stop_gradient(self._generate(params, segments))  # [B, N]
        with jax.named_scope("discriminators"):
            # both have a gradient, so they are one batch
            maps = self._discriminate(params, jnp.concatenate([segments.samples, generated]))  # of 2 B rows
            of_recorded = jax.tree.map(lambda x: x[: len(generated)], maps)
            of_generated = jax.tree.map(lambda x: x[len(generated) :], maps)
            return {"discriminator": discriminator_loss(of_recorded, of_generated)}

    def _vocoder_losses(
        self, params: Params, segments: _Segments, *, is_adversarial: bool, measures: bool
    ) -> dict[str, Float[jax.Array, " B"]]:
        generated = self._generate(params, segments)  # [B, N]
        losses = {}
        with jax.named_scope("mel"), jax.default_matmul_precision(self.model.precision):
            losses["mel"] = multi_scale_mel_error(generated, segments.samples, SAMPLE_RATE)
        if measures:
            losses["stft"] = stft_distance(generated, segments.samples)
        if is_adversarial:
            with jax.named_scope("discriminators"):
                of_recorded = self._discriminate(params, segments.samples)
                of_generated = self._discriminate(params, generated)
                losses["adversarial"] = generator_loss(of_generated)
                losses["features"] = feature_loss(of_recorded, of_generated)
        return losses

    def count_work(self, batch: SegmentBatch) -> Metrics:
        context = self.options.context
        num_rows = jnp.sum(jnp.asarray(batch.places) > 0)
        segment = (batch.mel.shape[-2] - 2 * context + 1) // 2
        return {"tokens": num_rows * (segment + 2 * context), "target_tokens": num_rows * segment}

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        total = 0.0
        for path, size in sizes.items():
            if not path.endswith("/kernel"):
                continue
            if path.startswith(VOCODER):
                name = path.removeprefix(VOCODER)
                total += vocoder_flops(self._config, name, size) * counts["tokens"] * (2 + (path in trained))
            elif _has_discriminator(trained) and _has_discriminator([path]):
                name = path.removeprefix(f"{DISCRIMINATORS}/")
                num_samples = counts["target_tokens"] * FRAME_SAMPLES
                total += discriminator_flops(name, size) * num_samples
        return total

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        rows = data.rows // row_parts
        num_frames = rows * (data.tokens + 2 * self.options.context)
        found = {"inputs of the vocoder's convolutions": num_frames * vocoder_floats(self._config) * _FLOAT32_BYTES}
        if _has_discriminator(trained):
            # of recorded and of generated sound
            num_samples = 2 * rows * data.tokens * FRAME_SAMPLES
            floats = int(num_samples * discriminator_floats(self.options.channels))
            found["outputs of the discriminators' layers"] = floats * _FLOAT32_BYTES
        return found


def make_vocoder(recipe: Recipe) -> AdversarialVocoder:
    """The recipe's vocoder, in float32 whatever the recipe's dtype, with the products of inference on a TPU.

    Raises:
      ConfigError: if the recipe asks for what this objective has not.
    """
    assert isinstance(recipe.objective, VocoderOptions)
    config = recipe.model.token2wav_config
    samples_per_frame = math.prod(config.bigvgan_config.upsample_rates)
    if samples_per_frame != FRAME_SAMPLES:
        raise ConfigError(
            f"the vocoder makes {samples_per_frame} samples of a mel frame (the product of "
            f"upsample_rates); at {SAMPLE_RATE} Hz there are {FRAME_SAMPLES}"
        )
    if recipe.parts.folders:
        raise ConfigError("--parts are of the Thinker, which this recipe does not train; leave them out")
    if recipe.eval.samples:
        raise ConfigError("eval.samples asks for answers, which a vocoder does not give")
    model = Token2Wav(config, precision="high")
    critics = Discriminators(recipe.objective.channels, recipe.objective.single_convs)
    objective = AdversarialVocoder(model, critics, recipe.objective)
    # a run without discriminators needs none in memory or in its checkpoints
    paths = list(flatten_params(nn.unbox(objective.abstract_params())))
    for phase in recipe.phases:
        if _has_discriminator(learning_rate_scales(phase, paths)):
            return objective
    return dataclasses.replace(objective, critics=None)


def _has_discriminator(paths: Collection[str]) -> bool:
    """Whether any of the paths is of a discriminator."""
    return any(path.startswith(f"{DISCRIMINATORS}/") for path in paths)


def _means(losses: Mapping[str, jax.Array], weights: Float[jax.Array, " B"]) -> Metrics:
    """Over rows; one of padding has the weight 0, and may have any loss."""
    found = {}
    for name, of_rows in losses.items():
        found[name] = jnp.sum(jnp.where(weights > 0, of_rows, 0) * weights)
    return found


def _take(x: Array, begin: Int[Array, " B"], size: int) -> jax.Array:
    """``size`` elements of each row from its place on. [B, size, ...]"""
    return jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, size))(jnp.asarray(x), begin)
