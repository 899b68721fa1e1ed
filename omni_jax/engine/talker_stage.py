"""The stage in which the Talker decodes the codes of up to a number of requests at a time.

A live request has a slot here while it has one of the Thinker's, and its speech follows its text. Any other request
comes when its text is complete, so that no slot of the Thinker's is kept while the Talker takes its many more steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from omni_jax.engine.decode_state import Context, DecodedTokens, DecodeResult
from omni_jax.engine.outputs import Timings, Utilization
from omni_jax.engine.prefill import Engines, Stopwatch, prefill_talker
from omni_jax.engine.request import RequestState, Stage
from omni_jax.engine.stage import SlotStage, StageOutput
from omni_jax.engine.talker_engine import TextProgress
from omni_jax.engine.talker_programs import NO_SLOT, TalkerState, TextCounters
from omni_jax.engine.thinker_stage import ThinkerStage
from omni_jax.processing.prefill_plan import PrefillChunk


@dataclass
class _SlotRecord:
    """What the host knows of a slot.

    Attributes:
      length: positions in the cache.
      remaining: codes that may still be decoded, once the slot has started.
      has_started: whether the voice and the first token have been read.
    """

    length: int
    remaining: int = 0
    has_started: bool = False


@dataclass(frozen=True)
class _WaitingSpeech:
    """A request whose text is complete, and what the Talker needs of it."""

    state: RequestState
    talker_inputs: jax.Array  # [R, capacity, E]
    chunks: Sequence[PrefillChunk]


class TalkerStage(SlotStage):
    """Decodes speech, some codes of every slot in a step, as far as their text has come."""

    _device_state: TalkerState | None

    def __init__(
        self, engines: Engines, num_slots: int, thinker: ThinkerStage, timings: Timings, utilization: Utilization
    ):
        # without a Talker there are no slots, and so nothing is ever admitted here
        super().__init__(engines.round_slots(num_slots) if engines.talker is not None else 0)
        self._engines = engines
        self._timings = timings
        self._thinker = thinker
        self._utilization = utilization
        self._records: dict[RequestState, _SlotRecord] = {}
        self._waiting: deque[_WaitingSpeech] = deque()

    @property
    def waiting(self) -> list[RequestState]:
        """Requests whose text is complete and that have no slot yet."""
        return [speech.state for speech in self._waiting]

    def reserve(self, capacity: int) -> None:
        """Allocates the slots with room for so many positions; otherwise the first request has them allocated."""
        assert self._engines.talker is not None
        self._device_state = self._engines.talker.init_state(self.num_slots, capacity)

    def admit_live(self, state: RequestState, prefix: Context) -> None:
        """Puts a request whose prompt the Talker has prefilled along into a free slot."""
        self._insert(state, prefix)

    def enqueue(self, state: RequestState) -> None:
        """Takes a request whose text is complete out of the Thinker's stage; it waits for a slot here."""
        # a copy, so that the Thinker's slot is free for the next request at once
        talker_inputs, chunks = self._thinker.take_talker_inputs(state)
        self._thinker.remove(state)
        self._waiting.append(_WaitingSpeech(state, talker_inputs, chunks))
        state.stage = Stage.SPEECH

    def admit_waiting(self, num_kept: int) -> StageOutput:
        """Gives free slots, but so many, to requests that wait."""
        output = StageOutput()
        stopwatch = Stopwatch(self._engines.clock)
        while self._waiting and self.num_free > num_kept:
            speech = self._waiting.popleft()
            try:
                self._admit(speech)
            except Exception as error:
                # the call may have used up the arrays of those that speak already
                output.fail([speech.state, *self.take_lost()], error)
        self.add_seconds(stopwatch.lap())
        return output

    def add_seconds(self, seconds: float) -> None:
        self._timings.talker += seconds

    def _admit(self, speech: _WaitingSpeech) -> None:
        """Prefills a request that waited, and puts it into a free slot."""
        state = speech.state
        engine = self._engines.talker
        assert engine is not None
        num_prefix_slots = self._engines.round_slots(1)
        # the prompt first, from what the Thinker kept of each of its positions
        prefix = engine.init_prefix(num_prefix_slots, state.request.initial_capacity)
        start = 0
        for chunk in speech.chunks:
            prefix = prefill_talker(self._engines, prefix, speech.talker_inputs, chunk, start)
            start += chunk.num_tokens
        slot = self._insert(state, prefix)
        # then the reply, all at once, since its text is complete
        self._append_all(speech, slot, num_prefix_slots)

    def remove(self, state: RequestState) -> None:
        self._records.pop(state, None)
        self._waiting = deque(speech for speech in self._waiting if speech.state is not state)
        super().remove(state)

    def is_complete(self, state: RequestState) -> bool:
        """Whether all codes of a request that has a slot are decoded. A reply of one token or none has no codes."""
        record = self._records[state]
        # a slot that has not started is complete only where it never will
        return state.is_mute if not record.has_started else record.remaining == 0

    def dispatch(self) -> DecodeResult | None:
        if self._device_state is None:
            return None
        engine = self._engines.talker
        assert engine is not None
        # in this order: a slot begins with its reply's first token, which must be there
        self._append_live()
        self._begin_new()
        if not any(map(self._has_text, self._records)):
            return None
        # the host counts lengths itself: reading them would wait for the device
        length = 0
        remaining = 0
        for record in self._records.values():
            if record.has_started:
                length = max(length, record.length)
                remaining = max(remaining, record.remaining)
        # slots share one capacity, which must be enough for the longest of them after this call
        steps = min(engine.codes_per_call, remaining)
        resized = engine.resize(self._device_state, length + steps)
        self._device_state, result = engine.decode(resized, self._text_progress(), self._text_counters(resized))
        return result

    def collect(self, decoded: DecodedTokens) -> StageOutput:
        used = 0
        steps = 0
        for slot, state in enumerate(self._slots):
            if state is None or not self._records[state].has_started:
                continue
            codes = decoded.at_slot(slot)
            record = self._records[state]
            record.length += len(codes)
            record.remaining = int(decoded.remaining[slot])
            state.codes.append(codes)
            # a call computes all slots for as many steps as the longest takes; the rest is padding
            used += len(codes)
            steps = max(steps, len(codes))
        self._utilization.speech.add(used, steps * self.num_slots)
        return StageOutput()

    def take_complete(self) -> list[RequestState]:
        """The requests whose codes are complete. They lose their slots, but for live ones, whose sound is streamed."""
        complete = [state for state in self.states if self.is_complete(state)]
        for state in complete:
            if not state.is_live:
                self.remove(state)
        return complete

    def _insert(self, state: RequestState, prefix: Context) -> int:
        engine = self._engines.talker
        assert engine is not None
        slot = self._slots.index(None)
        # the first request decides the capacity, and later ones may raise it
        if self._device_state is None:
            self._device_state = engine.init_state(self.num_slots, prefix.capacity)
        self._device_state = engine.insert(self._device_state, slot, prefix)
        speech = state.request.speech
        if speech is not None and speech.clip is not None:
            self._device_state = engine.insert_clip(self._device_state, slot, speech.clip)
        self._slots[slot] = state
        self._records[state] = _SlotRecord(state.request.prompt_length)
        return slot

    def _append_all(self, speech: _WaitingSpeech, slot: int, num_prefix_slots: int) -> None:
        """Takes all of a complete reply to the slot."""
        engine = self._engines.talker
        num_tokens = len(speech.state.detokenizer.token_ids)
        assert engine is not None and self._device_state is not None
        num_clip_rows = speech.state.request.num_clip_rows
        device_state = engine.resize(self._device_state, num_clip_rows + num_tokens)
        thinker_slot = np.full(self.num_slots, NO_SLOT, np.int32)
        # the inputs are a copy with this request in slot 0
        thinker_slot[slot] = 0
        prompt_length = np.full(self.num_slots, speech.state.request.prompt_length, np.int32)
        counts = np.full(num_prefix_slots, num_tokens, np.int32)
        # each call takes the next tokens: the device counts how many it has
        for _ in range(0, num_tokens, engine.append_width):
            device_state = engine.append_reply(device_state, speech.talker_inputs, counts, thinker_slot, prompt_length)
            # kept after each call, since the state before it is used up
            self._device_state = device_state

    def _append_live(self) -> None:
        """Takes what the Thinker has decoded in this step to the slots that follow it."""
        thinker_state = self._thinker.device_state
        thinker_slot = np.full(self.num_slots, NO_SLOT, np.int32)
        prompt_length = np.zeros(self.num_slots, np.int32)
        num_tokens = 0
        for slot, state in enumerate(self._slots):
            followed = None if state is None else self._thinker.slot_of(state)
            if state is None or followed is None:
                continue
            # tokens that a stop string may still remove are taken too
            # they are not spoken: ``TextProgress`` says how many are
            thinker_slot[slot] = followed
            prompt_length[slot] = state.request.prompt_length
            num_tokens = max(num_tokens, len(state.detokenizer.token_ids) + state.request.num_clip_rows)
        if thinker_state is None or (thinker_slot == NO_SLOT).all():
            return
        engine = self._engines.talker
        assert engine is not None and self._device_state is not None and thinker_state.talker_inputs is not None
        # the call of the Thinker that is on its way may add tokens that the host has not counted yet
        resized = engine.resize(self._device_state, num_tokens + engine.append_width)
        self._device_state = engine.append_reply(
            resized, thinker_state.talker_inputs, thinker_state.num_tokens, thinker_slot, prompt_length
        )

    def _begin_new(self) -> None:
        """Has the slots begin whose text is long enough."""
        engine = self._engines.talker
        requests = {}
        length = 0
        for slot, state in enumerate(self._slots):
            if state is None or self._records[state].has_started or not state.can_begin_speech:
                continue
            detokenizer = state.detokenizer
            request = state.request.speech_request(detokenizer.num_spoken if detokenizer.finished else None)
            requests[slot] = request
            # the voice, the first token and a clip's codes follow the prompt
            length = max(length, request.prompt_length + state.request.num_begin)
        if not requests:
            return
        assert engine is not None and self._device_state is not None
        self._device_state = engine.begin(engine.resize(self._device_state, length), requests)
        for slot, request in requests.items():
            state = self._slots[slot]
            assert state is not None
            record = self._records[state]
            record.has_started = True
            record.length += state.request.num_begin
            # at most: the device also counts what room the context has, and its first result says so
            record.remaining = request.max_codes

    def _follows_device(self, state: RequestState) -> bool:
        """Whether the device's counters say how far the text has come: unless a stop string may cut it."""
        return not state.detokenizer.finished and not state.detokenizer.has_stop_strings

    def _has_text(self, state: RequestState) -> bool:
        """Whether a slot may have codes to decode."""
        record = self._records[state]
        if not record.has_started or record.remaining == 0:
            return False
        detokenizer = state.detokenizer
        if detokenizer.finished or self._follows_device(state):
            return True
        # as ``decode_codes`` counts: the first token has no code of its own, and the last one may end the text
        request = state.request
        return detokenizer.num_spoken + request.num_clip_rows > state.num_codes + request.num_begin

    def _text_progress(self) -> TextProgress:
        thinker_slot = np.full(self.num_slots, NO_SLOT, np.int32)
        num_tokens = np.zeros(self.num_slots, np.int32)
        finished = np.zeros(self.num_slots, bool)
        for slot, state in enumerate(self._slots):
            if state is None or not self._records[state].has_started:
                continue
            followed = self._thinker.slot_of(state)
            # what a stop string may remove is not to be spoken, and only the host knows of stop strings
            if followed is not None and self._follows_device(state):
                thinker_slot[slot] = followed
            num_tokens[slot] = state.detokenizer.num_spoken
            finished[slot] = state.detokenizer.finished
        return TextProgress(thinker_slot, num_tokens, finished)

    def _text_counters(self, talker_state: TalkerState) -> TextCounters:
        thinker_state = self._thinker.device_state
        if thinker_state is None:  # nothing is followed; arrays of the usual shape, so that one program serves both
            assert isinstance(talker_state.remaining, jax.Array)
            none = jax.device_put(np.zeros(self._thinker.num_slots, np.int32), talker_state.remaining.sharding)
            return TextCounters(none, none)
        return TextCounters(thinker_state.num_tokens, thinker_state.remaining)
