"""Token2Wav's DiT: the velocity of the flow from noise to the mel of codes.

Conditional flow matching along straight lines (https://arxiv.org/abs/2210.02747, the optimal-transport path without its
small constant): the noisy mel at time t is (1 - t) noise + t mel, and its velocity mel - noise. Times are drawn evenly,
one for each utterance. Attention has the blocks of inference.

Which conditions are dropped, and that a part of the sound stands for the voice's clip and has no loss, is as in F5-TTS
(https://arxiv.org/abs/2410.06885, section 3.1). Without sound and codes the network learns the velocity that guidance
subtracts (docs/reference.md, 8.5).

Letters: B rows, N blocks of a row, F frames of a block, M mel bins, U utterances of a row, T frames of a clip.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.config import DiTConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.speech_examples import PrepareSpeech
from omni_jax.data.speech_packing import NO_UTTERANCE, SpeechBatch, SpeechBudget, SpeechPacking, make_empty_batch
from omni_jax.errors import ConfigError
from omni_jax.models import token2wav
from omni_jax.models.dit import NULL_CODE, DiT
from omni_jax.models.dit_blocks import NO_BLOCK, Blocks
from omni_jax.models.speaker_encoder import shortest_clip
from omni_jax.models.token2wav import Token2Wav
from omni_jax.processing.processor import Processor
from omni_jax.sharding import map_over_batch
from omni_jax.training.objective import Loss, Metrics, Objective, Params
from omni_jax.training.options import FlowMatchingOptions
from omni_jax.training.recipe import Recipe

_FLOAT32_BYTES = 4
# what each frame is multiplied with, by the beginnings of paths
_FRAME_KERNELS = tuple(f"token2wav/dit/{part}" for part in ("layers/attention/", "layers/mlp/", "input_proj/", "proj/"))


@struct.dataclass
class Draws:
    """What a step draws for its utterances."""

    noise: Float[Array, "B N F M"]  # standard normal
    time: Float[Array, "B U"]  # from 0, noise, to 1, mel
    clip_begin: Int[Array, "B U"]  # frame of the sound where the clip begins that is cut out of it
    clip_length: Int[Array, "B U"]  # of that clip; 0 where the row has another
    drops_sound: Bool[Array, "B U"]  # no clip, and no vector of the voice
    drops_codes: Bool[Array, "B U"]  # where sound is dropped too


@struct.dataclass
class _Inputs:
    """What the network gets, for each row of the batch."""

    noisy: Float[Array, "B N F M"]
    codes: Int[Array, "B N F"]
    valid: Bool[Array, "B N F"]
    utterance: Int[Array, "B N"]
    begin: Int[Array, "B U"]
    time: Float[Array, "B U"]
    clip: Float[Array, "B U T M"]
    clip_length: Int[Array, "B U"]
    speaker: Float[Array, "B U enc_emb_dim"]


# compared and hashed by identity, as the step that holds it
@dataclass(frozen=True, eq=False)
class FlowMatching(Objective):
    """The mean squared error of the velocity; see ``Objective`` for its methods.

    Attributes:
      model: Token2Wav as it is trained; its vocoder is part of the component, and the loss does not read it.
      options: of the loss.
    """

    model: Token2Wav
    options: FlowMatchingOptions = dataclasses.field(default_factory=FlowMatchingOptions)

    @property
    def components(self) -> tuple[str, ...]:
        return ("token2wav",)

    @property
    def dtype(self) -> Any:
        return self.model.dtype

    @property
    def _config(self) -> DiTConfig:
        return self.model.config.dit_config

    def abstract_params(self) -> dict[str, Any]:
        return {"token2wav": token2wav.abstract_params(self.model)}

    def init_params(self, component: str, key: jax.Array) -> Any:
        return nn.unbox(token2wav.init_params(self.model, key))

    def make_packing(self, data: DataConfig, processor: Processor, num_streams: int) -> SpeechPacking:
        if data.isolate_media:
            raise ConfigError("data.isolate_media is not there for rows of speech; decode files that you trust")
        budget = self._budget(data)
        c = self._config
        prepare = PrepareSpeech(
            c,
            max_frames=budget.blocks * c.block_size,
            shortest_clip=shortest_clip(c),
            longest_clip=budget.clip_frames,
            access=data.access,
            media_root=data.media_root,
            too_long=data.too_long,
        )
        return SpeechPacking(prepare, budget, c)

    def abstract_row(self, data: DataConfig) -> SpeechBatch:
        return make_empty_batch(self._config, self._budget(data), 1)

    def _budget(self, data: DataConfig) -> SpeechBudget:
        codes_per_block = self._config.block_size // self._config.repeats
        blocks = data.tokens // codes_per_block
        if not blocks:
            raise ConfigError(f"data.tokens is {data.tokens}; a row must hold a block of {codes_per_block} codes")
        options = self.options
        return SpeechBudget(data.rows // data.streams, blocks, options.utterances, options.clip_frames)

    def denominators(self, batch: SpeechBatch) -> Metrics:
        # frames that a clip is cut out of count too, for the weights of the others are larger by as much
        return {"frames": jnp.maximum(jnp.sum(batch.length), 1).astype(jnp.float32)}

    def loss(
        self, params: Params, batch: SpeechBatch, denominators: Metrics, key: jax.Array, trained: Collection[str]
    ) -> Loss:
        draws = self.draw(batch, key)
        valid = valid_frames(batch)  # [B, N, F]
        time = _of_blocks(draws.time, batch.utterance)[..., None, None]  # [B, N, 1, 1]
        noisy = (1 - time) * draws.noise + time * batch.mel  # [B, N, F, M]
        inputs = self._make_inputs(batch, draws, noisy, valid)
        dit, _ = token2wav.parts(self.model)
        velocity = map_over_batch(
            functools.partial(_apply_to_rows, dit), params["token2wav"]["dit"], inputs
        )  # [B, N, F, M]
        errors = jnp.mean(jnp.square(velocity - (batch.mel - draws.noise)), axis=-1)  # [B, N, F]
        mean = jnp.sum(errors * frame_weights(batch, draws)) / denominators["frames"]
        return Loss(mean, {"loss": mean})

    def draw(self, batch: SpeechBatch, key: jax.Array) -> Draws:
        """The random numbers of a step."""
        options = self.options
        noise_key, time_key, length_key, begin_key, drop_key = jax.random.split(key, 5)
        shape = batch.length.shape  # [B, U]
        length = jnp.asarray(batch.length)
        # of the clip: up to a share of the sound, but no less than the speaker encoder takes
        share = jax.random.uniform(length_key, shape, maxval=options.max_clip)
        frames = jnp.clip((share * length).astype(jnp.int32), shortest_clip(self._config), options.clip_frames)
        frames = jnp.where(batch.clip_length > 0, 0, frames)
        begin = jax.random.uniform(begin_key, shape) * (length - frames + 1)
        drop = jax.random.uniform(drop_key, shape)
        drops_codes = drop < options.drop_all
        return Draws(
            noise=jax.random.normal(noise_key, batch.mel.shape),
            time=jax.random.uniform(time_key, shape),
            clip_begin=jnp.minimum(begin.astype(jnp.int32), length - frames),
            clip_length=frames,
            # of the utterances whose codes are kept
            drops_sound=drops_codes | (drop < options.drop_all + (1 - options.drop_all) * options.drop_sound),
            drops_codes=drops_codes,
        )

    def _make_inputs(
        self, batch: SpeechBatch, draws: Draws, noisy: jax.Array, valid: Bool[jax.Array, "B N F"]
    ) -> _Inputs:
        has_length = draws.clip_length > 0  # [B, U]
        clip = jnp.where(has_length[..., None, None], self._cut_clips(batch, draws), batch.clip)  # [B, U, T, M]
        clip_length = jnp.where(has_length, draws.clip_length, batch.clip_length)
        # the voice of guidance is silence through the speaker encoder, as long as the clip
        keeps_sound = ~draws.drops_sound[..., None]  # [B, U, 1]
        drops_codes = _of_blocks(draws.drops_codes, batch.utterance)[..., None]  # [B, N, 1]
        return _Inputs(
            noisy=noisy,
            codes=jnp.where(drops_codes, NULL_CODE, batch.codes),
            valid=valid,
            utterance=batch.utterance,
            begin=batch.begin,
            time=draws.time,
            clip=jnp.where(keeps_sound[..., None], clip, 0),
            clip_length=jnp.maximum(clip_length, shortest_clip(self._config)),
            speaker=jnp.where(keeps_sound, batch.speaker, 0),
        )

    def _cut_clips(self, batch: SpeechBatch, draws: Draws) -> Float[jax.Array, "B U T M"]:
        """The part of each utterance that stands for its voice's clip; behind it anything."""
        mel = jnp.asarray(batch.mel)
        frames = mel.reshape(len(mel), -1, mel.shape[-1])  # [B, N * F, M]
        first = jnp.asarray(batch.begin) * self._config.block_size + draws.clip_begin  # [B, U]
        places = first[..., None] + jnp.arange(batch.clip.shape[2])  # [B, U, T]
        flat = jnp.minimum(places, frames.shape[1] - 1).reshape(len(mel), -1)  # [B, U * T]
        cut = jnp.take_along_axis(frames, flat[..., None], axis=1)  # [B, U * T, M]
        return cut.reshape(*places.shape, -1)

    def count_work(self, batch: SpeechBatch) -> Metrics:
        num_codes = jnp.sum(batch.length) // self._config.repeats
        return {"tokens": num_codes, "target_tokens": num_codes}

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        num_frames = counts["tokens"] * self._config.repeats
        total = 0.0
        # all else is not computed for each frame, but attention, which within blocks is little
        for path, size in sizes.items():
            if path.startswith(_FRAME_KERNELS):
                total += 2.0 * size * num_frames * (2 + (path in trained))
        return total

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        c = self._config
        frames = data.rows // row_parts * data.tokens * c.repeats
        return {"inputs of the DiT's layers": c.num_hidden_layers * frames * c.hidden_size * _FLOAT32_BYTES}


def make_flow_matching(recipe: Recipe) -> FlowMatching:
    """The recipe's DiT. It computes in float32 whatever the recipe's dtype, with the products of inference on a TPU.

    Raises:
      ConfigError: if the recipe asks for what this objective has not.
    """
    assert isinstance(recipe.objective, FlowMatchingOptions)
    config = recipe.model.token2wav_config
    if recipe.parts.folders:
        raise ConfigError("--parts are of the Thinker, which this recipe does not train; leave them out")
    if recipe.eval.samples:
        raise ConfigError("eval.samples asks for answers, which the flow of Token2Wav does not give")
    return FlowMatching(Token2Wav(config, remat=recipe.remat, precision="high"), recipe.objective)


def valid_frames(batch: SpeechBatch) -> Bool[jax.Array, "B N F"]:
    """Which frames are real."""
    is_inside = _frame_numbers(batch) < _of_blocks(batch.length, batch.utterance)[..., None]  # [B, N, F]
    return (jnp.asarray(batch.utterance) != NO_UTTERANCE)[..., None] & is_inside


def frame_weights(batch: SpeechBatch, draws: Draws) -> Float[jax.Array, "B N F"]:
    """Of the loss of each frame: of an utterance they add up to its frames, and those of its clip have none."""
    utterance = batch.utterance
    frame = _frame_numbers(batch)  # [B, N, F]
    clip_begin = _of_blocks(draws.clip_begin, utterance)[..., None]  # [B, N, 1]
    clip_end = clip_begin + _of_blocks(draws.clip_length, utterance)[..., None]
    is_clip = (frame >= clip_begin) & (frame < clip_end)
    length = jnp.asarray(batch.length)
    weight = length / jnp.maximum(length - draws.clip_length, 1)  # [B, U]
    counts = valid_frames(batch) & ~is_clip
    return jnp.where(counts, _of_blocks(weight, utterance)[..., None], 0)


def _frame_numbers(batch: SpeechBatch) -> Int[jax.Array, "B N F"]:
    """Of each frame the number that it has in its utterance; of padding anything."""
    num_blocks, block_size = batch.codes.shape[-2:]
    block = jnp.arange(num_blocks) - _of_blocks(batch.begin, batch.utterance)  # [B, N]
    return (block * block_size)[..., None] + jnp.arange(block_size)


def _of_blocks(values: Array, utterance: Array) -> jax.Array:
    """What each block's utterance has; of padding anything. [B, U] to [B, N]"""
    return jnp.take_along_axis(jnp.asarray(values), jnp.maximum(utterance, 0), axis=1)


def _apply_to_rows(dit: DiT, params: Any, inputs: _Inputs) -> Float[jax.Array, "B N F M"]:
    """The velocities of the blocks of some rows, which become one list."""
    num_rows, num_blocks, block_size, _ = inputs.noisy.shape
    utterance = jnp.asarray(inputs.utterance)  # [B, N]
    num_utterances = inputs.time.shape[1]
    # of all rows' blocks in one list [B * N]; an utterance of row b has the number b * U + its own
    row = jnp.arange(num_rows)[:, None]
    number = (row * num_utterances + jnp.maximum(utterance, 0)).reshape(-1)
    place = jnp.arange(num_blocks)
    same = utterance[:, 1:] == utterance[:, :-1]  # [B, N - 1]
    same = same & (utterance[:, 1:] != NO_UTTERANCE)
    edge = jnp.zeros((num_rows, 1), bool)
    # whether the block before, and the one after, is of the same utterance
    has_before = jnp.concatenate([edge, same], axis=1)
    has_after = jnp.concatenate([same, edge], axis=1)
    in_list = row * num_blocks + place  # [B, N]
    blocks = Blocks(
        index=jnp.where(utterance == NO_UTTERANCE, 0, place - _of_blocks(inputs.begin, utterance)).reshape(-1),
        valid=jnp.asarray(inputs.valid).reshape(-1, block_size),
        before=jnp.where(has_before, in_list - 1, NO_BLOCK).reshape(-1),
        after=jnp.where(has_after, in_list + 1, NO_BLOCK).reshape(-1),
    )
    clips = inputs.clip.reshape(-1, *inputs.clip.shape[2:])  # [B * U, T, M]
    speakers: Any = dit.apply({"params": params}, clips, inputs.clip_length.reshape(-1), method=DiT.encode_clips)
    velocity: Any = dit.apply(
        {"params": params},
        inputs.noisy.reshape(-1, *inputs.noisy.shape[2:]),
        inputs.codes.reshape(-1, block_size),
        speakers[number],
        inputs.speaker.reshape(-1, inputs.speaker.shape[2])[number],
        inputs.time.reshape(-1)[number],
        blocks,
        method=DiT.conditioned_velocity,
    )
    return velocity.reshape(inputs.noisy.shape)
