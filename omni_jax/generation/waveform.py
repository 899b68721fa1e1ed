"""Token2Wav's loop: codes of many requests in, their samples out."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, UInt32

from omni_jax.batch import Array
from omni_jax.checkpoint.voices import Voice
from omni_jax.config import DiTConfig
from omni_jax.errors import InputError
from omni_jax.generation.text import on_mesh
from omni_jax.models.dit import Blocks, pack
from omni_jax.models.flow import evaluation_times, guided, integrate, sway_grid
from omni_jax.models.speaker_encoder import shortest_clip
from omni_jax.models.token2wav import Token2Wav


@struct.dataclass
class SpeechBlocks:
    """The blocks of all requests of a call, one request's after the other's. N blocks of F frames, V voices."""

    blocks: Blocks
    codes: Int[Array, "N F"]
    voice: Int[Array, " N"]  # which of ``speakers`` and ``cond``
    seed: UInt32[Array, " N"]  # of the request's noise
    draws: Bool[Array, " N"]  # False where ``noise`` is given
    noise: Float[Array, "N F mel"]


class Waveform:
    """The jitted functions around Token2Wav and its parameters. It holds nothing of any request."""

    def __init__(self, model: Token2Wav, params: Any, mesh: Mesh | None = None):
        self.config, self.params = model.config, params
        self._mesh = mesh
        self._speakers = jax.jit(functools.partial(_speakers, model))
        self._mel = jax.jit(functools.partial(_mel, model))
        self._vocode = jax.jit(functools.partial(_vocode, model))

    def synthesize(
        self,
        codes: Sequence[Int[np.ndarray, " K"]],
        voices: Sequence[Voice],
        noise: Sequence[Float[np.ndarray, "frames mel"] | None],
        seeds: Sequence[int],
    ) -> list[Float[np.ndarray, " samples"]]:
        """Speaks each request's codes: float32 from -1 to 1 at ``SAMPLE_RATE``, 480 samples a code (published sizes).

        A request's samples do not depend on the others in the call.

        Args:
          codes: ids of each request, without the Talker's own begin and end.
          voices: who speaks each.
          noise: what the flow starts from, [codes * repeats, mel_dim] standard normal; drawn where None.
          seeds: of the draws.

        Raises:
          InputError: for codes, a voice, noise or a seed that cannot be used.
        """
        return self.vocode(self.mel(codes, voices, noise, seeds))

    def mel(
        self,
        codes: Sequence[Int[np.ndarray, " K"]],
        voices: Sequence[Voice],
        noise: Sequence[Float[np.ndarray, "frames mel"] | None],
        seeds: Sequence[int],
    ) -> list[Float[np.ndarray, "frames mel"]]:
        """The first half of ``synthesize``: log-mel spectrograms, ``repeats`` frames a code."""
        c = self.config.dit_config
        for i, row in enumerate(zip(codes, voices, noise, seeds, strict=True)):
            _check(c, i, *row)
        if not codes:
            return []
        rows = [np.repeat(np.asarray(row, np.int32), c.repeats) for row in codes]
        used = list({id(v): v for v in voices}.values())
        which = [next(i for i, v in enumerate(used) if v is voice) for voice in voices]
        lengths = [len(row) for row in rows]
        blocks, parts = pack(lengths, c.block_size, fine_bucket(sum(-(-n // c.block_size) for n in lengths)))
        speech = _speech(c, blocks, parts, rows, which, noise, seeds)
        with on_mesh(self._mesh):
            speakers = np.stack([np.asarray(self._speakers(self.params, v.ref_mel)) for v in used])
            mel = np.asarray(self._mel(self.params, speech, speakers, np.concatenate([v.cond for v in used])))
        return [mel[part].reshape(-1, c.mel_dim)[:n] for part, n in zip(parts, lengths, strict=True)]

    def vocode(self, mels: Sequence[Float[np.ndarray, "frames mel"]]) -> list[Float[np.ndarray, " samples"]]:
        """The second half of ``synthesize``. Spectrograms of about one length go through the vocoder together."""
        unit = self.config.dit_config.block_size
        groups: dict[int, list[int]] = defaultdict(list)
        for i, mel in enumerate(mels):
            groups[unit * fine_bucket(-(-len(mel) // unit))].append(i)
        samples: dict[int, np.ndarray] = {}
        for frames, rows in groups.items():
            batch = np.zeros((fine_bucket(len(rows)), frames, mels[0].shape[1]), np.float32)
            length = np.zeros(len(batch), np.int32)
            for slot, i in enumerate(rows):
                length[slot] = len(mels[i])
                batch[slot, : length[slot]] = mels[i]
            with on_mesh(self._mesh):
                made = np.asarray(self._vocode(self.params, batch, length))
            per_frame = made.shape[1] // frames
            samples |= {i: made[slot, : per_frame * length[slot]] for slot, i in enumerate(rows)}
        return [samples[i] for i in range(len(mels))]


def fine_bucket(n: int) -> int:
    """The least number that is at least ``n`` and has four significant bits: at most an eighth is padding.

    Token2Wav is bound by arithmetic on any device, so padding costs in full; finer than ``omni_jax.batch.bucket``.
    """
    step = 1 << max(0, (n - 1).bit_length() - 4)
    return -(-n // step) * step


def _check(config: DiTConfig, row: int, codes: np.ndarray, voice: Voice, noise: np.ndarray | None, seed: int) -> None:
    where, codes = f"request {row}", np.asarray(codes)
    longest = config.max_position_embeddings // config.repeats
    if codes.ndim != 1 or codes.dtype.kind not in "iu" or not codes.size:
        raise InputError(f"{where}: codes must be a list of at least one integer, got {codes.dtype}{codes.shape}")
    if codes.size > longest:
        raise InputError(f"{where}: {codes.size} codes; Token2Wav takes at most {longest} at once, split them")
    wrong = codes[(codes < 0) | (codes > config.num_embeds)]
    if wrong.size:
        raise InputError(f"{where}: code {wrong[0]} is out of range; Token2Wav knows 0 to {config.num_embeds}")
    if noise is not None and np.shape(noise) != (codes.size * config.repeats, config.mel_dim):
        wanted = [codes.size * config.repeats, config.mel_dim]
        raise InputError(f"{where}: noise has shape {list(np.shape(noise))}; {codes.size} codes need {wanted}")
    if not 0 <= seed < 2**32:
        raise InputError(f"{where}: seed is {seed}; it must be at least 0 and below 2**32")
    _check_voice(config, voice)


def _check_voice(config: DiTConfig, voice: Voice) -> None:
    cond, clip = np.shape(voice.cond), np.shape(voice.ref_mel)
    shortest = shortest_clip(config)
    if cond != (1, config.enc_emb_dim):
        raise InputError(f"voice {voice.name}: cond has shape {list(cond)}, the model needs [1, {config.enc_emb_dim}]")
    if len(clip) != 3 or clip[0] != 1 or clip[1] < shortest or clip[2] != config.mel_dim:
        needed = f"[1, T, {config.mel_dim}] with T at least {shortest}"
        raise InputError(f"voice {voice.name}: ref_mel has shape {list(clip)}, the model needs {needed}")


def _speech(
    config: DiTConfig,
    blocks: Blocks,
    parts: Sequence[slice],
    codes: Sequence[np.ndarray],
    voices: Sequence[int],
    noise: Sequence[np.ndarray | None],
    seeds: Sequence[int],
) -> SpeechBlocks:
    """Puts each request's frames, voice and noise in its part of the list; ``codes`` has one for each frame."""
    slots, size = blocks.valid.shape
    speech = SpeechBlocks(
        blocks=blocks,
        codes=np.zeros((slots, size), np.int32),
        voice=np.zeros(slots, np.int32),
        seed=np.zeros(slots, np.uint32),
        draws=np.ones(slots, bool),
        noise=np.zeros((slots, size, config.mel_dim), np.float32),
    )
    for part, row, voice, given, seed in zip(parts, codes, voices, noise, seeds, strict=True):
        speech.codes[part].reshape(-1)[: len(row)] = row
        speech.voice[part], speech.seed[part] = voice, seed
        if given is not None:
            speech.draws[part] = False
            speech.noise[part].reshape(-1, config.mel_dim)[: len(row)] = given
    return speech


def draw_noise(
    seed: UInt32[Array, " N"], index: Int[Array, " N"], shape: tuple[int, ...]
) -> Float[jax.Array, "N F mel"]:
    """The noise of each block, from its request's seed and its place there alone."""

    def one(seed: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), shape)

    return jax.vmap(one)(jnp.asarray(seed), jnp.asarray(index))


def _apply(model: Token2Wav, part: str, method: str, params: Any, *args: Any) -> Any:
    def call(module: Token2Wav, *args: Any) -> Any:
        return getattr(getattr(module, part), method)(*args)

    return model.apply({"params": params}, *args, method=call)


def _speakers(model: Token2Wav, params: Any, ref_mel: jax.Array) -> jax.Array:
    return _apply(model, "dit", "speakers", params, ref_mel)


def _vocode(model: Token2Wav, params: Any, mel: jax.Array, length: jax.Array) -> jax.Array:
    return _apply(model, "bigvgan", "__call__", params, mel, length)


def _mel(
    model: Token2Wav,
    params: Any,
    speech: SpeechBlocks,
    speakers: Float[Array, "V 2 enc_dim"],
    cond: Float[Array, "V enc_emb_dim"],
) -> Float[jax.Array, "N F mel"]:
    """From noise to mel."""
    drawn = draw_noise(speech.seed, speech.blocks.index, speech.noise.shape[1:])
    noise = jnp.where(speech.draws[:, None, None], drawn, speech.noise)
    noise = jnp.where(speech.blocks.valid[..., None], noise, 0)
    conditions = _apply(model, "dit", "conditions", params, speech.codes, speakers[speech.voice], cond[speech.voice])
    grid = sway_grid()
    times = evaluation_times(grid)
    moments = _apply(model, "dit", "modulations", params, times.reshape(-1))
    moments = jax.tree.map(lambda a: a.reshape(*times.shape, *a.shape[1:]), moments)

    def velocity(mel: jax.Array, moment: Any) -> jax.Array:
        return guided(*_apply(model, "dit", "velocity", params, mel, conditions, moment, speech.blocks))

    return integrate(velocity, noise, grid, moments)
