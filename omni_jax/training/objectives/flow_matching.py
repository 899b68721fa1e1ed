"""Token2Wav's DiT: the velocity of the flow from noise to the mel of codes.

Conditional flow matching along straight lines (https://arxiv.org/abs/2210.02747, the optimal-transport path without its
small constant): the noisy mel at time t is (1 - t) noise + t mel, and its velocity mel - noise. Times are drawn evenly,
one for each utterance. Attention has the blocks of inference.

Which conditions are dropped, and that a part of the sound stands for the voice's clip and has no loss, is as in F5-TTS
(https://arxiv.org/abs/2410.06885, section 3.1). Without sound and codes the network learns the velocity that guidance
subtracts (docs/reference.md, 8.5).

Letters: B rows, N blocks of a row, F frames of a block, M mel bins, U utterances of a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float

from omni_jax.batch import Array
from omni_jax.data.speech_packing import SpeechBatch
from omni_jax.errors import ConfigError
from omni_jax.models.dit import NULL_CODE, DiT
from omni_jax.models.ode_solver import Solver
from omni_jax.processing import speech_mel
from omni_jax.sharding import map_over_batch
from omni_jax.training.code_vectors import read_codebook, write_code_vectors
from omni_jax.training.objective import Loss, Metrics, Params
from omni_jax.training.objectives.packed_speech import (
    Clips,
    PackedSpeechObjective,
    SpeechInputs,
    evaluate,
    frame_numbers,
    list_blocks,
    make_conditions,
    make_model,
    make_modulations,
    of_blocks,
    valid_frames,
)
from omni_jax.training.options import FlowMatchingOptions
from omni_jax.training.recipe import Recipe


@struct.dataclass
class Draws:
    """What a step draws for its utterances."""

    noise: Float[Array, "B N F M"]  # standard normal
    time: Float[Array, "B U"]  # from 0, noise, to 1, mel
    clips: Clips
    drops_sound: Bool[Array, "B U"]  # no clip, and no vector of the voice
    drops_codes: Bool[Array, "B U"]  # where sound is dropped too


@struct.dataclass
class _Inputs:
    """What the network gets, for each row of the batch."""

    noisy: Float[Array, "B N F M"]
    time: Float[Array, "B U"]
    speech: SpeechInputs


# compared and hashed by identity, as the step that holds it
@dataclass(frozen=True, eq=False)
class FlowMatching(PackedSpeechObjective):
    """The mean squared error of the velocity; see ``Objective`` for its methods."""

    options: FlowMatchingOptions = dataclasses.field(default_factory=FlowMatchingOptions)

    def check_start(self, folder: Path) -> None:
        if not Solver.load(folder).guidance:
            raise ConfigError(
                f"the DiT of {folder} was distilled, and has no velocity without conditions any more, which this loss "
                "would train; begin from the checkpoint that the distillation began from"
            )

    def initial_values(self, component: str, folder: Path) -> dict[str, np.ndarray]:
        """The velocity begins near its mean, and codes that are neighbours in the codebook with embeddings that are."""
        c = self.config
        values: dict[str, np.ndarray] = {"dit/proj/bias": np.full(c.mel_dim, speech_mel.LOG_MEAN, np.float32)}
        codebook = read_codebook(folder)
        if codebook is not None:
            # rows behind the codes are zero
            table = np.zeros((c.num_embeds + 1, c.emb_dim), np.float32)
            write_code_vectors(table, codebook)
            values["dit/codec_embed/embedding"] = table
        return values

    def loss(
        self, params: Params, batch: SpeechBatch, denominators: Metrics, key: jax.Array, trained: Collection[str]
    ) -> Loss:
        mean = self.sum_errors(params, batch, key) / denominators["frames"]
        return Loss(mean, {"loss": mean})

    def sum_errors(
        self,
        params: Params,
        batch: SpeechBatch,
        key: jax.Array,
        embeds: Float[jax.Array, "B N F emb_dim"] | None = None,
    ) -> Float[jax.Array, ""]:
        """The squared errors of the frames, each a mean over its bins, weighted and added up.

        Args:
          params: of each component.
          batch: it.
          key: of what is drawn.
          embeds: in place of those of the batch's codes.
        """
        draws = self.draw(batch, key)
        time = of_blocks(draws.time, batch.utterance)[..., None, None]  # [B, N, 1, 1]
        noisy = (1 - time) * draws.noise + time * batch.mel  # [B, N, F, M]
        speech = dataclasses.replace(self.make_inputs(batch, draws.clips), embeds=embeds)
        velocity = map_over_batch(
            functools.partial(_apply_to_rows, self.dit),
            params["token2wav"]["dit"],
            _Inputs(noisy, draws.time, _drop(speech, draws)),
        )  # [B, N, F, M]
        errors = jnp.mean(jnp.square(velocity - (batch.mel - draws.noise)), axis=-1)  # [B, N, F]
        return jnp.sum(errors * frame_weights(batch, draws.clips))

    def draw(self, batch: SpeechBatch, key: jax.Array) -> Draws:
        """The random numbers of a step."""
        options = self.options
        noise_key, time_key, length_key, begin_key, drop_key = jax.random.split(key, 5)
        shape = batch.length.shape  # [B, U]
        drop = jax.random.uniform(drop_key, shape)
        drops_codes = drop < options.drop_all
        return Draws(
            noise=jax.random.normal(noise_key, batch.mel.shape),
            time=jax.random.uniform(time_key, shape),
            clips=self.draw_clips(batch, length_key, begin_key),
            # of the utterances whose codes are kept
            drops_sound=drops_codes | (drop < options.drop_all + (1 - options.drop_all) * options.drop_sound),
            drops_codes=drops_codes,
        )

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        network = "token2wav/dit/"
        # forward, the gradient of the frames, and that of the kernels that train
        per_frame = 2 * self.count_frame_flops(sizes, network)
        per_frame += self.count_frame_flops({path: sizes[path] for path in trained}, network)
        return counts["tokens"] * self.config.repeats * per_frame


def make_flow_matching(recipe: Recipe) -> FlowMatching:
    """The recipe's DiT.

    Raises:
      ConfigError: if the recipe asks for what this objective has not.
    """
    assert isinstance(recipe.objective, FlowMatchingOptions)
    return FlowMatching(make_model(recipe), recipe.objective)


def frame_weights(batch: SpeechBatch, clips: Clips) -> Float[jax.Array, "B N F"]:
    """Of the loss of each frame: of an utterance they add up to its frames, and those of its clip have none."""
    utterance = batch.utterance
    frame = frame_numbers(batch)  # [B, N, F]
    clip_begin = of_blocks(clips.begin, utterance)[..., None]  # [B, N, 1]
    clip_end = clip_begin + of_blocks(clips.length, utterance)[..., None]
    is_clip = (frame >= clip_begin) & (frame < clip_end)
    length = jnp.asarray(batch.length)
    weight = length / jnp.maximum(length - clips.length, 1)  # [B, U]
    counts = valid_frames(batch) & ~is_clip
    return jnp.where(counts, of_blocks(weight, utterance)[..., None], 0)


def _drop(speech: SpeechInputs, draws: Draws) -> SpeechInputs:
    """Without the conditions that are dropped."""
    # the voice of guidance is silence through the speaker encoder, as long as the clip
    keeps_sound = ~draws.drops_sound[..., None]  # [B, U, 1]
    drops_codes = of_blocks(draws.drops_codes, speech.utterance)[..., None]  # [B, N, 1]
    return dataclasses.replace(
        speech,
        codes=jnp.where(drops_codes, NULL_CODE, speech.codes),
        clip=jnp.where(keeps_sound[..., None], speech.clip, 0),
        speaker=jnp.where(keeps_sound, speech.speaker, 0),
    )


def _apply_to_rows(dit: DiT, params: Any, inputs: _Inputs) -> Float[jax.Array, "B N F M"]:
    """The velocities of the blocks of some rows, which become one list."""
    listed = list_blocks(inputs.speech)
    conditions = make_conditions(dit, params, inputs.speech, listed, guidance=False)
    modulations = make_modulations(dit, params, inputs.time, listed)
    noisy = inputs.noisy.reshape(-1, *inputs.noisy.shape[2:])  # [B * N, F, M]
    velocity, _ = evaluate(dit, params, noisy, conditions, modulations, listed)
    return velocity.reshape(inputs.noisy.shape)
