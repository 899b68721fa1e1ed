"""The Thinker's loop: the prompt in chunks, as far as it is known, then several words in each jitted call.

Rows stand on their own: each has its place in the cache, may read while another speaks, and stands still when it has
nothing to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array, AudioBlocks, VisionFrames, bucket
from omni_jax.engine.sampling import SamplingParams, SamplingState, put_row, sample
from omni_jax.models.decoder import KVCache
from omni_jax.models.thinker import Thinker
from omni_jax.mrope import position_ids
from omni_jax.processing.prefill_plan import Chunk, Stretch
from omni_jax.sharding import constrain, host_sharding, replicate

PAD_TOKEN = -1  # in place of a token, after a row has ended

_ROOM = 256  # slots of a cache at least; it doubles as a dialogue goes on
_STOPS = 8  # ids that end a row at least


@struct.dataclass
class TextState:
    """A batch of dialogues; every shape is fixed, so one program serves all steps.

    ``heard`` is what the Talker needs: the final hidden state and the embedding of each token, added up, in the slots
    of the cache. The embedding of a media token counts as zero (section 7.2).
    """

    hidden: Float[Array, "B D"]  # of the last token that was read
    position: Int[Array, " B"]  # the position id of the next one
    cache: KVCache
    sampling: SamplingState
    left: Int[Array, " B"]  # tokens each row may still say; 0: it has ended
    stop: Int[Array, "B stops"]  # ids that end a row, padded with PAD_TOKEN
    heard: Float[Array, "B slots D"] | None  # where speech may follow


@dataclass(frozen=True)
class TextRequest:
    """What the loop needs to know of one row besides its prompt."""

    sampling: SamplingParams
    max_tokens: int
    stop_ids: tuple[int, ...]


class ThinkerEngine:
    """The jitted functions around a Thinker and its parameters. It holds no state of any request."""

    def __init__(self, model: Thinker, params: Any, *, mesh: Mesh | None = None, steps: int = 8, keep: bool = False):
        """Compiles nothing yet.

        Args:
          model, params: the Thinker and its parameters.
          mesh: over which the parameters are spread.
          steps: how many tokens one jitted call makes at most.
          keep: whether to collect in ``TextState.heard`` what speech needs.
        """
        self.params, self.steps, self.vocab = params, steps, model.config.text_config.vocab_size
        self._mesh, self._place = mesh, host_sharding(params, mesh)
        self._encode_audio = jax.jit(functools.partial(call, model, "encode_audio"))
        self._encode_vision = jax.jit(functools.partial(call, model, "encode_vision"))
        self._words = jax.jit(functools.partial(call, model, "embed_tokens"))
        self._overlay = jax.jit(_overlay, donate_argnums=0)
        started = None if mesh is not None else self._place
        self._empty = jax.jit(functools.partial(empty_rows, model, keep), static_argnums=(0, 1), out_shardings=started)
        self._grow = jax.jit(_grown, static_argnames="slots")
        self._put = jax.jit(_put, donate_argnums=0)
        self._read = jax.jit(functools.partial(read_chunk, model), donate_argnums=1)
        self._advance = jax.jit(functools.partial(decode_text, model, steps), donate_argnums=1)

    def encode(self, media: AudioBlocks | VisionFrames) -> jax.Array:
        """The features of sound or pictures, [features, D]."""
        with on_mesh(self._mesh):
            if isinstance(media, AudioBlocks):
                return self._encode_audio(self.params, media)
            return self._encode_vision(self.params, media)

    def embed_tokens(self, ids: Int[Array, "*rows"]) -> jax.Array:
        """The embeddings of text ids, [*rows, D]."""
        with on_mesh(self._mesh):
            return self._words(self.params, ids)

    def empty(self, rows: int, slots: int) -> TextState:
        """So many dialogues that have not started, with room for so many tokens of each."""
        with on_mesh(self._mesh):
            hidden, cache, heard = self._empty(rows, room(slots))
        sampling = SamplingState.create([SamplingParams()] * rows, [np.zeros(0, np.int32)] * rows, self.vocab)
        none, stop = np.zeros(rows, np.int32), np.full((rows, _STOPS), PAD_TOKEN, np.int32)
        position, sampling, left, stop = jax.device_put((none, sampling, none, stop), self._place)
        return TextState(hidden, position, cache, sampling, left, stop, heard)

    def grown(self, state: TextState, slots: int) -> TextState:
        """The same with room for so many tokens of each row."""
        while state.cache.capacity < slots:  # a step at a time, so that few programs do it
            with on_mesh(self._mesh):
                state = self._grow(state, slots=2 * state.cache.capacity)
        return state

    def put(self, state: TextState, row: int, other: TextState) -> TextState:
        """The first dialogue of ``other``, as it is, in place of one of ``state``, which is used up.

        Args:
          state, other: of any size; the one with fewer slots is grown.
          row: of ``state``.
        """
        state, other = self.grown(state, other.cache.capacity), self.grown(other, state.cache.capacity)
        stops = max(state.stop.shape[1], other.stop.shape[1])
        state, other = self._with_stops(state, stops), self._with_stops(other, stops)
        with on_mesh(self._mesh):
            return self._put(state, np.int32(row), other)

    def _with_stops(self, state: TextState, stops: int) -> TextState:
        more = stops - state.stop.shape[1]
        if not more:
            return state
        stop = np.pad(np.asarray(state.stop), ((0, 0), (0, more)), constant_values=PAD_TOKEN)
        return dataclasses.replace(state, stop=jax.device_put(stop, self._place))

    def read(self, state: TextState, stretch: Stretch, features: Sequence[jax.Array]) -> TextState:
        """Reads a chunk of each row's prompt. The state that is given is used up.

        Args:
          state: with room for the chunk.
          stretch: what to read.
          features: what ``encode`` gave for each call that the stretch counts.
        """
        with on_mesh(self._mesh):
            x = self._words(self.params, stretch.chunk.tokens)
            for number, index in stretch.takes.items():
                x = self._overlay(x, features[number], index)
            return self._read(self.params, state, stretch.chunk, x, stretch.media)

    def ask(
        self, state: TextState, requests: Mapping[int, TextRequest], prompts: Mapping[int, np.ndarray]
    ) -> TextState:
        """Says how rows are to answer what they have read.

        Args:
          state: rows that have read their prompts, and others, which stay as they are.
          requests: of the rows that begin to answer.
          prompts: the token ids of each of them, for the penalty on repetition.
        """
        rows = state.position.shape[0]
        samplings, before = [SamplingParams()] * rows, [np.zeros(0, np.int32)] * rows
        left, stop = np.array(state.left), np.array(state.stop)
        wider = bucket(max((len(r.stop_ids) for r in requests.values()), default=1), stop.shape[1])
        stop = np.pad(stop, ((0, 0), (0, wider - stop.shape[1])), constant_values=PAD_TOKEN)
        for i, r in requests.items():
            samplings[i], before[i], left[i] = r.sampling, prompts[i], r.max_tokens
            stop[i] = [*r.stop_ids, *[PAD_TOKEN] * (wider - len(r.stop_ids))]
        new = np.isin(np.arange(rows), list(requests))
        sampling = state.sampling.replaced(SamplingState.create(samplings, before, self.vocab), new)
        sampling, left, stop = jax.device_put((sampling, left, stop), self._place)
        return dataclasses.replace(state, sampling=sampling, left=left, stop=stop)

    def advance(
        self, state: TextState, steps: int | None = None, *, ended: Bool[np.ndarray, " B"] | None = None
    ) -> tuple[np.ndarray, TextState]:
        """One jitted call: some tokens of each row, and the state after them.

        Args:
          state: it is used up.
          steps: tokens of a row at most; as many as the loop makes in a call if None.
          ended: rows that say no more, for a reason of which the loop knows nothing.

        Returns:
          [B, the loop's steps]: a row's tokens end with its stop id, if it has met one, and PAD_TOKEN stands after the
          end. All rows have ended when nothing is ``left`` in the state.
        """
        steps = self.steps if steps is None else min(steps, self.steps)
        state = self.grown(state, int(np.max(state.cache.lengths)) + min(steps, int(np.max(state.left))))
        ended = np.zeros(state.left.shape, bool) if ended is None else ended
        with on_mesh(self._mesh):
            made, state = self._advance(self.params, state, ended, np.int32(steps))
        return np.asarray(made), state


def room(slots: int) -> int:
    """How many slots a cache gets that needs so many: a power of two, so that few programs serve all lengths."""
    return max(_ROOM, 1 << (slots - 1).bit_length())


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """In this context arrays are spread over ``mesh``; the same as none without one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def call(model: nn.Module, method: str, params: Any, *args: Any) -> Any:
    """Calls a method of a model with these parameters."""
    return model.apply({"params": params}, *args, method=method)


def _overlay(x: Array, features: Array, index: Array) -> jax.Array:
    """Puts features where ``index`` says which; -1 leaves the word."""
    media = jnp.take(features, jnp.maximum(index, 0), axis=0)
    return jnp.where((index >= 0)[..., None], media.astype(x.dtype), x)


def empty_rows(model: Thinker, keep: bool, rows: int, slots: int) -> tuple[jax.Array, KVCache, jax.Array | None]:
    """``hidden``, ``cache`` and ``heard`` of a state that holds nothing; no ``heard`` unless ``keep``."""
    c = model.config.text_config
    cache = KVCache.init(c, rows, slots, model.scan_layers, model.dtype)
    heard = constrain(jnp.zeros((rows, slots, c.hidden_size), model.dtype), "batch", None, "width") if keep else None
    return constrain(jnp.zeros((rows, c.hidden_size), model.dtype), "batch", "width"), cache, heard


def _grown(state: TextState, slots: int) -> TextState:
    more = slots - state.cache.capacity
    heard = None if state.heard is None else jnp.pad(state.heard, ((0, 0), (0, more), (0, 0)))
    return dataclasses.replace(state, cache=state.cache.resize(slots), heard=heard)


def _put(state: TextState, row: Int[Array, ""], other: TextState) -> TextState:
    rest = [f.name for f in dataclasses.fields(TextState) if f.name not in ("cache", "sampling", "heard")]
    mine, theirs = ({name: getattr(x, name) for name in rest} for x in (state, other))
    heard = None if state.heard is None else put_row(state.heard, row, other.heard)
    cache, sampling = state.cache.insert(row, other.cache), state.sampling.put(row, other.sampling)
    made = dataclasses.replace(state, **put_row(mine, row, theirs), cache=cache, sampling=sampling, heard=heard)
    position, sampling, left, stop = replicate((made.position, made.sampling, made.left, made.stop))
    return dataclasses.replace(made, position=position, sampling=sampling, left=left, stop=stop)


def read_chunk(
    model: Thinker, params: Any, state: TextState, chunk: Chunk, x: Float[Array, "B C D"], media: Bool[Array, "B C"]
) -> TextState:
    """Reads a chunk, whose embeddings are ``x``; ``media`` says which of them are features of sound or pictures."""
    valid = jnp.asarray(chunk.valid)
    ids, delta = position_ids(chunk.spans, valid.astype(jnp.int32), model.config.position_id_per_seconds)
    hidden, cache = call(model, "extend", params, x, ids, valid, state.cache)
    heard = state.heard
    if heard is not None:
        heard = _kept(heard, hidden + jnp.where(media[..., None], 0, x), valid, state)
    last, position = place_after(state.hidden, state.position, hidden, valid, delta)
    return dataclasses.replace(state, hidden=last, position=position, cache=cache, heard=heard)


def place_after(
    before: Float[Array, "B D"],
    position: Int[Array, " B"],
    hidden: Float[Array, "B C D"],
    valid: Bool[Array, "B C"],
    delta: Int[Array, " B"],
) -> tuple[Float[jax.Array, "B D"], Int[jax.Array, " B"]]:
    """Where rows stand when they have read a chunk; one that read nothing stands where it stood.

    Args:
      before: the last hidden state of each row so far.
      position: the id of its next position so far.
      hidden: of the chunk.
      valid: which of it is real.
      delta: what ``position_ids`` gave for it.

    Returns:
      The last hidden state, and the next position id: a dialogue goes on after the largest id that it holds.
    """
    count = jnp.sum(valid, axis=1, dtype=jnp.int32)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    after = jnp.maximum(position, jnp.where(count > 0, count + delta, 0))
    return jnp.where((count > 0)[:, None], last, before), replicate(after)


def _kept(heard: Array, rows: Float[Array, "B C D"], valid: Bool[Array, "B C"], state: TextState) -> jax.Array:
    """``heard`` with these rows behind what the cache held before them."""
    slot = jnp.where(valid, jnp.asarray(state.cache.lengths)[:, None] + jnp.arange(rows.shape[1]), heard.shape[1])
    return jnp.asarray(heard).at[jnp.arange(rows.shape[0])[:, None], slot].set(rows.astype(heard.dtype), mode="drop")


def decode_text(
    model: Thinker, most: int, params: Any, state: TextState, over: Bool[Array, " B"], steps: Int[Array, ""]
) -> tuple[Int[Array, "B most"], TextState]:
    """Says up to ``steps`` tokens in every row that has not ended; leaves off as soon as none is left."""

    def going(loop: tuple[jax.Array, jax.Array, TextState]) -> Bool[Array, ""]:
        step, _, state = loop
        return (step < steps) & jnp.any(state.left > 0)

    def one(loop: tuple[jax.Array, jax.Array, TextState]) -> tuple[jax.Array, jax.Array, TextState]:
        step, made, state = loop
        active = state.left > 0
        tokens, sampling = sample(call(model, "logits", params, state.hidden), state.sampling, active)
        made = made.at[:, step].set(jnp.where(active, tokens, PAD_TOKEN))
        ended = jnp.any(tokens[:, None] == state.stop, axis=1)
        x, valid = call(model, "embed_tokens", params, tokens)[:, None], active[:, None]
        ids = jnp.broadcast_to(jnp.asarray(state.position)[None, :, None], (3, len(tokens), 1))
        hidden, cache = call(model, "extend", params, x, ids, valid, state.cache)
        after = dataclasses.replace(
            state,
            hidden=jnp.where(valid, hidden[:, 0], state.hidden),
            position=state.position + active,
            cache=cache,
            sampling=sampling,
            left=jnp.where(active & ~ended, state.left - 1, 0),
            heard=None if state.heard is None else _kept(state.heard, hidden + x, valid, state),
        )
        return step + 1, made, after

    made = jnp.full((state.position.shape[0], most), PAD_TOKEN, jnp.int32)
    state = dataclasses.replace(state, left=jnp.where(over, 0, state.left))
    _, made, state = jax.lax.while_loop(going, one, (jnp.int32(0), made, state))
    position, sampling, left, stop = replicate((state.position, state.sampling, state.left, state.stop))
    return replicate(made), dataclasses.replace(state, position=position, sampling=sampling, left=left, stop=stop)
