"""The Talker's loop: what the Thinker read and said goes in once, then several codes come out of each jitted call.

A row of the Talker's input carries a share of the text (section 7.2): the prompt's rows, one that names the voice, one
for each token of the reply but the last, then the mark that the text has ended, then padding for ever. The first token
of the reply is read with the prompt; from then on each code takes one more of these rows, until the Talker ends.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from omni_jax import positions
from omni_jax.batch import Array, Spans, bucket
from omni_jax.config import OmniConfig, TalkerConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.generation.sampling import Sampling, SamplingState, sample
from omni_jax.generation.text import NOTHING, Conditioning, call, on_mesh
from omni_jax.models.decoder import KVCache
from omni_jax.models.talker import NO_CODE, Talker
from omni_jax.processing.collate import SMALLEST_ROW
from omni_jax.processing.layout import Prompt
from omni_jax.sharding import constrain

# Codes that a cache has room for at first; it doubles as speech goes on. A step reads all of its cache, and few replies
# come near the limit of 4096 codes.
_ROOM = 512
_SALT = 0x7A1CE2  # so that words and codes of one request are not drawn with the same random numbers


@dataclass(frozen=True)
class Talk:
    """How a reply is spoken: the options of ``talker=dict(...)``, with the published defaults (section 7.4).

    Attributes:
      temperature, top_k, top_p, repetition_penalty, seed: as in ``Sampling``, for codes instead of words.
      max_tokens: codes, 50 a second, at most; the Talker's context may cut the speech shorter.
    """

    temperature: float = 0.9
    top_k: int = 40
    top_p: float = 0.8
    repetition_penalty: float = 1.05
    max_tokens: int = 4096
    seed: int = 0

    @classmethod
    def create(cls, given: Mapping[str, Any], config: OmniConfig) -> Talk:
        """From a caller's options.

        Raises:
          InputError: for no dict, an unknown name, a value out of range, or more codes than Token2Wav takes at once.
        """
        if not isinstance(given, Mapping):
            raise InputError(f"talker is {given!r}; it must be a dict of options")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise InputError(f"unknown talker option {', '.join(unknown)}; known: {', '.join(known)}")
        talk = cls(**given)
        dit = config.token2wav_config.dit_config
        most = dit.max_position_embeddings // dit.repeats
        if not 1 <= talk.max_tokens <= most:
            raise InputError(f"talker max_tokens is {talk.max_tokens}; it must be at least 1 and at most {most}")
        try:
            _ = talk.sampling
        except InputError as e:
            raise InputError(f"talker {e}") from e
        return talk

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed)


@dataclass(frozen=True)
class SpeechRequest:
    """What the loop needs to know of one row.

    Attributes:
      prompt: what the Thinker read.
      reply: how many tokens the Thinker said, its end mark included. The last of them was never read and is not
        spoken; a reply of one token or none has no codes.
      speaker: the text id that begins a reply in the voice (``Voice.bos_token``).
      talk: the options.
    """

    prompt: Prompt
    reply: int
    speaker: int
    talk: Talk


@struct.dataclass
class SpeechState:
    """A batch in the middle of its speech; every shape is fixed, so one program serves all steps."""

    logits: Float[Array, "B V"]  # of the next code
    position: Int[Array, " B"]  # its position id
    cache: KVCache
    sampling: SamplingState
    left: Int[Array, " B"]  # codes each row may still say; 0: it has ended
    text: Float[Array, "B R E"]  # the share of the text of each code to come; the last row stands for all after it


class SpeechLoop:
    """The jitted functions around a Talker and its parameters. It holds no state of any request."""

    def __init__(
        self,
        model: Talker,
        params: Any,
        config: OmniConfig,
        words: Callable[[np.ndarray], jax.Array],
        *,
        mesh: Mesh | None = None,
        steps: int = 16,
    ):
        """Compiles nothing yet.

        Args:
          model, params: the Talker and its parameters.
          config: of the whole model; Token2Wav's says which codes exist.
          words: the Thinker's embeddings of text ids (``TextLoop.words``).
          mesh: over which the parameters are spread.
          steps: how many codes one jitted call makes at most.
        """
        self.params = params
        self._config, self._words, self._mesh, self._steps = config, words, mesh, steps
        self._prefill = jax.jit(functools.partial(_prefill, model), static_argnames="slots")
        self._advance = jax.jit(functools.partial(_advance, model, steps), donate_argnums=1)
        self._grow = jax.jit(KVCache.grown, static_argnums=1)

    def speak(self, heard: Conditioning, requests: Sequence[SpeechRequest]) -> list[np.ndarray]:
        """Speaks a batch of replies; returns each request's codes up to its end, int32 [codes].

        Args:
          heard: what the Thinker read and said, of the requests' rows and maybe of more.
          requests: one a row.

        Raises:
          CheckpointError: if a voice begins with an id that the Thinker has not.
        """
        state, made = self.start(heard, requests), []
        while np.asarray(state.left).any():
            codes, state = self.advance(state)
            made.append(codes)
        rows = np.concatenate(made, axis=1) if made else np.zeros((len(requests), 0), np.int32)
        return [row[row != NOTHING] for row in rows[: len(requests)]]

    def start(self, heard: Conditioning, requests: Sequence[SpeechRequest]) -> SpeechState:
        """Reads prompts and the first token of the replies. Rows beyond the requests hold nothing and end at once."""
        c, rows = self._config.talker_config, heard.prompt.shape[0]
        spans, segment_ids = self._layout([r.prompt for r in requests], rows)
        left = np.zeros(rows, np.int32)
        for i, r in enumerate(requests):
            room = max(c.max_position_embeddings - len(r.prompt) - 2, 0)
            left[i] = min(r.talk.max_tokens, room) if r.reply > 1 else 0
        idle = [0] * (rows - len(requests))
        reply = np.array([*(r.reply for r in requests), *idle], np.int32)
        marks = self._marks([*(r.speaker for r in requests), *idle])
        slots = bucket(segment_ids.shape[1] + min(int(left.max()), _ROOM), smallest=64)
        with on_mesh(self._mesh):
            filled = self._prefill(self.params, heard, marks, reply, spans, segment_ids, slots=slots)
        logits, position, cache, text = jax.block_until_ready(filled)
        samplings = [dataclasses.replace(r.talk.sampling, seed=r.talk.seed ^ _SALT) for r in requests]
        # the ids that stand for the prompt when repetition is counted (section 7.2)
        before = np.array([c.tts_codec_mask_token_id, c.tts_codec_pad_token_id, c.tts_codec_start_token_id])
        samplings += [Sampling()] * len(idle)
        sampling = SamplingState.create(samplings, [before] * rows, c.vocab_size, barred_codes(self._config))
        return SpeechState(logits, position, cache, sampling, left, text)

    def advance(self, state: SpeechState) -> tuple[np.ndarray, SpeechState]:
        """One jitted call: up to ``steps`` codes of each row, [B, steps], and the state after them.

        NOTHING stands from a row's end on. The state that is given is used up.
        """
        needed = int(np.max(state.cache.end)) + min(self._steps, int(np.max(state.left)))
        slots = state.cache.slots
        if needed > slots:
            slots = bucket(max(needed, 2 * slots), smallest=64)
            with on_mesh(self._mesh):
                state = dataclasses.replace(state, cache=self._grow(state.cache, slots))
        with on_mesh(self._mesh):
            made, state = self._advance(self.params, state)
        return np.asarray(made), state

    def _layout(self, prompts: Sequence[Prompt], rows: int) -> tuple[Spans, np.ndarray]:
        """Positions and padding: the voice and the first token of the reply follow each prompt as text does (7.3)."""
        lengths = np.array([*map(len, prompts), *[0] * (rows - len(prompts))])
        width = bucket(int(lengths.max()) + 2, SMALLEST_ROW)
        begin = width - 2 - lengths
        segments = [*(p.segments for p in prompts), *[()] * (rows - len(prompts))]
        spans = [
            positions.resolve((*own, positions.Text(2)), self._config.thinker_config, begin=int(first))
            for own, first in zip(segments, begin, strict=True)
        ]
        return positions.stack(spans, width), (np.arange(width) >= begin[:, None]).astype(np.int32)

    def _marks(self, speakers: Sequence[int]) -> jax.Array:
        """Embeddings of each row's voice, of the end of the text and of what follows, [B, 3, E]."""
        c, vocab = self._config.talker_config, self._config.thinker_config.text_config.vocab_size
        wrong = [s for s in speakers if not 0 <= s < vocab]
        if wrong:
            raise CheckpointError(f"the voice begins with the text id {wrong[0]}, but the Thinker has {vocab} ids")
        return self._words(np.array([[s, c.tts_text_end_token_id, c.tts_text_pad_token_id] for s in speakers]))


def barred_codes(config: OmniConfig) -> np.ndarray:
    """Which ids the Talker never says: its begin mark, and what Token2Wav has no row for and is no end. bool [V]"""
    c = config.talker_config
    barred = np.arange(c.vocab_size) >= config.token2wav_config.dit_config.num_embeds + 1
    barred[list(_ends(c))] = False
    barred[c.tts_codec_start_token_id] = True
    return barred


def _ends(config: TalkerConfig) -> tuple[int, int]:
    return config.tts_codec_pad_token_id, config.tts_codec_end_token_id


def _prefill(
    model: Talker,
    params: Any,
    heard: Conditioning,
    marks: Float[Array, "B 3 E"],
    reply: Int[Array, " B"],
    spans: Spans,
    segment_ids: Int[Array, "B T"],
    slots: int,
) -> tuple[jax.Array, jax.Array, KVCache, jax.Array]:
    """Logits of the first code, its position, the filled cache, and the shares of the text of all codes to come."""
    rows, width = segment_ids.shape
    c, prompt = model.config, heard.prompt
    spare = width - 2 - prompt.shape[1]  # both are padded on the left, to lengths of their own
    prompt = jnp.pad(prompt, ((0, 0), (spare, 0), (0, 0))) if spare > 0 else prompt[:, -spare:]
    text = jnp.concatenate([prompt, marks[:, :1], heard.reply[:, :1]], axis=1)
    codes = np.full((rows, width), NO_CODE, np.int32)
    codes[:, -2:] = c.tts_codec_pad_token_id, c.tts_codec_start_token_id
    cache = KVCache.empty(c, rows, slots, model.scan_layers, model.dtype)
    hidden, position, cache = call(model, "prefill", params, text, codes, spans, segment_ids, cache)
    shares = _shares(heard.reply, marks[:, 1:2], marks[:, 2:], reply[:, None, None] - 1)
    return call(model, "logits", params, hidden[:, -1]), position, cache, shares


def _shares(reply: Array, end: Array, padding: Array, last: Array) -> jax.Array:
    """The rows that go with the codes: r_1, r_2, ... up to the token before ``last``, the end, then padding."""
    token = jnp.arange(reply.shape[1])[:, None]
    text = jnp.where(token < last, reply, jnp.where(token == last, end, padding))
    return constrain(jnp.concatenate([text[:, 1:], padding], axis=1), "batch", None, "width")


def _advance(model: Talker, steps: int, params: Any, state: SpeechState) -> tuple[Int[Array, "B steps"], SpeechState]:
    """Says up to ``steps`` codes in every row that has not ended; leaves off as soon as none is left."""
    rows, shares, _ = state.text.shape

    def going(loop: tuple[jax.Array, jax.Array, SpeechState]) -> Bool[Array, ""]:
        step, _, state = loop
        return (step < steps) & jnp.any(state.left > 0)

    def one(loop: tuple[jax.Array, jax.Array, SpeechState]) -> tuple[jax.Array, jax.Array, SpeechState]:
        step, made, state = loop
        codes, sampling = sample(state.logits, state.sampling)
        going_on = (state.left > 0) & ~jnp.isin(codes, np.array(_ends(model.config)))
        made = made.at[:, step].set(jnp.where(going_on, codes, NOTHING))
        share = jnp.minimum(state.sampling.step, shares - 1)
        text = state.text[jnp.arange(rows), share]
        hidden, cache = call(model, "decode", params, text, codes, state.position, state.cache)
        logits, left = call(model, "logits", params, hidden), jnp.where(going_on, state.left - 1, 0)
        return step + 1, made, SpeechState(logits, state.position + 1, cache, sampling, left, state.text)

    made = jnp.full((rows, steps), NOTHING, jnp.int32)
    _, made, state = jax.lax.while_loop(going, one, (jnp.int32(0), made, state))
    return made, state
