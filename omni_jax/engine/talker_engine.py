"""The Talker's loop: what the Thinker read and said goes in as it comes, and codes come out, several a jitted call.

A row of the Talker's input carries a share of the text (section 7.2): the prompt's rows, one that names the voice, one
for each token of the reply but the last, then the mark that the text has ended, then padding for ever. The first token
of the reply is read with the prompt; from then on each code takes one more of these rows, until the Talker ends. So the
Talker may begin when the Thinker has said two tokens (the first is then known not to be the last), and it follows the
Thinker at a token a code.
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

from omni_jax.batch import Array, Spans
from omni_jax.checks import check_int
from omni_jax.config import OmniConfig, TalkerConfig
from omni_jax.engine.sampling import SamplingParams, SamplingState, put_row, sample
from omni_jax.engine.thinker_engine import PAD_TOKEN, call, on_mesh, place_after, room
from omni_jax.errors import CheckpointError, InputError
from omni_jax.models.decoder import KVCache
from omni_jax.models.talker import NO_CODE, Talker
from omni_jax.mrope import position_ids
from omni_jax.processing.prefill_plan import Chunk
from omni_jax.sharding import constrain, host_sharding, whole

_NEVER = 2**30  # in place of a token's number, while the end of the text is not known
STRIDE = 16  # tokens of a reply that are written to a script in one call
_SALT = 0x7A1CE2  # so that words and codes of one request are not drawn with the same random numbers


@dataclass(frozen=True)
class TalkerParams:
    """How a reply is spoken: the options of ``talker=dict(...)``, with the published defaults (section 7.4).

    Attributes:
      temperature, top_k, top_p, repetition_penalty, seed: as in ``SamplingParams``, for codes instead of words.
      max_tokens: codes, 50 a second, at most; the Talker's context may cut the speech shorter.
    """

    temperature: float = 0.9
    top_k: int = 40
    top_p: float = 0.8
    repetition_penalty: float = 1.05
    max_tokens: int = 4096
    seed: int | None = None

    @classmethod
    def create(cls, given: Mapping[str, Any], config: OmniConfig) -> TalkerParams:
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
        try:
            check_int("max_tokens", talk.max_tokens, 1, most)
            _ = talk.sampling
        except InputError as e:
            raise InputError(f"talker {e}") from e
        return talk

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed)


@dataclass(frozen=True)
class SpeechRequest:
    """What the loop needs to know of one row.

    Attributes:
      prompt: how many tokens the Thinker read before its reply.
      begin: where the reply begins in what the Talker hears.
      speaker: the text id that begins a reply in the voice (``Voice.bos_token``).
      talk: the options.
    """

    prompt: int
    begin: int
    speaker: int
    talk: TalkerParams


@dataclass(frozen=True)
class Said:
    """How far the Thinker has come with each row's reply.

    Attributes:
      begin: where the reply begins in what the Talker hears. int [B]
      tokens: of the reply that are known to be spoken, its end mark included. int [B]
      ended: whether no more follow. bool [B]
    """

    begin: np.ndarray
    tokens: np.ndarray
    ended: np.ndarray

    @property
    def last(self) -> np.ndarray:
        """The number of the reply's last token, which is not spoken: the mark of the end stands in its place."""
        return np.where(self.ended, self.tokens - 1, _NEVER).astype(np.int32)

    @property
    def codes(self) -> np.ndarray:
        """How many codes there are rows for. While the text goes on, its last token known may turn out its last one."""
        return np.where(self.ended, _NEVER, np.maximum(self.tokens - 2, 0)).astype(np.int32)


@struct.dataclass
class SpeechState:
    """A batch in the middle of its speech; every shape is fixed, so one program serves all steps."""

    hidden: Float[Array, "B D"]  # of the last row that was read
    position: Int[Array, " B"]  # the position id of the next one
    cache: KVCache
    sampling: SamplingState
    left: Int[Array, " B"]  # codes each row may still say; 0: it has not started, or it has ended
    marks: Float[Array, "B 3 E"]  # the voice, the end of the text, and what follows it


class TalkerEngine:
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
          words: the Thinker's embeddings of text ids (``ThinkerEngine.words``).
          mesh: over which the parameters are spread.
          steps: how many codes one jitted call makes at most.
        """
        self.params, self.steps, self._model = params, steps, model
        self._config, self._words, self._mesh, self._place = config, words, mesh, host_sharding(params, mesh)
        started = None if mesh is not None else self._place
        self._empty = jax.jit(functools.partial(empty_rows, model), static_argnums=(0, 1), out_shardings=started)
        self._grow = jax.jit(KVCache.grown, static_argnums=1)
        self._rows = jax.jit(_rows)
        self._shares = jax.jit(functools.partial(_shares, steps))
        self._put = jax.jit(_put, donate_argnums=0)
        self._script = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=host_sharding(params, mesh))
        self._longer = jax.jit(lambda script: jnp.pad(script, ((0, 0), (0, script.shape[1]), (0, 0))))
        self._write = jax.jit(_write, donate_argnums=0)
        self._alone = jax.jit(_alone, static_argnums=2)
        self._read = jax.jit(functools.partial(_read, model), donate_argnums=1)
        self._begin = jax.jit(functools.partial(_begin, model), donate_argnums=1)
        self._advance = jax.jit(functools.partial(decode_codes, model), donate_argnums=1)

    def empty(self, rows: int, slots: int) -> SpeechState:
        """Rows that have read nothing, with room for so much of each."""
        with on_mesh(self._mesh):
            hidden, cache, marks = self._empty(rows, room(slots))
        none = np.zeros(rows, np.int32)
        position, sampling, left = jax.device_put((none, self._sampling([SamplingParams()] * rows), none), self._place)
        return SpeechState(hidden, position, cache, sampling, left, marks)

    def grown(self, state: SpeechState, slots: int) -> SpeechState:
        """The same with room for so much of each row."""
        while state.cache.slots < slots:  # a step at a time, so that few programs do it
            with on_mesh(self._mesh):
                state = dataclasses.replace(state, cache=self._grow(state.cache, 2 * state.cache.slots))
        return state

    def put(self, state: SpeechState, row: int, other: SpeechState) -> SpeechState:
        """The first row of ``other``, as it is, in place of one of ``state``; see ``ThinkerEngine.put``."""
        state, other = self.grown(state, other.cache.slots), self.grown(other, state.cache.slots)
        with on_mesh(self._mesh):
            return self._put(state, np.int32(row), other)

    def script(self, rows: int) -> jax.Array:
        """What rows hear of their replies, [B, tokens, E]: nothing yet. It is longer than a reply where that begins."""
        with on_mesh(self._mesh):
            return self._script((rows, room(1), self._model.config.embedding_size), self._model.dtype)

    def alone(self, heard: Float[Array, "T slots E"], row: int, rows: int) -> jax.Array:
        """What the Thinker read and said in one of its rows, for a batch of ``rows`` of which that is the first."""
        with on_mesh(self._mesh):
            return self._alone(heard, np.int32(row), rows)

    def written(
        self,
        script: Float[jax.Array, "B tokens E"],
        heard: Float[Array, "T slots E"],
        source: Int[np.ndarray, " B"],
        place: Int[np.ndarray, " B"],
        begin: Int[np.ndarray, " B"],
    ) -> jax.Array:
        """The script with ``STRIDE`` more tokens of some rows.

        Args:
          script: it is used up.
          heard: what the Thinker read and said.
          source: the Thinker's row that each row of the Talker follows; -1 for none.
          place: where in it the row's reply begins.
          begin: the number of the first token that is written. What lies behind the last one known has no meaning yet.
        """
        while script.shape[1] < int((begin + STRIDE)[source >= 0].max(initial=0)):
            script = self._longer(script)
        places = np.zeros((heard.shape[0], STRIDE), np.int32)
        followed = source >= 0
        places[source[followed]] = (place + begin)[followed][:, None] + np.arange(STRIDE)
        with on_mesh(self._mesh):
            rows = self._rows(heard, places)
            return self._write(script, rows, source.astype(np.int32), begin.astype(np.int32))

    def read(self, state: SpeechState, heard: Float[Array, "B slots E"], chunk: Chunk) -> SpeechState:
        """Reads a chunk of the prompts, which the Thinker has read. The state that is given is used up."""
        places = np.asarray(state.cache.end)[:, None] + np.arange(chunk.tokens.shape[1], dtype=np.int32)
        with on_mesh(self._mesh):
            return self._read(self.params, state, self._rows(heard, places), chunk.spans, chunk.valid)

    def begin(
        self,
        state: SpeechState,
        heard: Float[Array, "B slots E"],
        requests: Mapping[int, SpeechRequest],
        spans: Spans,
    ) -> SpeechState:
        """Reads the voice and the first token of the reply, whereupon rows can speak.

        Args:
          state: rows that have read their prompts. It is used up.
          heard: what the Thinker read and said.
          requests: of the rows that begin.
          spans: of these two position ids, for every row.

        Raises:
          CheckpointError: if a voice begins with an id that the Thinker has not.
        """
        c, rows = self._config.talker_config, state.position.shape[0]
        samplings, left = [SamplingParams()] * rows, np.array(state.left)
        speakers, begins = np.zeros(rows, np.int32), np.zeros((rows, 1), np.int32)
        for i, r in requests.items():
            # words and codes of one request are not to be drawn with the same random numbers
            samplings[i] = dataclasses.replace(r.talk.sampling, seed=(r.talk.seed or 0) ^ _SALT)
            left[i] = min(r.talk.max_tokens, max(c.max_position_embeddings - r.prompt - 2, 0))
            speakers[i], begins[i] = r.speaker, r.begin
        new = np.isin(np.arange(rows), list(requests))
        state, marks = self.grown(state, int(np.max(state.cache.end)) + 2), self._marks(speakers)
        with on_mesh(self._mesh):
            state = self._begin(self.params, state, marks, self._rows(heard, begins), spans, new)
        sampling = state.sampling.replaced(self._sampling(samplings), new)
        sampling, left = jax.device_put((sampling, left), self._place)
        return dataclasses.replace(state, sampling=sampling, left=left)

    def ready(self, state: SpeechState, said: Said) -> np.ndarray:
        """How many codes each row could say now. int [B]"""
        return np.minimum(np.asarray(state.left), np.maximum(said.codes - np.asarray(state.sampling.step), 0))

    def advance(
        self, state: SpeechState, heard: Float[Array, "B slots E"], said: Said, steps: int | None = None
    ) -> tuple[np.ndarray, SpeechState]:
        """One jitted call: up to ``steps`` codes of each row, as far as the text has come, and the state after them.

        Args:
          state: it is used up.
          heard: what the Thinker read and said.
          said: how much of it.
          steps: as many as the loop makes at most if None.

        Returns:
          The codes [B, the loop's steps], PAD_TOKEN where a row had none to say; and the state.
        """
        steps = self.steps if steps is None else min(steps, self.steps)
        ready = np.minimum(self.ready(state, said), steps).astype(np.int32)
        state = self.grown(state, int(np.max(state.cache.end)) + int(ready.max()))
        with on_mesh(self._mesh):
            shares = self._shares(heard, said.begin.astype(np.int32), state.sampling.step, said.last, state.marks)
            made, state = self._advance(self.params, state, shares, ready)
        return np.asarray(made), state

    def _sampling(self, rows: Sequence[SamplingParams]) -> SamplingState:
        c = self._config.talker_config
        # the ids that stand for the prompt when repetition is counted (section 7.2)
        before = np.array([c.tts_codec_mask_token_id, c.tts_codec_pad_token_id, c.tts_codec_start_token_id])
        return SamplingState.create(rows, [before] * len(rows), c.vocab_size, suppressed_codes(self._config))

    def _marks(self, speakers: np.ndarray) -> jax.Array:
        """Embeddings of each row's voice, of the end of the text and of what follows, [B, 3, E]."""
        c, vocab = self._config.talker_config, self._config.thinker_config.text_config.vocab_size
        wrong = speakers[(speakers < 0) | (speakers >= vocab)]
        if wrong.size:
            raise CheckpointError(f"the voice begins with the text id {wrong[0]}, but the Thinker has {vocab} ids")
        ends = np.broadcast_to([c.tts_text_end_token_id, c.tts_text_pad_token_id], (len(speakers), 2))
        return self._words(np.concatenate([speakers[:, None], ends], axis=1).astype(np.int32))


def suppressed_codes(config: OmniConfig) -> np.ndarray:
    """Which ids the Talker never says: its begin mark, and what Token2Wav has no row for and is no end. bool [V]"""
    c = config.talker_config
    suppressed = np.arange(c.vocab_size) >= config.token2wav_config.dit_config.num_embeds + 1
    suppressed[list(_ends(c))] = False
    suppressed[c.tts_codec_start_token_id] = True
    return suppressed


def _ends(config: TalkerConfig) -> tuple[int, int]:
    return config.tts_codec_pad_token_id, config.tts_codec_end_token_id


def empty_rows(model: Talker, rows: int, slots: int) -> tuple[jax.Array, KVCache, jax.Array]:
    """``hidden``, ``cache`` and ``marks`` of a state that holds nothing."""
    c = model.config
    cache = KVCache.empty(c, rows, slots, model.scan_layers, model.dtype)
    marks = constrain(jnp.zeros((rows, 3, c.embedding_size), model.dtype), "batch", None, "width")
    return constrain(jnp.zeros((rows, c.hidden_size), model.dtype), "batch", "width"), cache, marks


def _put(state: SpeechState, row: Int[Array, ""], other: SpeechState) -> SpeechState:
    rest = [f.name for f in dataclasses.fields(SpeechState) if f.name not in ("cache", "sampling")]
    mine, theirs = ({name: getattr(x, name) for name in rest} for x in (state, other))
    cache, sampling = state.cache.put(row, other.cache), state.sampling.put(row, other.sampling)
    made = dataclasses.replace(state, **put_row(mine, row, theirs), cache=cache, sampling=sampling)
    position, sampling, left = whole((made.position, made.sampling, made.left))
    return dataclasses.replace(made, position=position, sampling=sampling, left=left)


def _rows(heard: Array, places: Int[Array, "B C"]) -> jax.Array:
    """What the Thinker gives at these places, [B, C, E]; anything behind its end."""
    return jnp.take_along_axis(jnp.asarray(heard), jnp.asarray(places)[..., None], axis=1, mode="clip")


def _alone(heard: Array, row: Int[Array, ""], rows: int) -> jax.Array:
    one = jax.lax.dynamic_slice_in_dim(jnp.asarray(heard), row, 1)
    return jnp.broadcast_to(one, (rows, *one.shape[1:]))


def _write(script: Array, rows: Float[Array, "T n E"], source: Int[Array, " B"], begin: Int[Array, " B"]) -> jax.Array:
    script, n = jnp.asarray(script), rows.shape[1]
    new = jnp.asarray(rows)[jnp.maximum(source, 0)].astype(script.dtype)
    place = jnp.where((source >= 0)[:, None], begin[:, None] + jnp.arange(n), script.shape[1])
    return script.at[jnp.arange(len(script))[:, None], place].set(new, mode="drop")


def _shares(steps: int, heard: Array, begin: Array, step: Array, last: Array, marks: Array) -> jax.Array:
    """The rows that go with the next codes: of the tokens r_1, r_2, ... before ``last``, the end, then padding."""
    token = jnp.asarray(step)[:, None] + 1 + jnp.arange(steps)
    rows = _rows(heard, jnp.asarray(begin)[:, None] + token)
    token, last = token[..., None], jnp.asarray(last)[:, None, None]
    return jnp.where(token < last, rows, jnp.where(token == last, marks[:, 1:2], marks[:, 2:]))


def _read(
    model: Talker, params: Any, state: SpeechState, text: Float[Array, "B C E"], spans: Spans, valid: Bool[Array, "B C"]
) -> SpeechState:
    return _extend(model, params, state, text, jnp.full(valid.shape, NO_CODE), spans, valid)


def _begin(
    model: Talker,
    params: Any,
    state: SpeechState,
    marks: Float[Array, "B 3 E"],
    first: Float[Array, "B 1 E"],
    spans: Spans,
    new: Bool[Array, " B"],
) -> SpeechState:
    c, rows = model.config, len(marks)
    state = dataclasses.replace(state, marks=jnp.where(jnp.asarray(new)[:, None, None], marks, state.marks))
    codes = jnp.broadcast_to(jnp.array([c.tts_codec_pad_token_id, c.tts_codec_start_token_id]), (rows, 2))
    text = jnp.concatenate([marks[:, :1], first], axis=1)
    return _extend(model, params, state, text, codes, spans, jnp.broadcast_to(jnp.asarray(new)[:, None], (rows, 2)))


def _extend(
    model: Talker, params: Any, state: SpeechState, text: Array, codes: Array, spans: Spans, valid: Array
) -> SpeechState:
    valid = jnp.asarray(valid)
    ids, delta = position_ids(spans, valid.astype(jnp.int32), model.config.position_id_per_seconds)
    hidden, cache = call(model, "extend", params, text, codes, ids, valid, state.cache)
    last, position = place_after(state.hidden, state.position, hidden, valid, delta)
    return dataclasses.replace(state, hidden=last, position=position, cache=cache)


def decode_codes(
    model: Talker, params: Any, state: SpeechState, shares: Float[Array, "B steps E"], ready: Int[Array, " B"]
) -> tuple[Int[Array, "B steps"], SpeechState]:
    """Says ``ready`` codes in every row that does not end before; leaves off as soon as none is left."""
    rows, most, _ = shares.shape

    def going(loop: tuple[jax.Array, jax.Array, SpeechState]) -> Bool[Array, ""]:
        step, _, state = loop
        return jnp.any((state.left > 0) & (step < ready))

    def one(loop: tuple[jax.Array, jax.Array, SpeechState]) -> tuple[jax.Array, jax.Array, SpeechState]:
        step, made, state = loop
        active = (state.left > 0) & (step < ready)
        codes, sampling = sample(call(model, "logits", params, state.hidden), state.sampling, active)
        ended = jnp.isin(codes, np.array(_ends(model.config)))
        made = made.at[:, step].set(jnp.where(active & ~ended, codes, PAD_TOKEN))
        text, valid = shares[:, step][:, None], active[:, None]
        ids = jnp.broadcast_to(jnp.asarray(state.position)[None, :, None], (3, rows, 1))
        hidden, cache = call(model, "extend", params, text, codes[:, None], ids, valid, state.cache)
        after = dataclasses.replace(
            state,
            hidden=jnp.where(valid, hidden[:, 0], state.hidden),
            position=state.position + active,
            cache=cache,
            sampling=sampling,
            left=jnp.where(active, jnp.where(ended, 0, state.left - 1), state.left),
        )
        return step + 1, made, after

    made = jnp.full((rows, most), PAD_TOKEN, jnp.int32)
    _, made, state = jax.lax.while_loop(going, one, (jnp.int32(0), made, state))
    position, sampling, left = whole((state.position, state.sampling, state.left))
    return whole(made), dataclasses.replace(state, position=position, sampling=sampling, left=left)
