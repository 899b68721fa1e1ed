"""The Talker's engine: what the Thinker read and wrote goes in as it comes, and codes come out, several a jitted call.

Each position of the Talker's input carries something of the text (docs/reference.md, 7.2): the prompt's positions, one
that names the voice, one for each token of the reply but the last, then the mark that the text has ended, then padding
without end. The reply's first token is read together with the voice; from then on each code takes one more of these
inputs, until the Talker ends. So the Talker may begin once the Thinker has decoded two tokens (the first is then known
not to be the last), and it follows the Thinker at one token a code.

Letters: B slots of the Talker, T slots of the Thinker, R slots of a prefix, C positions of a chunk, K codes of a call,
E width of the Thinker, N tokens of a reply.
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

from omni_jax import mrope
from omni_jax.batch import Array, Spans
from omni_jax.config import OmniConfig, TalkerConfig
from omni_jax.engine.decode_state import (
    PAD_TOKEN,
    Context,
    DecodeResult,
    advance_context,
    apply_method,
    commit,
    init_context,
    insert_context,
    on_mesh,
    pack_result,
    resize_context,
    round_capacity,
    step_context,
    step_position_ids,
)
from omni_jax.engine.sampling import (
    SamplingParams,
    SamplingState,
    init_sampling_state,
    make_sampling_state,
    sample,
    select_slots,
)
from omni_jax.engine.thinker_engine import resize_rows
from omni_jax.errors import CheckpointError
from omni_jax.models.talker import NO_CODE, Talker
from omni_jax.mrope import Span, position_ids
from omni_jax.processing.prefill_plan import PrefillChunk
from omni_jax.sharding import constrain, host_sharding, replicate

NO_SLOT = -1  # in place of a slot of the Thinker's where there is none
APPEND_WIDTH = 16  # tokens of a reply that one call of ``append_reply`` takes at least

_UNKNOWN = 2**30  # in place of a number of tokens that is not known yet, or has no bound


@struct.dataclass
class TalkerState:
    """A batch in the middle of its speech; every shape is fixed, so one program serves all steps."""

    context: Context
    sampling: SamplingState
    remaining: Int[Array, " B"]  # codes each slot may still decode; 0: it has not begun, or has finished
    special_embeds: Float[Array, "B 3 E"]  # of the voice, of the end of the text, and of what follows it
    reply_embeds: Float[Array, "B N E"]  # of the reply: hidden state and token embedding, added up; N is the capacity
    num_reply_embeds: Int[Array, " B"]  # tokens of the reply that are in it


@dataclass(frozen=True)
class SpeechRequest:
    """How a slot is to speak.

    Attributes:
      prompt_length: tokens that the Thinker read before its reply.
      voice_token: the text id that a reply in the voice begins with (``Voice.bos_token``).
      sampling: how codes are drawn.
      max_codes: of the speech.
      span: of the two position ids behind the prompt.
    """

    prompt_length: int
    voice_token: int
    sampling: SamplingParams
    max_codes: int
    span: Span


@dataclass(frozen=True)
class TextProgress:
    """How far the text of each slot has come, as the host knows it.

    Attributes:
      thinker_slot: int [B], the slot of the Thinker's whose counters on the device hold instead, or ``NO_SLOT``.
      num_tokens: int [B], tokens of the reply that are known to be spoken, its end mark included.
      finished: bool [B], whether no more follow.
    """

    thinker_slot: Int[np.ndarray, " B"]
    num_tokens: Int[np.ndarray, " B"]
    finished: Bool[np.ndarray, " B"]


@struct.dataclass
class TextCounters:
    """How far the Thinker has come, on the device."""

    num_tokens: Int[Array, " T"]
    remaining: Int[Array, " T"]


class TalkerEngine:
    """A Talker and its parameters. It holds no state of any request.

    Attributes:
      params: of the Talker.
      codes_per_call: K, codes that one call of ``decode`` makes at most.
      append_width: tokens that one call of ``append_reply`` takes.
    """

    def __init__(
        self,
        model: Talker,
        params: Any,
        config: OmniConfig,
        embed_tokens: Callable[[np.ndarray], jax.Array],
        *,
        mesh: Mesh | None = None,
        codes_per_call: int = 16,
        append_width: int = APPEND_WIDTH,
    ):
        """Compiles nothing yet.

        Args:
          model, params: the Talker and its parameters.
          config: of the whole model; Token2Wav's part says which codes exist.
          embed_tokens: the Thinker's embeddings of text ids (``ThinkerEngine.embed_tokens``).
          mesh: over which the parameters are sharded.
          codes_per_call: K.
          append_width: at least as many tokens as the Thinker decodes in a call.
        """
        self.params = params
        self.codes_per_call = codes_per_call
        self.append_width = append_width
        self._model = model
        self._config = config
        self._embed_tokens = embed_tokens
        self._mesh = mesh
        self._placement = host_sharding(params, mesh)
        self._suppressed = jax.device_put(suppressed_codes(config), self._placement)

    def init_prefix(self, num_slots: int, capacity: int) -> Context:
        """Dialogues of which nothing has been read.

        Args:
          num_slots: R.
          capacity: positions of each that there is room for at least.
        """
        return init_context(self._model, self._model.config, num_slots, capacity, self._placement, self._mesh)

    def init_state(self, num_slots: int, capacity: int) -> TalkerState:
        """Slots that are all free; see ``init_prefix`` for the arguments."""
        context = self.init_prefix(num_slots, capacity)
        with on_mesh(self._mesh):
            embeds = _init_embeds(self._model, num_slots, context.capacity)
        special_embeds, reply_embeds = commit(embeds, self._placement, self._mesh)
        none = np.zeros(num_slots, np.int32)
        host = (init_sampling_state(num_slots, self._model.config.vocab_size), none, none)
        sampling, remaining, num_reply = jax.device_put(host, self._placement)
        return TalkerState(context, sampling, remaining, special_embeds, reply_embeds, num_reply)

    def resize(self, state: TalkerState, capacity: int) -> TalkerState:
        """The same with room for so many positions, and tokens of the reply, of each slot."""
        capacity = round_capacity(capacity)
        while state.context.capacity < capacity:  # by doubling, so that few programs do it
            doubled = 2 * state.context.capacity
            with on_mesh(self._mesh):
                context = resize_context(state.context, doubled)
                reply_embeds = resize_rows(state.reply_embeds, doubled)
            state = dataclasses.replace(state, context=context, reply_embeds=reply_embeds)
        return state

    def resize_prefix(self, prefix: Context, capacity: int) -> Context:
        """The same with room for so many positions."""
        capacity = round_capacity(capacity)
        while prefix.capacity < capacity:
            with on_mesh(self._mesh):
                prefix = resize_context(prefix, 2 * prefix.capacity)
        return prefix

    def prefill(
        self, prefix: Context, talker_inputs: Float[Array, "R capacity E"], chunk: PrefillChunk, start: int
    ) -> Context:
        """Reads a chunk of the prompts, which the Thinker has read.

        Args:
          prefix: with room for the chunk; it is used up.
          talker_inputs: of the Thinker's prefix.
          chunk: of the prompts' plan.
          start: tokens of the prompts before the chunk.
        """
        width = chunk.tokens.shape[1]
        places = np.broadcast_to(start + np.arange(width, dtype=np.int32), chunk.tokens.shape)
        with on_mesh(self._mesh):
            text = gather_rows(talker_inputs, places)  # [R, C, E]
            return prefill_chunk(self._model, self.params, prefix, text, chunk.spans, chunk.valid)

    def insert(self, state: TalkerState, slot: int, prefix: Context) -> TalkerState:
        """Puts the first dialogue of a prefix into a slot; it decodes nothing before ``begin``.

        Args:
          state: it is used up.
          slot: whose dialogue is replaced.
          prefix: of any capacity; the one of the two with less is resized.
        """
        state = self.resize(state, prefix.capacity)
        prefix = self.resize_prefix(prefix, state.context.capacity)
        with on_mesh(self._mesh):
            return _insert(state, np.int32(slot), prefix)

    def append_reply(
        self,
        state: TalkerState,
        talker_inputs: Float[Array, "T capacity E"],
        num_tokens: Int[Array, " T"],
        thinker_slot: Int[np.ndarray, " B"],
        prompt_length: Int[np.ndarray, " B"],
    ) -> TalkerState:
        """Takes up to ``append_width`` more tokens of the replies to ``reply_embeds``.

        Args:
          state: with room for them; it is used up.
          talker_inputs: of the Thinker's state.
          num_tokens: of each reply that are there.
          thinker_slot: the slot of the Thinker's that each slot follows, or ``NO_SLOT``.
          prompt_length: tokens before each reply.
        """
        with on_mesh(self._mesh):
            plan = _plan_append(self.append_width, state.num_reply_embeds, num_tokens, thinker_slot, prompt_length)
            rows = gather_rows(talker_inputs, plan.places)  # [T, width, E]
            return _append_reply(state, rows, plan.count, thinker_slot)

    def take_slot(
        self, talker_inputs: Float[Array, "T capacity E"], slot: int, num_slots: int
    ) -> Float[jax.Array, "R capacity E"]:
        """The inputs of one slot of the Thinker's, for a prefix of ``num_slots``, whose first it is."""
        with on_mesh(self._mesh):
            return _take_slot(talker_inputs, np.int32(slot), num_slots)

    def begin(self, state: TalkerState, requests: Mapping[int, SpeechRequest]) -> TalkerState:
        """Reads the voice and the first token of the reply, whereupon slots can decode codes.

        Args:
          state: with room for two more positions, and the first token in ``reply_embeds``; it is used up.
          requests: slot -> how it is to speak, of the slots that begin.

        Raises:
          CheckpointError: if a voice begins with an id that the Thinker does not have.
        """
        c = self._model.config
        num_slots = len(state.remaining)
        params = [SamplingParams()] * num_slots
        voice_tokens = np.zeros(num_slots, np.int32)
        remaining = np.zeros(num_slots, np.int32)
        spans: list[list[Span]] = [[] for _ in range(num_slots)]
        for slot, request in requests.items():
            params[slot] = request.sampling
            voice_tokens[slot] = request.voice_token
            room = max(c.max_position_embeddings - request.prompt_length - 2, 0)
            remaining[slot] = min(request.max_codes, room)
            spans[slot] = [request.span]
        is_new = np.isin(np.arange(num_slots), list(requests))
        table = mrope.stack(spans, 2, width=1)
        host = (self._make_sampling(params), remaining)
        sampling, remaining = jax.device_put(host, self._placement)
        special_embeds = self._special_embeds(voice_tokens)
        with on_mesh(self._mesh):
            return _begin(self._model, self.params, state, is_new, special_embeds, table, sampling, remaining)

    def decode(
        self, state: TalkerState, progress: TextProgress, counters: TextCounters
    ) -> tuple[TalkerState, DecodeResult]:
        """Decodes up to K codes of each slot in one jitted call, as far as its text has come.

        Args:
          state: with room for the codes; it is used up.
          progress: of the text, as the host knows it.
          counters: of the Thinker's slots, on the device.
        """
        with on_mesh(self._mesh):
            state, packed = decode_codes(
                self._model,
                self.codes_per_call,
                self.params,
                state,
                self._suppressed,
                progress.thinker_slot.astype(np.int32),
                progress.num_tokens.astype(np.int32),
                progress.finished,
                counters,
            )
        return state, DecodeResult(packed)

    def _make_sampling(self, params: Sequence[SamplingParams]) -> SamplingState:
        c = self._config.talker_config
        # ids that stand for the prompt where repetition is counted (docs/reference.md, 7.2)
        prompt = np.array([c.tts_codec_mask_token_id, c.tts_codec_pad_token_id, c.tts_codec_start_token_id])
        return make_sampling_state(params, [prompt] * len(params), c.vocab_size)

    def _special_embeds(self, voice_tokens: Int[np.ndarray, " B"]) -> Float[jax.Array, "B 3 E"]:
        c = self._config.talker_config
        vocab_size = self._config.thinker_config.text_config.vocab_size
        unknown = voice_tokens[(voice_tokens < 0) | (voice_tokens >= vocab_size)]
        if unknown.size:
            raise CheckpointError(
                f"the voice begins with the text id {unknown[0]}, but the Thinker has {vocab_size} ids"
            )
        ids = np.empty((len(voice_tokens), 3), np.int32)
        ids[:, 0] = voice_tokens
        ids[:, 1] = c.tts_text_end_token_id
        ids[:, 2] = c.tts_text_pad_token_id
        return self._embed_tokens(ids)


def suppressed_codes(config: OmniConfig) -> Bool[np.ndarray, " V"]:
    """Ids that the Talker never draws: its begin mark, and those that Token2Wav has no row for and that are no end."""
    c = config.talker_config
    suppressed = np.arange(c.vocab_size) >= config.token2wav_config.dit_config.num_embeds + 1
    suppressed[end_codes(c)] = False
    suppressed[c.tts_codec_start_token_id] = True
    return suppressed


def end_codes(config: TalkerConfig) -> Int[np.ndarray, " 2"]:
    """Ids that end the speech."""
    return np.array([config.tts_codec_pad_token_id, config.tts_codec_end_token_id], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init_embeds(model: Talker, num_slots: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """``special_embeds`` and ``reply_embeds`` that hold nothing."""
    width = model.config.embedding_size
    special_embeds = jnp.zeros((num_slots, 3, width), model.dtype)
    reply_embeds = jnp.zeros((num_slots, capacity, width), model.dtype)
    return constrain(special_embeds, "batch", None, "width"), constrain(reply_embeds, "batch", None, "width")


@jax.jit
def gather_rows(rows: Float[Array, "B N E"], places: Int[Array, "B C"]) -> Float[jax.Array, "B C E"]:
    """The rows at these places of each slot; places behind the end give the last row."""
    return jnp.take_along_axis(jnp.asarray(rows), jnp.asarray(places)[..., None], axis=1, mode="clip")


@functools.partial(jax.jit, static_argnums=2)
def _take_slot(talker_inputs: Array, slot: Int[Array, ""], num_slots: int) -> jax.Array:
    one = jax.lax.dynamic_slice_in_dim(jnp.asarray(talker_inputs), slot, 1)  # [1, capacity, E]
    return jnp.broadcast_to(one, (num_slots, *one.shape[1:]))


@functools.partial(jax.jit, donate_argnums=0)
def _insert(state: TalkerState, slot: Int[Array, ""], prefix: Context) -> TalkerState:
    return dataclasses.replace(
        state,
        context=insert_context(state.context, slot, prefix),
        remaining=replicate(jnp.asarray(state.remaining).at[slot].set(0)),
        num_reply_embeds=replicate(jnp.asarray(state.num_reply_embeds).at[slot].set(0)),
    )


@struct.dataclass
class _AppendPlan:
    """Which tokens of the Thinker's slots are appended."""

    places: Int[Array, "T width"]  # in ``talker_inputs``
    count: Int[Array, " B"]  # tokens that each slot takes


@functools.partial(jax.jit, static_argnums=0)
def _plan_append(
    width: int,
    num_reply_embeds: Int[Array, " B"],
    num_tokens: Int[Array, " T"],
    thinker_slot: Int[Array, " B"],
    prompt_length: Int[Array, " B"],
) -> _AppendPlan:
    num_tokens = jnp.asarray(num_tokens)
    thinker_slot = jnp.asarray(thinker_slot)
    follows = thinker_slot != NO_SLOT  # [B]
    available = num_tokens[jnp.maximum(thinker_slot, 0)] - num_reply_embeds
    count = jnp.where(follows, jnp.clip(available, 0, width), 0)
    first = prompt_length + num_reply_embeds  # [B], of the tokens that are taken
    # the gather stays within each slot of the Thinker's, whose slots may lie on other devices than the Talker's
    target = jnp.where(follows, thinker_slot, len(num_tokens))  # out of bounds, so that it is dropped
    places = jnp.zeros((len(num_tokens), width), jnp.int32)
    places = places.at[target].set(first[:, None] + jnp.arange(width), mode="drop")
    return _AppendPlan(places, count.astype(jnp.int32))


@functools.partial(jax.jit, donate_argnums=0)
def _append_reply(
    state: TalkerState, rows: Float[Array, "T width E"], count: Int[Array, " B"], thinker_slot: Int[Array, " B"]
) -> TalkerState:
    reply_embeds = jnp.asarray(state.reply_embeds)
    num_slots, capacity = reply_embeds.shape[:2]
    new = jnp.asarray(rows)[jnp.maximum(thinker_slot, 0)].astype(reply_embeds.dtype)  # [B, width, E]
    offset = jnp.arange(rows.shape[1])
    places = state.num_reply_embeds[:, None] + offset  # [B, width]
    places = jnp.where(offset < count[:, None], places, capacity)  # out of bounds, so that it is dropped
    slots = jnp.arange(num_slots)[:, None]
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
    codes = jnp.full(valid.shape, NO_CODE)
    return _extend(model, params, prefix, text, codes, spans, valid)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _begin(
    model: Talker,
    params: Any,
    state: TalkerState,
    is_new: Bool[Array, " B"],
    special_embeds: Float[Array, "B 3 E"],
    spans: Spans,
    sampling: SamplingState,
    remaining: Int[Array, " B"],
) -> TalkerState:
    c = model.config
    is_new = jnp.asarray(is_new)
    special_embeds = jnp.where(is_new[:, None, None], special_embeds, state.special_embeds)
    text = jnp.concatenate([special_embeds[:, :1], state.reply_embeds[:, :1]], axis=1)  # [B, 2, E]
    codes = jnp.array([c.tts_codec_pad_token_id, c.tts_codec_start_token_id])
    codes = jnp.broadcast_to(codes, (len(is_new), 2))
    valid = jnp.broadcast_to(is_new[:, None], codes.shape)
    return dataclasses.replace(
        state,
        context=_extend(model, params, state.context, text, codes, spans, valid),
        sampling=replicate(select_slots(is_new, sampling, state.sampling)),
        remaining=replicate(jnp.where(is_new, remaining, state.remaining)),
        special_embeds=special_embeds,
    )


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
    follows = thinker_slot != NO_SLOT
    slot = jnp.maximum(thinker_slot, 0)
    num_tokens = jnp.where(follows, jnp.asarray(counters.num_tokens)[slot], num_tokens)  # [B]
    finished = jnp.where(follows, jnp.asarray(counters.remaining)[slot] == 0, finished)  # [B]
    # while the text goes on, its last token so far may turn out to be its last, which is not spoken
    allowed = jnp.where(finished, _UNKNOWN, jnp.maximum(num_tokens - 2, 0))
    ready = jnp.minimum(allowed - state.sampling.step, codes_per_call)  # [B]
    text = _next_text_inputs(state, codes_per_call, jnp.where(finished, num_tokens - 1, _UNKNOWN))  # [B, K, E]
    tokens = jnp.full((len(ready), codes_per_call), PAD_TOKEN, jnp.int32)

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
    state = dataclasses.replace(
        state,
        context=dataclasses.replace(state.context, position=replicate(state.context.position)),
        sampling=replicate(state.sampling),
        remaining=replicate(state.remaining),
    )
    return state, pack_result(tokens, state.remaining)


def _next_text_inputs(state: TalkerState, count: int, last: Int[Array, " B"]) -> Float[jax.Array, "B K E"]:
    """What goes with the next codes: the reply's tokens from r_1 on before ``last``, the end mark, then padding."""
    token = jnp.asarray(state.sampling.step)[:, None] + 1 + jnp.arange(count)  # [B, K]
    rows = gather_rows(state.reply_embeds, token)  # [B, K, E]
    token = token[..., None]
    last = jnp.asarray(last)[:, None, None]
    end_embed = state.special_embeds[:, 1:2]  # [B, 1, E]
    pad_embed = state.special_embeds[:, 2:]
    return jnp.where(token < last, rows, jnp.where(token == last, end_embed, pad_embed))


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
    logits = apply_method(model, "logits", params, before.hidden)  # [B, V]
    with jax.named_scope("sample"):
        codes, sampling = sample(logits, state.sampling, active, suppressed)  # [B]
    is_end = jnp.isin(codes, end_codes(model.config))
    ids = step_position_ids(before)  # [3, B, 1]
    valid = active[:, None]
    inputs = (text[:, None], codes[:, None], ids, valid, before.cache)
    hidden, cache = apply_method(model, "extend", params, *inputs)  # [B, 1, D]
    remaining = jnp.where(is_end, 0, state.remaining - 1)
    after = dataclasses.replace(
        state,
        context=step_context(before, hidden, active, cache),
        sampling=sampling,
        remaining=jnp.where(active, remaining, state.remaining),
    )
    return after, jnp.where(active & ~is_end, codes, PAD_TOKEN)
