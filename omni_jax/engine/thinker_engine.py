"""The Thinker's engine: prompts are prefilled in pieces, then several tokens are decoded in each jitted call.

A prompt is prefilled in one of two ways. Where somebody waits for it, chunk by chunk into a prefix of its own, which is
then inserted into a slot. In a batch, where throughput counts, right into its slot, in blocks of which a call takes
several, of whatever prompts.

Letters: B slots, R slots of a prefix or blocks of a call, C positions of a chunk or block, K tokens of a call, D hidden
width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from omni_jax.batch import Array, AudioBlocks, VisionFrames, bucket
from omni_jax.engine.adapters import AdaptedParams, AdapterTable
from omni_jax.engine.decode_state import (
    PAD_TOKEN,
    Context,
    DecodeResult,
    commit,
    init_context,
    jit_method,
    on_mesh,
    resize_context,
    round_capacity,
)
from omni_jax.engine.sampling import SamplingParams, init_sampling_state, make_sampling_state
from omni_jax.engine.thinker_programs import (
    BlockPlaces,
    ReplyStart,
    ThinkerPrefix,
    ThinkerState,
    begin_reply,
    copy_prefix,
    decode_text,
    init_talker_inputs,
    insert_prefix,
    overlay_features,
    prefill_blocks,
    prefill_chunk,
    resize_rows,
    resize_tokens,
    widen_stop_ids,
)
from omni_jax.models.thinker import Thinker
from omni_jax.processing.prefill_plan import PrefillBlocks, PrefillChunk
from omni_jax.sharding import host_sharding

MIN_STOP_IDS = 8  # ids that a slot has room for at least


@dataclass(frozen=True)
class TextRequest:
    """How a slot is to answer.

    Attributes:
      prompt: its token ids, for the penalty on repetition.
      sampling: how tokens are drawn.
      max_tokens: of the reply.
      stop_ids: ids that end the reply.
      given_tokens: that the reply begins with, whatever the model would draw in their place.
    """

    prompt: Int[np.ndarray, " S"]
    sampling: SamplingParams
    max_tokens: int
    stop_ids: tuple[int, ...]
    given_tokens: tuple[int, ...] = ()

    @property
    def given_length(self) -> int:
        """Positions of the prompt and of the tokens that are given."""
        return len(self.prompt) + len(self.given_tokens)


class ThinkerEngine:
    """A Thinker and its parameters. It holds no state of any request.

    Attributes:
      params: of the Thinker.
      tokens_per_call: K, tokens that one call of ``decode`` makes at most.
      adapters: that requests may choose.
    """

    def __init__(
        self,
        model: Thinker,
        params: Any,
        *,
        mesh: Mesh | None = None,
        tokens_per_call: int = 8,
        collect_talker_inputs: bool = False,
        adapters: AdapterTable = AdapterTable(),  # noqa: B008, frozen
    ):
        """Compiles nothing yet.

        Args:
          model, params: the Thinker and its parameters.
          mesh: over which the parameters are sharded.
          tokens_per_call: K.
          collect_talker_inputs: whether speech may follow, so that ``talker_inputs`` are kept.
          adapters: that requests may choose, which ``params`` has beside its kernels.
        """
        self.params = params
        self.tokens_per_call = tokens_per_call
        self._model = model
        self._config = model.config.text_config
        self._mesh = mesh
        self._placement = host_sharding(params, mesh)
        self._collect = collect_talker_inputs
        self.adapters = adapters
        self._adapted = AdaptedParams(params, adapters, self._placement)

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters lie over several devices."""
        return self._mesh is not None

    def encode(self, media: AudioBlocks | VisionFrames, adapter: str | None = None) -> jax.Array:
        """The features of sound or pictures of a request, which has chosen an adapter or none. [features, D]"""
        method = "encode_audio" if isinstance(media, AudioBlocks) else "encode_vision"
        with on_mesh(self._mesh):
            return jit_method(self._model, method, self._params_for([adapter]), media)

    def embed_tokens(self, ids: Int[Array, "*ids"]) -> jax.Array:
        """The embeddings of text ids, [*ids, D]."""
        with on_mesh(self._mesh):
            return jit_method(self._model, "embed_tokens", self.params, ids)

    def embed_chunk(self, chunk: PrefillChunk, features: Sequence[jax.Array]) -> jax.Array:
        """The embeddings of a chunk, with the features of media over them. [R, C, D]"""
        with on_mesh(self._mesh):
            x = jit_method(self._model, "embed_tokens", self.params, chunk.tokens)  # [R, C, D]
            # one program for each call of an encoder, since their features are arrays of different lengths
            for number, index in chunk.feature_index.items():
                x = overlay_features(x, features[number], index)
            return x

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
                talker_inputs = init_talker_inputs(self._model, num_slots, context.capacity)
            talker_inputs = commit(talker_inputs, self._placement, self._mesh)
        return ThinkerPrefix(context, talker_inputs)

    def init_state(self, num_slots: int, capacity: int) -> ThinkerState:
        """Slots that are all free; see ``init_prefix`` for the arguments."""
        prefix = self.init_prefix(num_slots, capacity)
        # nothing remains to be decoded, which is what makes a slot free
        none = np.zeros(num_slots, np.int32)
        stop_ids = np.full((num_slots, MIN_STOP_IDS), PAD_TOKEN, np.int32)
        given = np.full((num_slots, prefix.context.capacity), PAD_TOKEN, np.int32)
        # one transfer, and to where results of programs lie: else each program is compiled twice
        host = (init_sampling_state(num_slots, self._config.vocab_size), none, none, stop_ids, given)
        counters = jax.device_put(host, self._placement)
        return ThinkerState(prefix.context, prefix.talker_inputs, *counters)

    def resize(self, state: ThinkerState, capacity: int) -> ThinkerState:
        """The same with room for so many tokens of each slot."""
        context, talker_inputs = self._resize(state.context, state.talker_inputs, capacity)
        given = state.given_tokens
        while given.shape[1] < context.capacity:
            with on_mesh(self._mesh):
                given = resize_tokens(given, 2 * given.shape[1])
        return dataclasses.replace(state, context=context, talker_inputs=talker_inputs, given_tokens=given)

    def resize_prefix(self, prefix: ThinkerPrefix, capacity: int) -> ThinkerPrefix:
        """The same with room for so many tokens of each dialogue."""
        return ThinkerPrefix(*self._resize(prefix.context, prefix.talker_inputs, capacity))

    def prefill(
        self, prefix: ThinkerPrefix, chunk: PrefillChunk, features: Sequence[jax.Array], adapter: str | None = None
    ) -> ThinkerPrefix:
        """Reads a chunk of each prompt.

        Args:
          prefix: with room for the chunk; it is used up.
          chunk: of a plan.
          features: what ``encode`` gave for each of the plan's encoder inputs.
          adapter: of all prompts.
        """
        x = self.embed_chunk(chunk, features)
        params = self._params_for([adapter])
        with on_mesh(self._mesh):
            return prefill_chunk(self._model, params, prefix, chunk.spans, chunk.valid, x, chunk.is_media)

    def prefill_blocks(
        self,
        state: ThinkerState,
        blocks: PrefillBlocks,
        features: Sequence[jax.Array],
        is_new: Bool[np.ndarray, " B"],
        adapters: Sequence[str | None],
    ) -> ThinkerState:
        """Reads blocks of prompts into their slots, of which none is decoding.

        Args:
          state: with room for the blocks; it is used up.
          blocks: those of a prompt in order, without gaps.
          features: that the blocks' ``feature_index`` counts.
          is_new: slots whose dialogue begins with these blocks.
          adapters: of each block.
        """
        chunk = blocks.chunk
        places = BlockPlaces(blocks.slot, blocks.start)
        x = self.embed_chunk(chunk, features)
        params = self._params_for(adapters)
        with on_mesh(self._mesh):
            return prefill_blocks(
                self._model, params, state, places, chunk.spans, chunk.valid, x, chunk.is_media, is_new
            )

    def copy_prefix(self, state: ThinkerState, source: int, target: int, length: int) -> ThinkerState:
        """Gives a slot the first ``length`` positions of another one, all of them text; the state is used up."""
        with on_mesh(self._mesh):
            return copy_prefix(state, np.int32(source), np.int32(target), np.int32(length))

    def begin(self, state: ThinkerState, slot: int, request: TextRequest) -> ThinkerState:
        """Has a slot answer whose prompt has been prefilled into it; the state is used up."""
        state, reply = self._make_reply_start(self.resize(state, request.given_length), request)
        with on_mesh(self._mesh):
            return begin_reply(state, np.int32(slot), reply)

    def insert(self, state: ThinkerState, slot: int, prefix: ThinkerPrefix, request: TextRequest) -> ThinkerState:
        """Puts the first dialogue of a prefix into a slot, where it is to be answered.

        Args:
          state: it is used up.
          slot: whose dialogue is replaced.
          prefix: of any capacity; the one of the two with less is resized.
          request: how to answer.
        """
        # both must have one capacity: a copy between caches of equal shape is one program for each capacity
        state = self.resize(state, max(prefix.context.capacity, request.given_length))
        prefix = self.resize_prefix(prefix, state.context.capacity)
        state, reply = self._make_reply_start(state, request)
        with on_mesh(self._mesh):
            return insert_prefix(state, np.int32(slot), prefix, reply)

    def decode(
        self,
        state: ThinkerState,
        num_tokens: int | None = None,
        finished: Bool[np.ndarray, " B"] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> tuple[ThinkerState, DecodeResult]:
        """Decodes some tokens of each slot in one jitted call.

        Args:
          state: with room for the tokens; it is used up.
          num_tokens: of a slot at most; K if None.
          finished: slots that decode no more, for a reason that the device does not know.
          adapters: of each slot; None: of no slot.

        Returns:
          The state after them, and the tokens [B, K]: those of a slot end with its stop id, if it has met one.
        """
        num_tokens = self.tokens_per_call if num_tokens is None else min(num_tokens, self.tokens_per_call)
        if finished is None:
            finished = np.zeros(len(state.remaining), bool)
        params = self._params_for([None] * len(state.remaining) if adapters is None else adapters)
        with on_mesh(self._mesh):
            # ``num_tokens`` is a traced scalar, so calls of all lengths are one program
            state, packed = decode_text(
                self._model, self.tokens_per_call, params, state, finished, np.int32(num_tokens)
            )
        return state, DecodeResult(packed)

    def _params_for(self, rows: Sequence[str | None]) -> Any:
        """The parameters for rows with these adapters; one name counts for all rows."""
        return self._adapted.select(rows) if self.adapters.names else self.params

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

    def _make_reply_start(self, state: ThinkerState, request: TextRequest) -> tuple[ThinkerState, ReplyStart]:
        """What a slot needs to answer, and the state with room for its stop ids; for given tokens it has room."""
        # it never shrinks: the width is part of a shape, and each shape is a program
        width = bucket(len(request.stop_ids), state.stop_ids.shape[1])
        stop_ids = np.full((1, width), PAD_TOKEN, np.int32)
        stop_ids[0, : len(request.stop_ids)] = request.stop_ids
        given = np.full((1, state.context.capacity), PAD_TOKEN, np.int32)
        given[0, len(request.prompt) : request.given_length] = request.given_tokens
        sampling = make_sampling_state([request.sampling], [request.prompt], self._config.vocab_size)
        if width > state.stop_ids.shape[1]:
            with on_mesh(self._mesh):
                state = widen_stop_ids(state, width)
        # one transfer for all, and committed to where the state lies: else the program is compiled twice
        host = ReplyStart(sampling, np.array([request.max_tokens], np.int32), stop_ids, given)
        return state, jax.device_put(host, self._placement)
