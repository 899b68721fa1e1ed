"""The jitted functions of the Talker's engine, and the state that they work on.

The Linen module is a static argument, so every engine of an equal model in a process shares the compiled programs.

Letters: B slots of the Talker, T slots of the Thinker, R slots of a prefix, C positions of a chunk, K codes of a call,
E width of the Thinker, N tokens of a reply.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array, Spans
from omni_jax.config import OmniConfig, TalkerConfig
from omni_jax.engine.decode_state import (
    PAD_TOKEN,
    Context,
    advance_context,
    apply_method,
    insert_context,
    pack_result,
    step_context,
    step_position_ids,
)
from omni_jax.engine.sampling import SamplingState, sample, select_slots
from omni_jax.models.talker import NO_CODE, Talker
from omni_jax.models.talker_conditioning import (
    NUM_SPECIAL,
    TEXT_VOICE,
    begin_codes,
    gather_rows,
    num_text_rows,
    select_text,
    text_part,
)
from omni_jax.mrope import position_ids
from omni_jax.sharding import constrain, replicate

NO_SLOT = -1  # in place of a slot of the Thinker's where there is none

# larger than any count, and far enough from the end of int32 to be added to
UNKNOWN = 2**30  # in place of a number of tokens that is not known yet, or has no bound


@struct.dataclass
class TalkerState:
    """A batch in the middle of its speech; every shape is fixed, so one program serves all steps."""

    context: Context
    sampling: SamplingState
    remaining: Int[Array, " B"]  # codes each slot may still decode; 0: it has not begun, or has finished
    special_embeds: Float[Array, "B 3 E"]  # of ``talker_conditioning.special_tokens``
    # hidden state and token embedding, added up, of a clip's text and then of the reply; N is the capacity
    reply_embeds: Float[Array, "B N E"]
    num_clip_rows: Int[Array, " B"]  # tokens of a clip's text that are in it
    num_reply_embeds: Int[Array, " B"]  # tokens of the reply that are in it


@struct.dataclass
class TextCounters:
    """How far the Thinker has come, on the device."""

    num_tokens: Int[Array, " T"]  # of the reply so far
    remaining: Int[Array, " T"]  # tokens that may still be decoded; 0: the reply is complete


def suppressed_codes(config: OmniConfig) -> Bool[np.ndarray, " V"]:
    """Ids that the Talker never draws: its begin mark, and those that Token2Wav has no row for and that are no end."""
    c = config.talker_config
    # the reference draws such codes and then fails on them (docs/reference.md, 7.4)
    suppressed = np.arange(c.vocab_size) >= config.token2wav_config.dit_config.num_embeds + 1
    # an end is never spoken, so it needs no row
    suppressed[end_codes(c)] = False
    suppressed[c.tts_codec_start_token_id] = True
    return suppressed


def end_codes(config: TalkerConfig) -> Int[np.ndarray, " 2"]:
    """Ids that end the speech."""
    # two: with the end mark alone, speech may not stop (docs/reference.md, 10)
    return np.array([config.tts_codec_pad_token_id, config.tts_codec_end_token_id], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init_embeds(model: Talker, num_slots: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """``special_embeds`` and ``reply_embeds`` that hold nothing."""
    width = model.config.embedding_size
    special_embeds = jnp.zeros((num_slots, NUM_SPECIAL, width), model.dtype)
    reply_embeds = jnp.zeros((num_slots, capacity, width), model.dtype)
    return constrain(special_embeds, "batch", None, "width"), constrain(reply_embeds, "batch", None, "width")


jit_gather_rows = jax.jit(gather_rows)


@functools.partial(jax.jit, static_argnums=2)
def take_slot(talker_inputs: Array, slot: Int[Array, ""], num_slots: int) -> jax.Array:
    # a copy, so that the slot can be given to the next request
    one = jax.lax.dynamic_slice_in_dim(jnp.asarray(talker_inputs), slot, 1)  # [1, capacity, E]
    # a mesh may need more slots in a prefix; only the first one's rows are read
    return jnp.broadcast_to(one, (num_slots, *one.shape[1:]))


@functools.partial(jax.jit, donate_argnums=0)
def insert_prefix(state: TalkerState, slot: Int[Array, ""], prefix: Context) -> TalkerState:
    # the slot decodes nothing before ``begin_speech``
    # rows of the reply that was here before stay in ``reply_embeds``: with a count of 0 they are not read
    return dataclasses.replace(
        state,
        context=insert_context(state.context, slot, prefix),
        remaining=replicate(jnp.asarray(state.remaining).at[slot].set(0)),
        num_reply_embeds=replicate(jnp.asarray(state.num_reply_embeds).at[slot].set(0)),
        num_clip_rows=replicate(jnp.asarray(state.num_clip_rows).at[slot].set(0)),
    )


@functools.partial(jax.jit, donate_argnums=0)
def insert_clip_rows(
    state: TalkerState, slot: Int[Array, ""], rows: Float[Array, "R W E"], num_rows: Int[Array, ""]
) -> TalkerState:
    """Puts the first dialogue's rows, so many of W, before those of a slot's reply, of which there are none yet."""
    reply_embeds = jnp.asarray(state.reply_embeds)
    own = jnp.asarray(rows)[0].astype(reply_embeds.dtype)  # [W, E]
    return dataclasses.replace(
        state,
        # those behind ``num_rows`` are not read before the reply's are written over them
        reply_embeds=reply_embeds.at[slot, : len(own)].set(own),
        num_clip_rows=replicate(jnp.asarray(state.num_clip_rows).at[slot].set(num_rows)),
    )


@struct.dataclass
class AppendPlan:
    """Which tokens of the Thinker's slots are appended."""

    places: Int[Array, "T width"]  # in ``talker_inputs``
    count: Int[Array, " B"]  # tokens that each slot takes


@functools.partial(jax.jit, static_argnums=0)
def plan_append(
    width: int,
    num_reply_embeds: Int[Array, " B"],
    num_tokens: Int[Array, " T"],
    thinker_slot: Int[Array, " B"],
    prompt_length: Int[Array, " B"],
) -> AppendPlan:
    num_tokens = jnp.asarray(num_tokens)
    thinker_slot = jnp.asarray(thinker_slot)
    follows = thinker_slot != NO_SLOT  # [B]
    # what a call cannot take is left for the next one
    available = num_tokens[jnp.maximum(thinker_slot, 0)] - num_reply_embeds  # [B]
    count = jnp.where(follows, jnp.clip(available, 0, width), 0)  # [B]
    first = prompt_length + num_reply_embeds  # [B], of the tokens that are taken
    # the gather stays within each slot of the Thinker's, whose slots may lie on other devices than the Talker's
    target = jnp.where(follows, thinker_slot, len(num_tokens))  # out of bounds, so that it is dropped
    places = jnp.zeros((len(num_tokens), width), jnp.int32)
    places = places.at[target].set(first[:, None] + jnp.arange(width), mode="drop")  # [T, width]
    return AppendPlan(places, count.astype(jnp.int32))


@functools.partial(jax.jit, donate_argnums=0)
def append_rows(
    state: TalkerState, rows: Float[Array, "T width E"], count: Int[Array, " B"], thinker_slot: Int[Array, " B"]
) -> TalkerState:
    reply_embeds = jnp.asarray(state.reply_embeds)
    num_slots, capacity = reply_embeds.shape[:2]
    # a slot that follows none takes the rows of slot 0, and its count of 0 drops them
    new = jnp.asarray(rows)[jnp.maximum(thinker_slot, 0)].astype(reply_embeds.dtype)  # [B, width, E]
    offset = jnp.arange(rows.shape[1])  # [width]
    places = (state.num_clip_rows + state.num_reply_embeds)[:, None] + offset  # [B, width]
    places = jnp.where(offset < count[:, None], places, capacity)  # out of bounds, so that it is dropped
    slots = jnp.arange(num_slots)[:, None]  # [B, 1]
    return dataclasses.replace(
        state,
        reply_embeds=reply_embeds.at[slots, places].set(new, mode="drop"),
        num_reply_embeds=replicate(state.num_reply_embeds + count),
    )


@functools.partial(jax.jit, static_argnames="model", donate_argnames="prefix")
def prefill_chunk(
    model: Talker,
    params: Any,
    prefix: Context,
    text: Float[Array, "R C E"],
    spans: Spans,
    valid: Bool[Array, "R C"],
) -> Context:
    """Reads a chunk of the prompts behind what the cache holds; no position has a code."""
    # not the embedding of a code, although the penalty counts the prompt as such (docs/reference.md, 10)
    codes = jnp.full(valid.shape, NO_CODE)
    return _extend(model, params, prefix, text, codes, spans, valid)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def begin_speech(
    model: Talker,
    params: Any,
    state: TalkerState,
    is_new: Bool[Array, " B"],
    special_embeds: Float[Array, "B 3 E"],
    spans: Spans,
    sampling: SamplingState,
    remaining: Int[Array, " B"],
) -> TalkerState:
    is_new = jnp.asarray(is_new)
    special_embeds = jnp.where(is_new[:, None, None], special_embeds, state.special_embeds)
    # two positions: the voice, then the reply's first token
    voice = special_embeds[:, TEXT_VOICE : TEXT_VOICE + 1]  # [B, 1, E]
    text = jnp.concatenate([voice, state.reply_embeds[:, :1]], axis=1)  # [B, 2, E]
    codes = jnp.broadcast_to(begin_codes(model.config), (len(is_new), 2))  # [B, 2]
    # slots that do not begin read nothing, which leaves their context as it is
    valid = jnp.broadcast_to(is_new[:, None], codes.shape)  # [B, 2]
    return dataclasses.replace(
        state,
        context=_extend(model, params, state.context, text, codes, spans, valid),
        sampling=replicate(select_slots(is_new, sampling, state.sampling)),
        remaining=replicate(jnp.where(is_new, remaining, state.remaining)),
        special_embeds=special_embeds,
    )


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def read_clip_codes(
    model: Talker,
    params: Any,
    state: TalkerState,
    codes: Int[Array, "B C"],
    valid: Bool[Array, "B C"],
    num_rows: Int[Array, " B"],
) -> TalkerState:
    """Reads codes of clips as ``decode_codes`` reads those that it has drawn; they are counted as steps, too.

    Args:
      model, params: the Talker.
      state: of slots that have started; it is donated.
      codes: the next ones of each slot's clip.
      valid: which of them there are; they come first.
      num_rows: of each slot's text in all, or more than it can have where the text goes on.
    """
    valid = jnp.asarray(valid)
    text = next_text_inputs(state, codes.shape[1], num_rows)  # [B, C, E]
    ids = step_position_ids(state.context) + jnp.arange(codes.shape[1])  # [3, B, C]
    inputs = (text, codes, ids, valid, state.context.cache)
    hidden, cache = apply_method(model, "extend", params, *inputs)  # [B, C, D]
    # ids count up by one, so the next one is as far from the number of codes as the first
    context = advance_context(state.context, hidden, valid, jnp.asarray(state.context.position), cache)
    count = jnp.sum(valid, axis=1, dtype=jnp.int32)  # [B]
    sampling = dataclasses.replace(state.sampling, step=state.sampling.step + count)
    return dataclasses.replace(state, context=context, sampling=replicate(sampling))


def _extend(
    model: Talker,
    params: Any,
    context: Context,
    text: Float[Array, "B C E"],
    codes: Int[Array, "B C"],
    spans: Spans,
    valid: Bool[Array, "B C"],
) -> Context:
    valid = jnp.asarray(valid)
    ids, delta = position_ids(spans, valid.astype(jnp.int32), model.config.position_id_per_seconds)  # [3, B, C], [B]
    hidden, cache = apply_method(model, "extend", params, text, codes, ids, valid, context.cache)  # [B, C, D]
    return advance_context(context, hidden, valid, delta, cache)


@functools.partial(jax.jit, static_argnames=("model", "codes_per_call"), donate_argnames="state")
def decode_codes(
    model: Talker,
    codes_per_call: int,
    params: Any,
    state: TalkerState,
    suppressed: Bool[Array, " V"],
    thinker_slot: Int[Array, " B"],
    num_tokens: Int[Array, " B"],
    finished: Bool[Array, " B"],
    counters: TextCounters,
) -> tuple[TalkerState, Int[jax.Array, "B K+1"]]:
    """Decodes codes in every slot as far as its text allows; ends as soon as no slot has more to decode.

    Args:
      model, params: the Talker.
      codes_per_call: K.
      state: it is donated.
      suppressed: codes that are never drawn.
      thinker_slot, num_tokens, finished: of ``TextProgress``.
      counters: of the Thinker.

    Returns:
      The state after them, and the array of a ``DecodeResult``.
    """
    # the Thinker's counters are read here and not on the host, so that this call need not wait for its result
    follows = thinker_slot != NO_SLOT  # [B]
    slot = jnp.maximum(thinker_slot, 0)
    num_tokens = jnp.where(follows, jnp.asarray(counters.num_tokens)[slot], num_tokens)  # [B]
    finished = jnp.where(follows, jnp.asarray(counters.remaining)[slot] == 0, finished)  # [B]
    # while the text goes on, its last token so far may turn out to be its last, which is not spoken
    allowed = jnp.where(finished, UNKNOWN, jnp.maximum(num_tokens - 2, 0) + state.num_clip_rows)  # [B]
    # each code takes a row of its own, and ``step`` of the rows have been taken
    ready = jnp.minimum(allowed - state.sampling.step, codes_per_call)  # [B]
    # rows for the whole call are gathered here, and not one by one in the loop
    num_rows = jnp.where(finished, num_text_rows(num_tokens) + state.num_clip_rows, UNKNOWN)  # [B]
    text = next_text_inputs(state, codes_per_call, num_rows)  # [B, K, E]
    tokens = jnp.full((len(ready), codes_per_call), PAD_TOKEN, jnp.int32)  # [B, K]

    def goes_on(loop: tuple[jax.Array, jax.Array, TalkerState]) -> Bool[jax.Array, ""]:
        step, _, state = loop
        return jnp.any((state.remaining > 0) & (step < ready))

    def decode_step(loop: tuple[jax.Array, jax.Array, TalkerState]) -> tuple[jax.Array, jax.Array, TalkerState]:
        step, tokens, state = loop
        active = (state.remaining > 0) & (step < ready)  # [B]
        state, codes = _decode_code(model, params, state, suppressed, text[:, step], active)
        return step + 1, tokens.at[:, step].set(codes), state

    with jax.named_scope("decode_codes"):
        _, tokens, state = jax.lax.while_loop(goes_on, decode_step, (jnp.int32(0), tokens, state))
    # counters are whole on every device, as after ``decode_text``
    state = dataclasses.replace(
        state,
        context=dataclasses.replace(state.context, position=replicate(state.context.position)),
        sampling=replicate(state.sampling),
        remaining=replicate(state.remaining),
    )
    return state, pack_result(tokens, state.remaining)


def next_text_inputs(state: TalkerState, count: int, num_rows: Int[Array, " B"]) -> Float[jax.Array, "B K E"]:
    """What goes with the next codes: the text's rows from the second on, of so many, and what follows them."""
    # the first row was read with the voice, so code m goes with row m + 1
    token = jnp.asarray(state.sampling.step)[:, None] + 1 + jnp.arange(count)  # [B, K]
    rows = gather_rows(state.reply_embeds, token)  # [B, K, E]
    return select_text(rows, text_part(token, jnp.asarray(num_rows)[:, None]), state.special_embeds)


def _decode_code(
    model: Talker,
    params: Any,
    state: TalkerState,
    suppressed: Bool[Array, " V"],
    text: Float[Array, "B E"],
    active: Bool[Array, " B"],
) -> tuple[TalkerState, Int[jax.Array, " B"]]:
    """One code of every active slot; ``PAD_TOKEN`` where there is none or it is an end."""
    before = state.context
    # the logits of the last position are made when they are needed, so a slot may wait here for its text
    logits = apply_method(model, "logits", params, before.hidden)  # [B, V]
    with jax.named_scope("sample"):
        codes, sampling = sample(logits, state.sampling, active, suppressed)  # [B]
    # an end is read like any code, but is not returned: Token2Wav never gets it
    is_end = jnp.isin(codes, end_codes(model.config))  # [B]
    ids = step_position_ids(before)  # [3, B, 1]
    valid = active[:, None]
    # the next position: the code that was just drawn, and one more row of the text
    inputs = (text[:, None], codes[:, None], ids, valid, before.cache)
    hidden, cache = apply_method(model, "extend", params, *inputs)  # [B, 1, D]
    remaining = jnp.where(is_end, 0, state.remaining - 1)  # [B]
    after = dataclasses.replace(
        state,
        context=step_context(before, hidden, active, cache),
        sampling=sampling,
        remaining=jnp.where(active, remaining, state.remaining),
    )
    return after, jnp.where(active & ~is_end, codes, PAD_TOKEN)
