"""The Thinker's jitted programs: its parameters and state go in, the state comes out.

They stand at module level with the Linen module as a static argument, so every engine of an equal model in a process
shares the compiled programs.

Letters: B slots, R slots of a prefix or blocks of a call, C positions of a chunk or block, K tokens of a call, D hidden
width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array, Spans
from omni_jax.engine.decode_state import (
    PAD_TOKEN,
    Context,
    advance_context,
    apply_method,
    insert_context,
    insert_slot,
    pack_result,
    step_context,
    step_position_ids,
)
from omni_jax.engine.sampling import SamplingState, sample
from omni_jax.models.decoder import KVCache
from omni_jax.models.talker_conditioning import talker_rows
from omni_jax.models.thinker import Thinker
from omni_jax.mrope import position_ids
from omni_jax.processing.prefill_plan import NO_FEATURE
from omni_jax.sharding import constrain, replicate


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
    given_tokens: Int[Array, "B capacity"]  # of a reply that is given, by position; PAD_TOKEN: the model's is taken


@struct.dataclass
class BlockPlaces:
    """Where blocks of prompts belong."""

    slot: Int[Array, " R"]
    start: Int[Array, " R"]  # index in the slot of a block's first position


@struct.dataclass
class ReplyStart:
    """How one slot is to answer, in the arrays of a ``ThinkerState``."""

    sampling: SamplingState
    remaining: Int[Array, "1"]
    stop_ids: Int[Array, "1 stops"]
    given_tokens: Int[Array, "1 capacity"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init_talker_inputs(model: Thinker, num_slots: int, capacity: int) -> Float[jax.Array, "R capacity D"]:
    width = model.config.text_config.hidden_size
    return constrain(jnp.zeros((num_slots, capacity, width), model.dtype), "batch", None, "width")


@functools.partial(jax.jit, static_argnames="capacity")
def resize_rows(rows: Float[Array, "B N D"], capacity: int) -> Float[jax.Array, "B capacity D"]:
    """The same with zeros behind, up to ``capacity``."""
    return jnp.pad(rows, ((0, 0), (0, capacity - rows.shape[1]), (0, 0)))


@functools.partial(jax.jit, donate_argnums=0)
def overlay_features(
    x: Float[Array, "R C D"], features: Float[Array, "features D"], index: Int[Array, "R C"]
) -> Float[jax.Array, "R C D"]:
    """Replaces embeddings by features where ``index`` says which."""
    # index 0 where there is no feature; the embedding stands there in the end
    taken = jnp.take(features, jnp.maximum(index, 0), axis=0)  # [R, C, D]
    is_feature = (index != NO_FEATURE)[..., None]  # [R, C, 1]
    return jnp.where(is_feature, taken.astype(x.dtype), x)


@functools.partial(jax.jit, static_argnames="width")
def widen_stop_ids(state: ThinkerState, width: int) -> ThinkerState:
    spare = width - state.stop_ids.shape[1]
    return dataclasses.replace(state, stop_ids=jnp.pad(state.stop_ids, ((0, 0), (0, spare)), constant_values=PAD_TOKEN))


@functools.partial(jax.jit, static_argnames="capacity")
def resize_tokens(tokens: Int[Array, "B N"], capacity: int) -> Int[jax.Array, "B capacity"]:
    """The same with ``PAD_TOKEN`` behind, up to ``capacity``."""
    return replicate(jnp.pad(tokens, ((0, 0), (0, capacity - tokens.shape[1])), constant_values=PAD_TOKEN))


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
    if talker_inputs is not None:
        rows = talker_rows(hidden, x, is_media)  # [R, C, D]
        slots = jnp.arange(len(rows))
        talker_inputs = _write_rows(talker_inputs, rows, slots, before.cache.lengths, valid)
    return ThinkerPrefix(advance_context(before, hidden, valid, delta, cache), talker_inputs)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def prefill_blocks(
    model: Thinker,
    params: Any,
    state: ThinkerState,
    places: BlockPlaces,
    spans: Spans,
    valid: Bool[Array, "R C"],
    x: Float[Array, "R C D"],
    is_media: Bool[Array, "R C"],
    is_new: Bool[Array, " B"],
) -> ThinkerState:
    """Reads blocks of prompts into their slots; several blocks may be of one slot.

    Args:
      model, params: the Thinker.
      state: with room for the blocks.
      places: of the blocks.
      spans, valid, x, is_media: as of ``prefill_chunk``, a row for each block. A block that only fills up the call has
        no valid position.
      is_new: slots whose dialogue begins with these blocks.
    """
    valid = jnp.asarray(valid)
    context = state.context
    slot = jnp.asarray(places.slot)  # [R]
    # what a slot held of a dialogue before is overwritten
    lengths = jnp.where(is_new, 0, context.cache.lengths)  # [B]
    cache = dataclasses.replace(context.cache, lengths=lengths)
    ids, delta = position_ids(spans, valid.astype(jnp.int32), model.config.position_id_per_seconds)  # [3, R, C], [R]
    hidden, cache = apply_method(model, "extend_slots", params, x, ids, valid, slot, places.start, cache)  # [R, C, D]
    count = jnp.sum(valid, axis=1, dtype=jnp.int32)  # [R]
    has_read = count > 0
    # ids go on after the largest one of all blocks of the dialogue
    next_id = jnp.where(has_read, count + delta, 0)  # [R]
    position = jnp.where(is_new, 0, context.position).at[slot].max(next_id)  # [B]
    # the last real position of the last block of each slot
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]  # [R, D]
    is_last = has_read & (places.start + count == cache.lengths[slot])  # [R]
    num_slots = len(lengths)
    last_hidden = jnp.asarray(context.hidden).at[jnp.where(is_last, slot, num_slots)].set(last, mode="drop")  # [B, D]
    talker_inputs = state.talker_inputs
    if talker_inputs is not None:
        rows = talker_rows(hidden, x, is_media)  # [R, C, D]
        talker_inputs = _write_rows(talker_inputs, rows, slot, places.start, valid)
    context = Context(last_hidden, replicate(position), cache)
    return dataclasses.replace(state, context=context, talker_inputs=talker_inputs)


@functools.partial(jax.jit, donate_argnames="state")
def copy_prefix(
    state: ThinkerState, source: Int[Array, ""], target: Int[Array, ""], length: Int[Array, ""]
) -> ThinkerState:
    """Slot ``target`` with the first ``length`` positions of ``source``, which are text."""
    context = state.context
    # whole slots: what lies behind the length is overwritten before it is seen
    cache = context.cache.copy_slot(source, target)
    lengths = replicate(jnp.asarray(cache.lengths).at[target].set(length))
    # the ids of text count its tokens
    position = replicate(jnp.asarray(context.position).at[target].set(length))
    context = dataclasses.replace(context, position=position, cache=dataclasses.replace(cache, lengths=lengths))
    talker_inputs = state.talker_inputs
    if talker_inputs is not None:
        talker_inputs = jnp.asarray(talker_inputs).at[target].set(talker_inputs[source])
    return dataclasses.replace(state, context=context, talker_inputs=talker_inputs)


@functools.partial(jax.jit, donate_argnames="state")
def insert_prefix(state: ThinkerState, slot: Int[Array, ""], prefix: ThinkerPrefix, reply: ReplyStart) -> ThinkerState:
    """Puts the first dialogue of a prefix, which has the same capacity, into a slot that is to answer it."""
    talker_inputs = state.talker_inputs
    if talker_inputs is not None:
        talker_inputs = insert_slot(talker_inputs, slot, prefix.talker_inputs)
    context = insert_context(state.context, slot, prefix.context)
    state = dataclasses.replace(state, context=context, talker_inputs=talker_inputs)
    return _begin_reply(state, slot, reply)


@functools.partial(jax.jit, donate_argnames="state")
def begin_reply(state: ThinkerState, slot: Int[Array, ""], reply: ReplyStart) -> ThinkerState:
    """Has a slot answer whose prompt has been read into it."""
    return _begin_reply(state, slot, reply)


def _begin_reply(state: ThinkerState, slot: Int[Array, ""], reply: ReplyStart) -> ThinkerState:
    # the reply's counters start anew
    return dataclasses.replace(
        state,
        sampling=replicate(insert_slot(state.sampling, slot, reply.sampling)),
        remaining=replicate(insert_slot(state.remaining, slot, reply.remaining)),
        num_tokens=replicate(jnp.asarray(state.num_tokens).at[slot].set(0)),
        stop_ids=replicate(insert_slot(state.stop_ids, slot, reply.stop_ids)),
        given_tokens=replicate(insert_slot(state.given_tokens, slot, reply.given_tokens)),
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
        given_tokens=replicate(state.given_tokens),
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
    # where the reply is given, the token at the index that the cache writes next
    length = jnp.asarray(before.cache.lengths)[:, None]  # [B, 1]
    given = jnp.take_along_axis(state.given_tokens, length, axis=1, mode="fill", fill_value=PAD_TOKEN)[:, 0]  # [B]
    tokens = jnp.where(given == PAD_TOKEN, tokens, given)
    # a stop id is decoded and kept, so that the Talker learns of the end; nothing follows it
    is_stop = jnp.any(tokens[:, None] == state.stop_ids, axis=1)  # [B]
    x = apply_method(model, "embed_tokens", params, tokens)[:, None]  # [B, 1, D]
    valid = active[:, None]
    ids = step_position_ids(before)  # [3, B, 1]
    hidden, cache = _extend_by_one(model, params, x, ids, valid, before.cache)  # [B, 1, D]
    talker_inputs = state.talker_inputs
    if talker_inputs is not None:
        # at the index where the cache has written the token: its length before this step
        slots = jnp.arange(len(active))
        talker_inputs = _write_rows(talker_inputs, talker_rows(hidden, x), slots, before.cache.lengths, valid)
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


def _extend_by_one(
    model: Thinker,
    params: Any,
    x: Float[Array, "B 1 D"],
    ids: Int[Array, "3 B 1"],
    valid: Bool[Array, "B 1"],
    cache: KVCache,
) -> tuple[Float[jax.Array, "B 1 D"], KVCache]:
    """``extend`` by one position of every slot."""
    # TPUs' compiler multiplies a single row by kernels of another layout, for which it copies those of all layers;
    # a second row, of padding, costs nothing there. Single layers are the form of CPUs, where it would
    num_padding = 1 if len(x) == 1 and model.scan_layers else 0
    if num_padding:
        x = jnp.pad(x, ((0, 0), (0, num_padding), (0, 0)))  # [1, 2, D]
        ids = jnp.pad(ids, ((0, 0), (0, 0), (0, num_padding)))  # [3, 1, 2]
        valid = jnp.pad(valid, ((0, 0), (0, num_padding)))  # [1, 2]
    hidden, cache = apply_method(model, "extend", params, x, ids, valid, cache)
    return hidden[:, :1], cache


def _write_rows(
    talker_inputs: Float[Array, "B capacity D"],
    rows: Float[Array, "R C D"],
    slot: Int[Array, " R"],
    start: Int[Array, " R"],
    valid: Bool[Array, "R C"],
) -> Float[jax.Array, "B capacity D"]:
    """``talker_inputs`` with these rows in their slots, from ``start`` on."""
    capacity = talker_inputs.shape[1]
    places = jnp.asarray(start)[:, None] + jnp.arange(rows.shape[1])  # [R, C]
    places = jnp.where(valid, places, capacity)  # out of bounds, so that padding is dropped
    slots = jnp.asarray(slot)[:, None]  # [R, 1]
    return jnp.asarray(talker_inputs).at[slots, places].set(rows.astype(talker_inputs.dtype), mode="drop")
