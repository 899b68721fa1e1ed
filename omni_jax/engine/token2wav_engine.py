"""Token2Wav's loop: codes of many requests in, their samples out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, UInt32

from omni_jax.batch import Array, bucket
from omni_jax.checkpoint.voices import Voice
from omni_jax.config import DiTConfig
from omni_jax.engine.thinker_engine import call, on_mesh
from omni_jax.engine.token2wav_inputs import check_codes, check_seed, check_voice
from omni_jax.engine.token2wav_streaming import Mode, StreamPrograms, WaveformStream
from omni_jax.errors import InputError
from omni_jax.models.bigvgan import NOWHERE, gap
from omni_jax.models.dit import Blocks, DiT, pack
from omni_jax.models.dit_streaming import Speaker
from omni_jax.models.flow_matching import draw_noise, solve
from omni_jax.models.token2wav import Token2Wav, parts
from omni_jax.sharding import replicate

_VOICES = 4  # in a call at least, so that their number makes no programs of its own


@struct.dataclass
class SpeechBlocks:
    """The blocks of all requests of a call, one request's after the other's. N blocks of F frames, V voices."""

    blocks: Blocks
    codes: Int[Array, "N F"]
    voice: Int[Array, " N"]  # which of ``speakers`` and ``cond``
    seed: UInt32[Array, " N"]  # of the request's noise
    draws: Bool[Array, " N"]  # False where ``noise`` is given
    noise: Float[Array, "N F mel"]


class Token2WavEngine:
    """The jitted functions around Token2Wav and its parameters. It holds nothing of any request."""

    def __init__(self, model: Token2Wav, params: Any, mesh: Mesh | None = None):
        self.config, self.params = model.config, params
        self._mesh = mesh
        dit, bigvgan = parts(model)
        self._speakers = jax.jit(functools.partial(_called, dit, "speakers"))
        self._known: dict[str, tuple[Voice, np.ndarray]] = {}  # rows of the voices that have spoken
        self._mel = jax.jit(functools.partial(_mel, dit))
        self._vocode = jax.jit(functools.partial(_called, bigvgan, "__call__"))
        self._programs = StreamPrograms(dit, bigvgan, params, mesh)

    def synthesize(
        self,
        codes: Sequence[Int[np.ndarray, " K"]],
        voices: Sequence[Voice],
        noise: Sequence[Float[np.ndarray, "frames mel"] | None],
        seeds: Sequence[int],
        sizes: Sequence[int] = (),
    ) -> list[Float[np.ndarray, " samples"]]:
        """Speaks each request's codes: float32 from -1 to 1 at ``SAMPLE_RATE``, 480 samples a code (published sizes).

        A request's samples do not depend on the others in the call.

        Args:
          codes: ids of each request, without the Talker's own begin and end.
          voices: who speaks each.
          noise: what the flow starts from, [codes * repeats, mel_dim] standard normal; drawn where None.
          seeds: of the draws.
          sizes: numbers of blocks, in order, that programs are to be compiled for; a larger number is rounded up to a
            power of two. Without them a number is rounded up by an eighth at most.

        Raises:
          InputError: for codes, a voice, noise or a seed that cannot be used.
        """
        return self.vocode(self.mel(codes, voices, noise, seeds, sizes), sizes)

    def mel(
        self,
        codes: Sequence[Int[np.ndarray, " K"]],
        voices: Sequence[Voice],
        noise: Sequence[Float[np.ndarray, "frames mel"] | None],
        seeds: Sequence[int],
        sizes: Sequence[int] = (),
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
        used += used[:1] * (bucket(len(used), _VOICES) - len(used))
        lengths = [len(row) for row in rows]
        blocks, places = pack(lengths, c.block_size, size_for(sum(-(-n // c.block_size) for n in lengths), sizes))
        speech = _speech(c, blocks, places, rows, which, noise, seeds)
        speakers = np.stack([self._speaker_rows(v) for v in used])
        with on_mesh(self._mesh):
            mel = np.asarray(self._mel(self.params["dit"], speech, speakers, np.concatenate([v.cond for v in used])))
        return [mel[part].reshape(-1, c.mel_dim)[:n] for part, n in zip(places, lengths, strict=True)]

    def vocode(
        self, mels: Sequence[Float[np.ndarray, "frames mel"]], sizes: Sequence[int] = ()
    ) -> list[Float[np.ndarray, " samples"]]:
        """The second half of ``synthesize``. All spectrograms lie in one row, with gaps between them."""
        if not mels:
            return []
        unit, apart = self.config.dit_config.block_size, gap(self.config.bigvgan_config)
        begins = list(itertools.accumulate((len(mel) + apart for mel in mels), initial=0))
        blocks = size_for(-(-(begins[-1] - apart) // unit), sizes)
        slots = max(blocks, bucket(len(mels)))  # so that their number makes no programs of its own
        row = np.zeros((1, unit * blocks, mels[0].shape[1]), np.float32)
        length, begin = np.zeros((1, slots), np.int32), np.full((1, slots), NOWHERE, np.int32)
        for i, mel in enumerate(mels):
            length[0, i], begin[0, i] = len(mel), begins[i]
            row[0, begins[i] : begins[i] + len(mel)] = mel
        with on_mesh(self._mesh):
            (made,) = np.asarray(self._vocode(self.params["bigvgan"], row, length, begin))
        frame = len(made) // row.shape[1]
        # copies: a part of the array would keep all of it, which on a CPU is the device's own
        parts = zip(begins[:-1], map(len, mels), strict=True)
        return [made[frame * first : frame * (first + n)].copy() for first, n in parts]

    @property
    def codes_a_block(self) -> int:
        return self.config.dit_config.block_size // self.config.dit_config.repeats

    def blocks(self, codes: int) -> int:
        """That so many codes of one request take in a list of ``sizes``, with the vocoder's gap behind them."""
        c = self.config.dit_config
        return -(-(codes * c.repeats + gap(self.config.bigvgan_config)) // c.block_size)

    def stream(
        self,
        voices: Sequence[Voice],
        seeds: Sequence[int],
        noise: Sequence[Float[np.ndarray, "frames mel"] | None] | None = None,
        *,
        mode: Mode = "carried",
        first_chunk_codes: int = 36,
        chunk_codes: int = 24,
    ) -> WaveformStream:
        """A batch of streams, one for each voice, that speak codes as they come (docs/streaming.md).

        Args:
          voices: who speaks each.
          seeds: of the noise, which is that of ``synthesize``.
          noise: what the flow starts from, for at least as many frames as there will be; drawn where None.
          mode: how the flow is cut into blocks, ``models/dit_stream.py``.
          first_chunk_codes: codes that are waited for at first. Of the first packet the two networks' look-ahead is
            missing, so that less than the default's makes it empty (published sizes).
          chunk_codes: codes that are waited for later. Both are a multiple of a block's.

        Raises:
          InputError: for a voice, a seed, noise, a mode or a chunk that cannot be used.
        """
        c = self.config.dit_config
        noise = [None] * len(voices) if noise is None else noise
        for i, (voice, seed, given) in enumerate(zip(voices, seeds, noise, strict=True)):
            check_seed(f"stream {i}", seed)
            check_voice(c, voice)
            if given is not None and (np.ndim(given) != 2 or given.shape[1] != c.mel_dim):
                raise InputError(f"stream {i}: noise has shape {list(np.shape(given))}, not [frames, {c.mel_dim}]")
        if mode not in get_args(Mode):
            raise InputError(f"mode is {mode!r}; it must be one of {', '.join(get_args(Mode))}")
        chunks = _blocks(c, "first_chunk_codes", first_chunk_codes), _blocks(c, "chunk_codes", chunk_codes)
        rows = bucket(len(voices))
        speaker = Speaker(np.zeros((rows, 2, c.enc_dim), np.float32), np.zeros((rows, c.enc_emb_dim), np.float32))
        for i, voice in enumerate(voices):
            speaker.rows[i], speaker.cond[i] = self._speaker_rows(voice), voice.cond[0]
        return WaveformStream(self._programs, speaker, seeds, noise, mode=mode, chunks=chunks)

    def warm_up(self, voices: Sequence[Voice], rows: int = 1, **settings: Any) -> None:
        """Compiles what streams of at most ``rows`` rows need, by speaking some codes in each of ``voices``.

        There are four programs for a bucket of rows (1, 2, 3, 4, 6, 8, ...), the first and the later chunk in either
        network, besides one for each length of a voice's clip and two that make a state.

        Args:
          voices: that will speak.
          rows: in a batch of streams; also those of a smaller bucket are compiled.
          settings: of ``stream``: the mode and the chunks.
        """
        for voice in voices:
            self._speaker_rows(voice)
        size = self.codes_a_block
        for batch in sorted({bucket(n) for n in range(1, rows + 1)}):
            stream = self.stream([voices[0]] * batch, [0] * batch, **settings)
            for blocks in (*stream.chunks, 0):
                stream.push([np.zeros(blocks * size, np.int32)] * batch, [blocks == 0] * batch)

    def warm_up_whole(self, voices: Sequence[Voice], sizes: Sequence[int]) -> None:
        """Compiles what ``synthesize`` needs with these ``sizes``, as ``warm_up`` does for streams."""
        for voice in voices:
            self._speaker_rows(voice)
        for size in sizes:
            codes = np.zeros(size * self.codes_a_block, np.int32)
            self.synthesize([codes], voices[:1], [None], [0], sizes)

    def _speaker_rows(self, voice: Voice) -> np.ndarray:
        """What the speaker encoder makes of a voice, once for all of its requests."""
        known = self._known.get(voice.name)
        if known is None or known[0] is not voice:
            with on_mesh(self._mesh):
                known = voice, np.asarray(self._speakers(self.params["dit"], voice.ref_mel))
            self._known[voice.name] = known
        return known[1]


def fine_bucket(n: int) -> int:
    """The least number that is at least ``n`` and has four significant bits: at most an eighth is padding.

    Token2Wav is bound by arithmetic on any device, so padding costs in full; finer than ``omni_jax.batch.bucket``.
    """
    step = 1 << max(0, (n - 1).bit_length() - 4)
    return -(-n // step) * step


def size_for(blocks: int, sizes: Sequence[int]) -> int:
    """The first of ``sizes`` that is enough, or where none is a power of two; without any the ``fine_bucket``."""
    larger = 1 << (blocks - 1).bit_length() if sizes else fine_bucket(blocks)
    return next((size for size in sizes if size >= blocks), larger)


def _check(config: DiTConfig, row: int, codes: np.ndarray, voice: Voice, noise: np.ndarray | None, seed: int) -> None:
    where, codes = f"request {row}", np.asarray(codes)
    if not codes.size:
        raise InputError(f"{where}: codes must have at least one integer, got none")
    check_codes(config, where, codes)
    if noise is not None and np.shape(noise) != (codes.size * config.repeats, config.mel_dim):
        wanted = [codes.size * config.repeats, config.mel_dim]
        raise InputError(f"{where}: noise has shape {list(np.shape(noise))}; {codes.size} codes need {wanted}")
    check_seed(where, seed)
    check_voice(config, voice)


def _blocks(config: DiTConfig, name: str, codes: int) -> int:
    size = config.block_size // config.repeats
    if codes < size or codes % size:
        raise InputError(f"{name} is {codes}; it must be a multiple of {size}, the codes of a block")
    return codes // size


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


def _called(model: nn.Module, method: str, params: Any, *args: Any) -> jax.Array:
    return replicate(call(model, method, params, *args))


def _mel(
    dit: DiT,
    params: Any,
    speech: SpeechBlocks,
    speakers: Float[Array, "V 2 enc_dim"],
    cond: Float[Array, "V enc_emb_dim"],
) -> Float[jax.Array, "N F mel"]:
    """From noise to mel."""
    drawn = draw_noise(speech.seed, speech.blocks.index, speech.noise.shape[1:])
    noise = jnp.where(speech.draws[:, None, None], drawn, speech.noise)
    inputs = (speech.codes, speakers[speech.voice], cond[speech.voice])
    conditions = call(dit, "conditions", params, *inputs)
    return replicate(solve(dit, params, noise, conditions, speech.blocks)[0])
