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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from omni_jax import mrope
from omni_jax.batch import Array
from omni_jax.config import OmniConfig
from omni_jax.engine.decode_state import (
    Context,
    DecodeResult,
    commit,
    init_context,
    on_mesh,
    resize_context,
    round_capacity,
)
from omni_jax.engine.sampling import SamplingParams, SamplingState, init_sampling_state, make_sampling_state
from omni_jax.engine.talker_programs import (
    UNKNOWN,
    TalkerState,
    TextCounters,
    append_rows,
    begin_speech,
    decode_codes,
    init_embeds,
    insert_clip_rows,
    insert_prefix,
    jit_gather_rows,
    plan_append,
    prefill_chunk,
    read_clip_codes,
    suppressed_codes,
    take_slot,
)
from omni_jax.engine.thinker_programs import resize_rows
from omni_jax.errors import CheckpointError
from omni_jax.models.talker import Talker
from omni_jax.models.talker_conditioning import num_text_rows, special_tokens
from omni_jax.mrope import Span
from omni_jax.processing.prefill_plan import PrefillChunk
from omni_jax.sharding import host_sharding

APPEND_WIDTH = 16  # tokens of a reply that one call of ``append_reply`` takes at least
CLIP_ROWS = 256  # tokens that a clip's text may have: one width, so that a program serves all; caches hold as many
CLIP_CODES_PER_CALL = 128  # codes of a clip that are read at a time


# compared by identity: it holds arrays
@dataclass(frozen=True, eq=False)
class SpeechClip:
    """A clip that speech goes on from, and what it says.

    Attributes:
      rows: of the text, the first ``num_rows`` of the first dialogue's; W is ``CLIP_ROWS``.
      num_rows: how many there are.
      codes: of the sound.
    """

    rows: Float[jax.Array, "R W E"]
    num_rows: int
    codes: Int[np.ndarray, " J"]

    @property
    def min_tokens(self) -> int:
        """Tokens that a reply which goes on must have before its speech can begin: each code takes a row."""
        return max(2, 2 + len(self.codes) - self.num_rows)


@dataclass(frozen=True)
class SpeechRequest:
    """How a slot is to speak.

    Attributes:
      prompt_length: tokens that the Thinker read before its reply.
      voice_token: the text id that a reply in the voice begins with (``Voice.bos_token``).
      sampling: how codes are drawn.
      max_codes: of the speech.
      span: of the two position ids behind the prompt.
      clip: that the speech goes on from, whose rows are in the slot; None: it begins anew.
      reply_tokens: of the reply, if it is complete.
    """

    prompt_length: int
    voice_token: int
    sampling: SamplingParams
    max_codes: int
    span: Span
    clip: SpeechClip | None = None
    reply_tokens: int | None = None


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
        # the same in every call of ``decode``, so it is copied once
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
            embeds = init_embeds(self._model, num_slots, context.capacity)
        special_embeds, reply_embeds = commit(embeds, self._placement, self._mesh)
        # nothing remains to be decoded, which is what makes a slot free
        none = np.zeros(num_slots, np.int32)
        # one transfer, and to where results of programs lie: else each program is compiled twice
        host = (init_sampling_state(num_slots, self._model.config.vocab_size), none, none, none)
        sampling, remaining, num_clip, num_reply = jax.device_put(host, self._placement)
        return TalkerState(context, sampling, remaining, special_embeds, reply_embeds, num_clip, num_reply)

    def resize(self, state: TalkerState, capacity: int) -> TalkerState:
        """The same with room for so many positions, and tokens of the reply, of each slot."""
        capacity = round_capacity(capacity)
        # cache and ``reply_embeds`` have one capacity, so that one number selects the programs
        # by doubling, so that few programs do it
        while state.context.capacity < capacity:
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
        # the Thinker's rows stand at the positions of the prompt
        # places behind the prompt give any row: ``valid`` masks it
        places = np.broadcast_to(start + np.arange(width, dtype=np.int32), chunk.tokens.shape)
        with on_mesh(self._mesh):
            text = jit_gather_rows(talker_inputs, places)  # [R, C, E]
            return prefill_chunk(self._model, self.params, prefix, text, chunk.spans, chunk.valid)

    def insert(self, state: TalkerState, slot: int, prefix: Context) -> TalkerState:
        """Puts the first dialogue of a prefix into a slot; it decodes nothing before ``begin``.

        Args:
          state: it is used up.
          slot: whose dialogue is replaced.
          prefix: of any capacity; the one of the two with less is resized.
        """
        state = self.resize(state, prefix.capacity)
        # a copy between caches of equal shape is one program for each capacity
        prefix = self.resize_prefix(prefix, state.context.capacity)
        with on_mesh(self._mesh):
            return insert_prefix(state, np.int32(slot), prefix)

    def take_clip_rows(self, talker_inputs: Float[Array, "R capacity E"], first: int) -> Float[jax.Array, "R W E"]:
        """The rows of a clip's text, which begins at this token of the Thinker's prefix; those behind it are any."""
        places = np.broadcast_to(first + np.arange(CLIP_ROWS, dtype=np.int32), (len(talker_inputs), CLIP_ROWS))
        with on_mesh(self._mesh):
            return jit_gather_rows(talker_inputs, places)

    def insert_clip(self, state: TalkerState, slot: int, clip: SpeechClip) -> TalkerState:
        """Puts a clip's text before the reply of a slot that holds nothing of it yet; ``state`` is used up."""
        with on_mesh(self._mesh):
            return insert_clip_rows(state, np.int32(slot), clip.rows, np.int32(clip.num_rows))

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
            # rows are gathered where the Thinker's slots lie; only these few go to the Talker's slots
            plan = plan_append(self.append_width, state.num_reply_embeds, num_tokens, thinker_slot, prompt_length)
            rows = jit_gather_rows(talker_inputs, plan.places)  # [T, width, E]
            return append_rows(state, rows, plan.count, thinker_slot)

    def take_slot(
        self, talker_inputs: Float[Array, "T capacity E"], slot: int, num_slots: int
    ) -> Float[jax.Array, "R capacity E"]:
        """The inputs of one slot of the Thinker's, for a prefix of ``num_slots``, whose first it is."""
        with on_mesh(self._mesh):
            return take_slot(talker_inputs, np.int32(slot), num_slots)

    def begin(self, state: TalkerState, requests: Mapping[int, SpeechRequest]) -> TalkerState:
        """Reads the voice and the first token of the text, and the codes of a clip; then slots can decode codes.

        Args:
          state: with room for two more positions and the clip's codes, and with the rows of the text that they take in
            ``reply_embeds``; it is used up.
          requests: slot -> how it is to speak, of the slots that begin.

        Raises:
          CheckpointError: if a voice begins with an id that the Thinker does not have.
        """
        c = self._model.config
        num_slots = len(state.remaining)
        # the program takes arrays for all slots, and uses those of the slots that begin
        params = [SamplingParams()] * num_slots
        voice_tokens = np.zeros(num_slots, np.int32)
        remaining = np.zeros(num_slots, np.int32)
        spans: list[list[Span]] = [[] for _ in range(num_slots)]
        for slot, request in requests.items():
            params[slot] = request.sampling
            voice_tokens[slot] = request.voice_token
            # the voice and the first token take a position each
            num_clip_codes = 0 if request.clip is None else len(request.clip.codes)
            room = max(c.max_position_embeddings - request.prompt_length - 2 - num_clip_codes, 0)
            remaining[slot] = min(request.max_codes, room)
            spans[slot] = [request.span]
        is_new = np.isin(np.arange(num_slots), list(requests))
        # both ids of a slot follow one rule, so one span is enough
        table = mrope.stack_spans(spans, 2, width=1)
        # one transfer
        host = (self._make_sampling(params), remaining)
        sampling, remaining = jax.device_put(host, self._placement)
        special_embeds = self._special_embeds(voice_tokens)
        with on_mesh(self._mesh):
            arguments = (state, is_new, special_embeds, table, sampling, remaining)
            state = begin_speech(self._model, self.params, *arguments)
        return self._read_clips(state, requests)

    def _read_clips(self, state: TalkerState, requests: Mapping[int, SpeechRequest]) -> TalkerState:
        """Reads the codes of the clips of slots that have just started."""
        num_slots = len(state.remaining)
        clips = {slot: request.clip for slot, request in requests.items() if request.clip is not None}
        num_rows = np.full(num_slots, UNKNOWN, np.int32)
        for slot, clip in clips.items():
            reply_tokens = requests[slot].reply_tokens
            if reply_tokens is not None:
                num_rows[slot] = clip.num_rows + num_text_rows(np.array(reply_tokens))
        length = max((len(clip.codes) for clip in clips.values()), default=0)
        for start in range(0, length, CLIP_CODES_PER_CALL):
            codes = np.zeros((num_slots, CLIP_CODES_PER_CALL), np.int32)
            valid = np.zeros(codes.shape, bool)
            for slot, clip in clips.items():
                part = clip.codes[start : start + CLIP_CODES_PER_CALL]
                codes[slot, : len(part)] = part
                valid[slot, : len(part)] = True
            with on_mesh(self._mesh):
                state = read_clip_codes(self._model, self.params, state, codes, valid, num_rows)
        return state

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
                # int32 whatever the host counts in: each dtype would be a program of its own
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
        vocab_size = self._config.thinker_config.text_config.vocab_size
        # checked on the host: on the device an id out of range raises no error
        unknown = voice_tokens[(voice_tokens < 0) | (voice_tokens >= vocab_size)]
        if unknown.size:
            raise CheckpointError(
                f"the voice begins with the text id {unknown[0]}, but the Thinker has {vocab_size} ids"
            )
        return self._embed_tokens(special_tokens(self._config.talker_config, voice_tokens))
