"""Packed utterances as Token2Wav's DiT takes them: what the objectives that train it have in common.

Letters: B rows, N blocks of a row, F frames of a block, M mel bins, U utterances of a row, T frames of a clip, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.checkpoint.fingerprint import find_codec
from omni_jax.config import DiTConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.speech_examples import PrepareSpeech
from omni_jax.data.speech_packing import NO_UTTERANCE, SpeechBatch, SpeechBudget, SpeechPacking, make_empty_batch
from omni_jax.errors import ConfigError
from omni_jax.models import token2wav
from omni_jax.models.dit import Conditions, DiT, Modulations
from omni_jax.models.dit_blocks import NO_BLOCK, Blocks
from omni_jax.models.speaker_encoder import shortest_clip
from omni_jax.models.token2wav import Token2Wav
from omni_jax.processing.processor import Processor
from omni_jax.training.objective import Metrics, Objective
from omni_jax.training.options import PackedSpeechOptions
from omni_jax.training.recipe import Recipe

_FLOAT32_BYTES = 4
# what each frame is multiplied with, by the beginnings of paths within the DiT
_FRAME_KERNELS = ("layers/attention/", "layers/mlp/", "input_proj/", "proj/")


@struct.dataclass
class Clips:
    """The part of each utterance that stands for its voice's clip."""

    begin: Int[Array, "B U"]  # its first frame, in the utterance
    length: Int[Array, "B U"]  # frames; 0 where the row has a clip of its own


@struct.dataclass
class SpeechInputs:
    """What the network is told of each row of a batch, beside the noisy mel and the time."""

    codes: Int[Array, "B N F"]
    valid: Bool[Array, "B N F"]
    utterance: Int[Array, "B N"]
    begin: Int[Array, "B U"]
    clip: Float[Array, "B U T M"]
    clip_length: Int[Array, "B U"]
    speaker: Float[Array, "B U enc_emb_dim"]
    embeds: Float[Array, "B N F emb_dim"] | None = None  # in place of those of the codes


@dataclass(frozen=True)
class BlockList:
    """The blocks of some rows as one list of B * N.

    Attributes:
      blocks: which of them are neighbours.
      utterance: of each block, which of the B * U utterances it is a part of; of padding any.
    """

    blocks: Blocks
    utterance: Int[jax.Array, " B*N"]


# compared and hashed by identity, as the step that holds it
@dataclass(frozen=True, eq=False)
class PackedSpeechObjective(Objective):
    """What is the same for every loss of the DiT; see ``Objective`` for its methods.

    Attributes:
      model: Token2Wav as it is trained; its vocoder is part of the component, and no loss here reads it.
      options: of the loss.
    """

    model: Token2Wav
    options: Any  # a class derived from PackedSpeechOptions

    @property
    def components(self) -> tuple[str, ...]:
        return ("token2wav",)

    @property
    def dtype(self) -> Any:
        return self.model.dtype

    @property
    def config(self) -> DiTConfig:
        """Of the DiT."""
        return self.model.config.dit_config

    @property
    def dit(self) -> DiT:
        """The network."""
        return token2wav.parts(self.model)[0]

    def abstract_params(self) -> dict[str, Any]:
        return {"token2wav": token2wav.abstract_params(self.model)}

    def init_params(self, component: str, key: jax.Array) -> Any:
        return nn.unbox(token2wav.init_params(self.model, key))

    def make_packing(self, data: DataConfig, processor: Processor, num_streams: int) -> SpeechPacking:
        if data.isolate_media:
            raise ConfigError("data.isolate_media is not there for rows of speech; decode files that you trust")
        budget = self.budget(data)
        c = self.config
        prepare = PrepareSpeech(
            c,
            max_frames=budget.blocks * c.block_size,
            shortest_clip=shortest_clip(c),
            longest_clip=budget.clip_frames,
            access=data.access,
            media_root=data.media_root,
            too_long=data.too_long,
            codec=self.options.codec or find_codec(processor.folder),
        )
        return SpeechPacking(prepare, budget, c)

    def abstract_row(self, data: DataConfig) -> SpeechBatch:
        return make_empty_batch(self.config, self.budget(data), 1)

    def budget(self, data: DataConfig) -> SpeechBudget:
        """What a stream may put into a step."""
        codes_per_block = self.config.block_size // self.config.repeats
        blocks = data.tokens // codes_per_block
        if not blocks:
            raise ConfigError(f"data.tokens is {data.tokens}; a row must hold a block of {codes_per_block} codes")
        options = self.options
        return SpeechBudget(data.rows // data.streams, blocks, options.utterances, options.clip_frames)

    def denominators(self, batch: SpeechBatch) -> Metrics:
        # frames that a clip is cut out of count too, for the weights of the others are larger by as much
        return {"frames": jnp.maximum(jnp.sum(batch.length), 1).astype(jnp.float32)}

    def draw_clips(self, batch: SpeechBatch, length_key: jax.Array, begin_key: jax.Array) -> Clips:
        """Up to a share of each utterance, but no less than the speaker encoder takes."""
        options = self.options
        shape = batch.length.shape  # [B, U]
        length = jnp.asarray(batch.length)
        share = jax.random.uniform(length_key, shape, maxval=options.max_clip)
        frames = jnp.clip((share * length).astype(jnp.int32), shortest_clip(self.config), options.clip_frames)
        frames = jnp.where(batch.clip_length > 0, 0, frames)
        begin = jax.random.uniform(begin_key, shape) * (length - frames + 1)
        return Clips(jnp.minimum(begin.astype(jnp.int32), length - frames), frames)

    def make_inputs(self, batch: SpeechBatch, clips: Clips) -> SpeechInputs:
        """With all that is known of each utterance."""
        has_length = clips.length > 0  # [B, U]
        cut = cut_clips(batch, clips, self.config.block_size)  # [B, U, T, M]
        clip_length = jnp.where(has_length, clips.length, batch.clip_length)
        return SpeechInputs(
            codes=batch.codes,
            valid=valid_frames(batch),
            utterance=batch.utterance,
            begin=batch.begin,
            clip=jnp.where(has_length[..., None, None], cut, batch.clip),
            # also where there is no utterance
            clip_length=jnp.maximum(clip_length, shortest_clip(self.config)),
            speaker=batch.speaker,
        )

    def count_work(self, batch: SpeechBatch) -> Metrics:
        num_codes = jnp.sum(batch.length) // self.config.repeats
        return {"tokens": num_codes, "target_tokens": num_codes}

    def count_frame_flops(self, sizes: Mapping[str, int], dit: str) -> float:
        """Of one evaluation, for each frame; attention, which within blocks is little, is not counted.

        Args:
          sizes: elements of every parameter, by path.
          dit: the path of the network, with a slash.
        """
        kernels = tuple(dit + path for path in _FRAME_KERNELS)
        return sum(2.0 * size for path, size in sizes.items() if path.startswith(kernels))

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        c = self.config
        frames = data.rows // row_parts * data.tokens * c.repeats
        return {"inputs of the DiT's layers": c.num_hidden_layers * frames * c.hidden_size * _FLOAT32_BYTES}


def make_model(recipe: Recipe) -> Token2Wav:
    """The recipe's Token2Wav. It computes in float32 whatever the recipe's dtype, with inference's products on a TPU.

    Raises:
      ConfigError: if the recipe asks for what no objective of the DiT has.
    """
    assert isinstance(recipe.objective, PackedSpeechOptions)
    if recipe.parts.folders:
        raise ConfigError("--parts are of the Thinker, which this recipe does not train; leave them out")
    if recipe.eval.samples:
        raise ConfigError("eval.samples asks for answers, which the flow of Token2Wav does not give")
    return Token2Wav(recipe.model.token2wav_config, remat=recipe.remat, precision="high")


def valid_frames(batch: SpeechBatch) -> Bool[jax.Array, "B N F"]:
    """Which frames are real."""
    is_inside = frame_numbers(batch) < of_blocks(batch.length, batch.utterance)[..., None]  # [B, N, F]
    return (jnp.asarray(batch.utterance) != NO_UTTERANCE)[..., None] & is_inside


def frame_numbers(batch: SpeechBatch) -> Int[jax.Array, "B N F"]:
    """Of each frame the number that it has in its utterance; of padding anything."""
    num_blocks, block_size = batch.codes.shape[-2:]
    block = jnp.arange(num_blocks) - of_blocks(batch.begin, batch.utterance)  # [B, N]
    return (block * block_size)[..., None] + jnp.arange(block_size)


def of_blocks(values: Array, utterance: Array) -> jax.Array:
    """What each block's utterance has; of padding anything. [B, U] to [B, N]"""
    return jnp.take_along_axis(jnp.asarray(values), jnp.maximum(utterance, 0), axis=1)


def cut_clips(batch: SpeechBatch, clips: Clips, block_size: int) -> Float[jax.Array, "B U T M"]:
    """The sound of the clips; behind it anything."""
    mel = jnp.asarray(batch.mel)
    frames = mel.reshape(len(mel), -1, mel.shape[-1])  # [B, N * F, M]
    first = jnp.asarray(batch.begin) * block_size + clips.begin  # [B, U]
    places = first[..., None] + jnp.arange(batch.clip.shape[2])  # [B, U, T]
    flat = jnp.minimum(places, frames.shape[1] - 1).reshape(len(mel), -1)  # [B, U * T]
    cut = jnp.take_along_axis(frames, flat[..., None], axis=1)  # [B, U * T, M]
    return cut.reshape(*places.shape, -1)


def list_blocks(inputs: SpeechInputs) -> BlockList:
    """The blocks of some rows in one list, the first row's first."""
    utterance = jnp.asarray(inputs.utterance)  # [B, N]
    num_rows, num_blocks = utterance.shape
    num_utterances = inputs.begin.shape[1]
    row = jnp.arange(num_rows)[:, None]
    number = (row * num_utterances + jnp.maximum(utterance, 0)).reshape(-1)  # [B * N]
    place = jnp.arange(num_blocks)
    same = utterance[:, 1:] == utterance[:, :-1]  # [B, N - 1]
    same = same & (utterance[:, 1:] != NO_UTTERANCE)
    edge = jnp.zeros((num_rows, 1), bool)
    # whether the block before, and the one after, is of the same utterance
    has_before = jnp.concatenate([edge, same], axis=1)
    has_after = jnp.concatenate([same, edge], axis=1)
    in_list = row * num_blocks + place  # [B, N]
    blocks = Blocks(
        index=jnp.where(utterance == NO_UTTERANCE, 0, place - of_blocks(inputs.begin, utterance)).reshape(-1),
        valid=jnp.asarray(inputs.valid).reshape(-1, inputs.valid.shape[2]),
        before=jnp.where(has_before, in_list - 1, NO_BLOCK).reshape(-1),
        after=jnp.where(has_after, in_list + 1, NO_BLOCK).reshape(-1),
    )
    return BlockList(blocks, number)


def make_conditions(dit: DiT, params: Any, inputs: SpeechInputs, listed: BlockList, guidance: bool) -> Conditions:
    """What a network makes of all that it is told, for each block of the list.

    Args:
      dit: the network.
      params: its parameters.
      inputs: of some rows.
      listed: their blocks.
      guidance: whether it is to be guided, and so also has to have the conditions of silence.
    """
    clips = jnp.asarray(inputs.clip).reshape(-1, *inputs.clip.shape[2:])  # [B * U, T, M]
    lengths = jnp.asarray(inputs.clip_length).reshape(-1)  # [B * U]
    voices = [_call(dit, params, "encode_clips", clips, lengths)]
    if guidance:
        voices.append(_call(dit, params, "encode_clips", jnp.zeros_like(clips), lengths))
    speakers = jnp.stack(voices, axis=1)[listed.utterance]  # [B * N, voices, enc_dim]
    cond = jnp.asarray(inputs.speaker).reshape(-1, inputs.speaker.shape[2])[listed.utterance]  # [B * N, enc_emb_dim]
    if inputs.embeds is not None:
        assert not guidance
        embeds = jnp.asarray(inputs.embeds).reshape(-1, *inputs.embeds.shape[2:])  # [B * N, F, emb_dim]
        return _call(dit, params, "conditions_of_embeds", embeds, speakers, cond)
    codes = jnp.asarray(inputs.codes).reshape(-1, inputs.codes.shape[2])  # [B * N, F]
    return _call(dit, params, "conditions", codes, speakers, cond, guidance)


def make_modulations(dit: DiT, params: Any, times: Float[Array, "B U"], listed: BlockList) -> Modulations:
    """Those of the list's blocks at the times of their utterances."""
    return _call(dit, params, "block_modulations", jnp.asarray(times).reshape(-1)[listed.utterance])


def evaluate(
    dit: DiT,
    params: Any,
    mel: Float[Array, "N F M"],
    conditions: Conditions,
    modulations: Modulations,
    listed: BlockList,
) -> tuple[Float[jax.Array, "N F M"], Float[jax.Array, "N F M"] | None]:
    """The velocities of the list's blocks: with all conditions, and without any if there is guidance."""
    cond, uncond, _ = _call(dit, params, "velocity", mel, conditions, modulations, listed.blocks)
    return cond, uncond


def _call(dit: DiT, params: Any, method: str, *arguments: Any) -> Any:
    return dit.apply({"params": params}, *arguments, method=method)
