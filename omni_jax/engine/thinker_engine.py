"""The Thinker's engine: prompts are prefilled chunk by chunk, then several tokens are decoded in each jitted call.

The jitted functions stand at module level with the Linen module as a static argument, so every engine of an equal
model in a process shares the compiled programs.

Letters: B slots, R slots of a prefix, C positions of a chunk, K tokens of a call, D hidden width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array, AudioBlocks, Spans, VisionFrames, bucket
from omni_jax.engine.decode_state import (
    PAD_TOKEN,
    Context,
    DecodeResult,
    advance_context,
    apply_method,
    commit,
    init_context,
    insert_context,
    insert_slot,
    jit_method,
    on_mesh,
    pack_result,
    resize_context,
    round_capacity,
    step_context,
    step_position_ids,
)
from omni_jax.engine.sampling import SamplingParams, SamplingState, init_sampling_state, make_sampling_state, sample
from omni_jax.models.thinker import Thinker
from omni_jax.mrope import position_ids
from omni_jax.processing.prefill_plan import NO_FEATURE, PrefillChunk
from omni_jax.sharding import constrain, host_sharding, replicate

MIN_STOP_IDS = 8  # ids that a slot has room for at least


@struct.dataclass
class ThinkerPrefix:
    """Dialogues that have been read, and not answered yet.

    ``talker_inputs`` is what the Talker needs of each token: the final hidden state and the embedding, added up, at the
    token's place in the cache. The embedding of a media token counts as zero (docs/reference.md, 7.2).
    """

    context: Context
    talker_inputs: Float[Array, "R capacity D"] | None  # where speech may follow


@struct.dataclass
class ThinkerState:
    """A batch of dialogues that are answered; every shape is fixed, so one program serves all steps."""

    context: Context
    talker_inputs: Float[Array, "B capacity D"] | None
    sampling: SamplingState
    remaining: Int[Array, " B"]  # tokens each slot may still decode; 0: it has finished
    num_tokens: Int[Array, " B"]  # of the reply so far
    stop_ids: Int[Array, "B stops"]  # ids that end a slot's reply, padded with PAD_TOKEN


@dataclass(frozen=True)
class TextRequest:
    """How a slot is to answer.

    Attributes:
      prompt: its token ids, for the penalty on repetition.
      sampling: how tokens are drawn.
      max_tokens: of the reply.
      stop_ids: ids that end the reply.
    """

    prompt: Int[np.ndarray, " S"]
    sampling: SamplingParams
    max_tokens: int
    stop_ids: tuple[int, ...]


class ThinkerEngine:
    """A Thinker and its parameters. It holds no state of any request.

    Attributes:
      params: of the Thinker.
      tokens_per_call: K, tokens that one call of ``decode`` makes at most.
    """

    def __init__(
        self,
        model: Thinker,
        params: Any,
        *,
        mesh: Mesh | None = None,
        tokens_per_call: int = 8,
        collect_talker_inputs: bool = False,
    ):
        """Compiles nothing yet.

        Args:
          model, params: the Thinker and its parameters.
          mesh: over which the parameters are sharded.
          tokens_per_call: K.
          collect_talker_inputs: whether speech may follow, so that ``talker_inputs`` are kept.
        """
        self.params = params
        self.tokens_per_call = tokens_per_call
        self._model = model
        self._config = model.config.text_config
        self._mesh = mesh
        self._placement = host_sharding(params, mesh)
        self._collect = collect_talker_inputs

    def encode(self, media: AudioBlocks | VisionFrames) -> jax.Array:
        """The features of sound or pictures, [features, D]."""
        method = "encode_audio" if isinstance(media, AudioBlocks) else "encode_vision"
        with on_mesh(self._mesh):
            return jit_method(self._model, method, self.params, media)

    def embed_tokens(self, ids: Int[Array, "*ids"]) -> jax.Array:
        """The embeddings of text ids, [*ids, D]."""
        with on_mesh(self._mesh):
            return jit_method(self._model, "embed_tokens", self.params, ids)

    def init_prefix(self, num_slots: int, capacity: int) -> ThinkerPrefix:
        """Dialogues of which nothing has been read.

        Args:
          num_slots: R.
          capacity: tokens of each that there is room for at least.
        """
        context = init_context(self._model, self._config, num_slots, capacity, self._placement, self._mesh)
        # a row as wide as the hidden state for each position, which text alone does not need
        talker_inputs = None
        if self._collect:
            with on_mesh(self._mesh):
                talker_inputs = _init_talker_inputs(self._model, num_slots, context.capacity)
            talker_inputs = commit(talker_inputs, self._placement, self._mesh)
        return ThinkerPrefix(context, talker_inputs)

    def init_state(self, num_slots: int, capacity: int) -> ThinkerState:
        """Slots that are all free; see ``init_prefix`` for the arguments."""
        prefix = self.init_prefix(num_slots, capacity)
        # nothing remains to be decoded, which is what makes a slot free
        none = np.zeros(num_slots, np.int32)
        stop_ids = np.full((num_slots, MIN_STOP_IDS), PAD_TOKEN, np.int32)
        # one transfer, and to where results of programs lie: else each program is compiled twice
        host = (init_sampling_state(num_slots, self._config.vocab_size), none, none, stop_ids)
        sampling, remaining, num_tokens, stop_ids = jax.device_put(host, self._placement)
        return ThinkerState(prefix.context, prefix.talker_inputs, sampling, remaining, num_tokens, stop_ids)

    def resize(self, state: ThinkerState, capacity: int) -> ThinkerState:
        """The same with room for so many tokens of each slot."""
        context, talker_inputs = self._resize(state.context, state.talker_inputs, capacity)
        return dataclasses.replace(state, context=context, talker_inputs=talker_inputs)

    def resize_prefix(self, prefix: ThinkerPrefix, capacity: int) -> ThinkerPrefix:
        """The same with room for so many tokens of each dialogue."""
        return ThinkerPrefix(*self._resize(prefix.context, prefix.talker_inputs, capacity))

    def prefill(self, prefix: ThinkerPrefix, chunk: PrefillChunk, features: Sequence[jax.Array]) -> ThinkerPrefix:
        """Reads a chunk of each prompt.

        Args:
          prefix: with room for the chunk; it is used up.
          chunk: of a plan.
          features: what ``encode`` gave for each of the plan's encoder inputs.
        """
        with on_mesh(self._mesh):
            x = jit_method(self._model, "embed_tokens", self.params, chunk.tokens)  # [R, C, D]
            # one program for each call of an encoder, since their features are arrays of different lengths
            for number, index in chunk.feature_index.items():
                x = _overlay_features(x, features[number], index)
            return prefill_chunk(self._model, self.params, prefix, chunk.spans, chunk.valid, x, chunk.is_media)

    def insert(self, state: ThinkerState, slot: int, prefix: ThinkerPrefix, request: TextRequest) -> ThinkerState:
        """Puts the first dialogue of a prefix into a slot, where it is to be answered.

        Args:
          state: it is used up.
          slot: whose dialogue is replaced.
          prefix: of any capacity; the one of the two with less is resized.
          request: how to answer.
        """
        # both must have one capacity: a copy between caches of equal shape is one program for each capacity
        state = self.resize(state, prefix.context.capacity)
        prefix = self.resize_prefix(prefix, state.context.capacity)
        # it never shrinks: the width is part of a shape, and each shape is a program
        width = bucket(len(request.stop_ids), state.stop_ids.shape[1])
        stop_ids = np.full((1, width), PAD_TOKEN, np.int32)
        stop_ids[0, : len(request.stop_ids)] = request.stop_ids
        sampling = make_sampling_state([request.sampling], [request.prompt], self._config.vocab_size)
        # one transfer for all, and committed to where the state lies: else the program is compiled twice
        host = (sampling, np.array([request.max_tokens], np.int32), stop_ids)
        sampling, remaining, stop_ids = jax.device_put(host, self._placement)
        with on_mesh(self._mesh):
            if width > state.stop_ids.shape[1]:
                state = _widen_stop_ids(state, width)
            return _insert(state, np.int32(slot), prefix, sampling, remaining, stop_ids)

    def decode(
        self, state: ThinkerState, num_tokens: int | None = None, finished: Bool[np.ndarray, " B"] | None = None
    ) -> tuple[ThinkerState, DecodeResult]:
        """Decodes some tokens of each slot in one jitted call.

        Args:
          state: with room for the tokens; it is used up.
          num_tokens: of a slot at most; K if None.
          finished: slots that decode no more, for a reason that the device does not know.

        Returns:
          The state after them, and the tokens [B, K]: those of a slot end with its stop id, if it has met one.
        """
        num_tokens = self.tokens_per_call if num_tokens is None else min(num_tokens, self.tokens_per_call)
        if finished is None:
            finished = np.zeros(len(state.remaining), bool)
        with on_mesh(self._mesh):
            # ``num_tokens`` is a traced scalar, so calls of all lengths are one program
            state, packed = decode_text(
                self._model, self.tokens_per_call, self.params, state, finished, np.int32(num_tokens)
            )
        return state, DecodeResult(packed)

    def _resize(self, context: Context, talker_inputs: Array | None, capacity: int) -> tuple[Context, Array | None]:
        capacity = round_capacity(capacity)
        # by doubling, so that few programs do it
        while context.capacity < capacity:
            doubled = 2 * context.capacity
            with on_mesh(self._mesh):
                context = resize_context(context, doubled)
                if talker_inputs is not None:
                    talker_inputs = resize_rows(talker_inputs, doubled)
        return context, talker_inputs


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init_talker_inputs(model: Thinker, num_slots: int, capacity: int) -> Float[jax.Array, "R capacity D"]:
    width = model.config.text_config.hidden_size
    return constrain(jnp.zeros((num_slots, capacity, width), model.dtype), "batch", None, "width")


@functools.partial(jax.jit, static_argnames="capacity")
def resize_rows(rows: Float[Array, "B N D"], capacity: int) -> Float[jax.Array, "B capacity D"]:
    """The same with zeros behind, up to ``capacity``."""
    return jnp.pad(rows, ((0, 0), (0, capacity - rows.shape[1]), (0, 0)))


@functools.partial(jax.jit, donate_argnums=0)
def _overlay_features(
    x: Float[Array, "R C D"], features: Float[Array, "features D"], index: Int[Array, "R C"]
) -> Float[jax.Array, "R C D"]:
    """Replaces embeddings by features where ``index`` says which."""
    # index 0 where there is no feature; the embedding stands there in the end
    taken = jnp.take(features, jnp.maximum(index, 0), axis=0)  # [R, C, D]
    is_feature = (index != NO_FEATURE)[..., None]  # [R, C, 1]
    return jnp.where(is_feature, taken.astype(x.dtype), x)


@functools.partial(jax.jit, static_argnames="width")
def _widen_stop_ids(state: ThinkerState, width: int) -> ThinkerState:
    spare = width - state.stop_ids.shape[1]
    return dataclasses.replace(state, stop_ids=jnp.pad(state.stop_ids, ((0, 0), (0, spare)), constant_values=PAD_TOKEN))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="prefix")
def prefill_chunk(
    model: Thinker,
    params: Any,
    prefix: ThinkerPrefix,
    spans: Spans,
    valid: Bool[Array, "R C"],
    x: Float[Array, "R C D"],
    is_media: Bool[Array, "R C"],
) -> ThinkerPrefix:
    """Reads a chunk behind what the cache holds.

    Args:
      model, params: the Thinker.
      prefix: with room for the chunk.
      spans: of the position ids.
      valid: which positions are real.
      x: embeddings, with the features of media over them.
      is_media: which of them are such features.
    """
    valid = jnp.asarray(valid)
    before = prefix.context
    ids, delta = position_ids(spans, valid.astype(jnp.int32), model.config.position_id_per_seconds)  # [3, R, C], [R]
    hidden, cache = apply_method(model, "extend", params, x, ids, valid, before.cache)  # [R, C, D]
    talker_inputs = prefix.talker_inputs
    # the Talker reads what the Thinker made of a position: features of media count in the hidden state alone
    if talker_inputs is not None:
        rows = hidden + jnp.where(is_media[..., None], 0, x)  # [R, C, D]
        talker_inputs = _write_rows(talker_inputs, rows, before.cache.lengths, valid)
    return ThinkerPrefix(advance_context(before, hidden, valid, delta, cache), talker_inputs)


@functools.partial(jax.jit, donate_argnames="state")
def _insert(
    state: ThinkerState,
    slot: Int[Array, ""],
    prefix: ThinkerPrefix,
    sampling: SamplingState,
    remaining: Int[Array, "1"],
    stop_ids: Int[Array, "1 stops"],
) -> ThinkerState:
    talker_inputs = state.talker_inputs
    if talker_inputs is not None:
        talker_inputs = insert_slot(talker_inputs, slot, prefix.talker_inputs)
    # the reply's counters start anew; what the slot held of a dialogue before is overwritten
    return ThinkerState(
        context=insert_context(state.context, slot, prefix.context),
        talker_inputs=talker_inputs,
        sampling=replicate(insert_slot(state.sampling, slot, sampling)),
        remaining=replicate(insert_slot(state.remaining, slot, remaining)),
        num_tokens=replicate(jnp.asarray(state.num_tokens).at[slot].set(0)),
        stop_ids=replicate(insert_slot(state.stop_ids, slot, stop_ids)),
    )


@functools.partial(jax.jit, static_argnames=("model", "tokens_per_call"), donate_argnames="state")
def decode_text(
    model: Thinker,
    tokens_per_call: int,
    params: Any,
    state: ThinkerState,
    finished: Bool[Array, " B"],
    num_tokens: Int[Array, ""],
) -> tuple[ThinkerState, Int[jax.Array, "B K+1"]]:
    """Decodes up to ``num_tokens`` in every slot that has not finished; ends as soon as all have.

    Returns:
      The state after them, and the array of a ``DecodeResult``.
    """

    def goes_on(loop: tuple[jax.Array, jax.Array, ThinkerState]) -> Bool[jax.Array, ""]:
        step, _, state = loop
        return (step < num_tokens) & jnp.any(state.remaining > 0)

    def decode_step(loop: tuple[jax.Array, jax.Array, ThinkerState]) -> tuple[jax.Array, jax.Array, ThinkerState]:
        step, tokens, state = loop
        state, new_tokens = _decode_token(model, params, state)
        return step + 1, tokens.at[:, step].set(new_tokens), state

    # stop strings are known to the host alone, so it says which slots they have ended
    state = dataclasses.replace(state, remaining=jnp.where(finished, 0, state.remaining))
    tokens = jnp.full((len(state.remaining), tokens_per_call), PAD_TOKEN, jnp.int32)  # [B, K]
    # the loop runs on the device: the host is waited for once in K tokens, not at each
    with jax.named_scope("decode_text"):
        _, tokens, state = jax.lax.while_loop(goes_on, decode_step, (jnp.int32(0), tokens, state))
    # counters are whole on every device: each host reads them, and the next call must find them where this one did
    context = dataclasses.replace(state.context, position=replicate(state.context.position))
    state = dataclasses.replace(
        state,
        context=context,
        sampling=replicate(state.sampling),
        remaining=replicate(state.remaining),
        num_tokens=replicate(state.num_tokens),
        stop_ids=replicate(state.stop_ids),
    )
    return state, pack_result(tokens, state.remaining)


def _decode_token(model: Thinker, params: Any, state: ThinkerState) -> tuple[ThinkerState, Int[jax.Array, " B"]]:
    """One token of every slot that has not finished; ``PAD_TOKEN`` in the others."""
    before = state.context
    active = state.remaining > 0  # [B]
    # the hidden state is that of the prompt's last position, or of the token before
    logits = apply_method(model, "logits", params, before.hidden)  # [B, V]
    with jax.named_scope("sample"):
        # slots that have finished are computed too, and their results dropped: shapes are fixed
        tokens, sampling = sample(logits, state.sampling, active)  # [B]
    # a stop id is decoded and kept, so that the Talker learns of the end; nothing follows it
    is_stop = jnp.any(tokens[:, None] == state.stop_ids, axis=1)  # [B]
    x = apply_method(model, "embed_tokens", params, tokens)[:, None]  # [B, 1, D]
    valid = active[:, None]
    ids = step_position_ids(before)  # [3, B, 1]
    hidden, cache = apply_method(model, "extend", params, x, ids, valid, before.cache)  # [B, 1, D]
    talker_inputs = state.talker_inputs
    if talker_inputs is not None:
        # at the index where the cache has written the token: its length before this step
        talker_inputs = _write_rows(talker_inputs, hidden + x, before.cache.lengths, valid)
    after = dataclasses.replace(
        state,
        context=step_context(before, hidden, active, cache),
        talker_inputs=talker_inputs,
        sampling=sampling,
        # 0 in a slot that was not active, as before
        remaining=jnp.where(active & ~is_stop, state.remaining - 1, 0),
        num_tokens=state.num_tokens + active,
    )
    return after, jnp.where(active, tokens, PAD_TOKEN)


def _write_rows(
    talker_inputs: Float[Array, "B capacity D"],
    rows: Float[Array, "B C D"],
    lengths: Int[Array, " B"],
    valid: Bool[Array, "B C"],
) -> Float[jax.Array, "B capacity D"]:
    """``talker_inputs`` with these rows behind the ``lengths`` that the cache held before them."""
    capacity = talker_inputs.shape[1]
    places = jnp.asarray(lengths)[:, None] + jnp.arange(rows.shape[1])  # [B, C]
    places = jnp.where(valid, places, capacity)  # out of bounds, so that padding is dropped
    slots = jnp.arange(rows.shape[0])[:, None]  # [B, 1]
    return jnp.asarray(talker_inputs).at[slots, places].set(rows.astype(talker_inputs.dtype), mode="drop")
