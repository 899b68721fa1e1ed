"""The stage in which the Thinker decodes the text of up to a number of requests at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from omni_jax.engine.decode_state import DecodedTokens, DecodeResult
from omni_jax.engine.outputs import Event, Timings, Utilization
from omni_jax.engine.prefill import Engines, Prefix
from omni_jax.engine.request import RequestState, Stage
from omni_jax.engine.stage import SlotStage, StageOutput
from omni_jax.engine.thinker_engine import ThinkerState
from omni_jax.processing.prefill_plan import PrefillChunk


@dataclass
class _SlotRecord:
    """What the host knows of a slot.

    Attributes:
      length: positions in the cache.
      remaining: tokens that may still be decoded.
      chunks: of the prompt, for the Talker.
    """

    length: int
    remaining: int
    chunks: Sequence[PrefillChunk]


class ThinkerStage(SlotStage):
    """Decodes text, some tokens of every slot in a step."""

    _device_state: ThinkerState | None

    def __init__(self, engines: Engines, num_slots: int, timings: Timings, utilization: Utilization):
        super().__init__(engines.round_slots(num_slots))
        self._engines = engines
        self._timings = timings
        self._engine = engines.thinker
        self._utilization = utilization
        self._records: dict[RequestState, _SlotRecord] = {}

    @property
    def device_state(self) -> ThinkerState | None:
        """For the Talker, which reads along; None while no slot is taken."""
        return self._device_state

    def admit(self, state: RequestState, prefix: Prefix) -> None:
        """Puts a prefilled prompt into a free slot."""
        slot = self._slots.index(None)
        # the first request decides the capacity, and later ones may raise it
        if self._device_state is None:
            capacity = prefix.thinker.context.capacity
            self._device_state = self._engine.init_state(self.num_slots, capacity)
        text = state.request.text
        self._device_state = self._engine.insert(self._device_state, slot, prefix.thinker, text)
        self._slots[slot] = state
        self._records[state] = _SlotRecord(prefix.length, text.max_tokens, prefix.chunks)
        state.stage = Stage.TEXT

    def remove(self, state: RequestState) -> None:
        self._records.pop(state, None)
        super().remove(state)

    def dispatch(self) -> DecodeResult | None:
        if self._device_state is None:
            return None
        num_tokens = self._num_tokens()
        finished = np.ones(self.num_slots, bool)
        length = 0
        remaining = 0
        for slot, state in enumerate(self._slots):
            if state is None:
                continue
            # a reply that a stop string ended goes on for the device, until it is told
            finished[slot] = state.detokenizer.finished
            # the host counts lengths itself: reading them would wait for the device
            record = self._records[state]
            length = max(length, record.length)
            remaining = max(remaining, record.remaining)
        # slots share one capacity, which must be enough for the longest of them after this call
        resized = self._engine.resize(self._device_state, length + min(num_tokens, remaining))
        self._device_state, result = self._engine.decode(resized, num_tokens, finished)
        return result

    def collect(self, decoded: DecodedTokens) -> StageOutput:
        output = StageOutput()
        used = 0
        steps = 0
        for slot, state in enumerate(self._slots):
            if state is None:
                continue
            tokens = decoded.at_slot(slot)
            # a call computes all slots for as many steps as the longest takes; the rest is padding
            used += len(tokens)
            steps = max(steps, len(tokens))
            try:
                text = self._collect_slot(state, tokens, int(decoded.remaining[slot]))
            except Exception as error:  # of one request alone: its tokenizer, say
                output.failed.append((state, error))
                continue
            if text:
                output.events.append((state, Event(text)))
            if state.detokenizer.finished:
                output.finished.append(state)
        self._utilization.text.add(used, steps * self.num_slots)
        return output

    def add_seconds(self, seconds: float) -> None:
        self._timings.decode += seconds

    def take_talker_inputs(self, state: RequestState) -> tuple[jax.Array, Sequence[PrefillChunk]]:
        """What the Talker needs of a request whose text is complete.

        Returns:
          A copy of its ``talker_inputs``, [R, capacity, E], the first of which it is; and the chunks of its prompt.
        """
        slot = self.slot_of(state)
        device_state = self._device_state
        talker = self._engines.talker
        assert slot is not None and device_state is not None and talker is not None
        assert device_state.talker_inputs is not None
        inputs = talker.take_slot(device_state.talker_inputs, slot, self._engines.round_slots(1))
        return inputs, self._records[state].chunks

    def _num_tokens(self) -> int:
        """Few tokens where a listener still waits for the first."""
        sizes = self._engines.chunk_sizes
        is_first = any(state.request.live and not state.detokenizer.token_ids for state in self.states)
        return sizes.first_tokens if is_first else sizes.tokens

    def _collect_slot(self, state: RequestState, tokens: np.ndarray, remaining: int) -> str:
        record = self._records[state]
        record.length += len(tokens)
        record.remaining = remaining
        text = state.detokenizer.push(tokens)
        # by a stop id, which the detokenizer has seen, or by the limit, which it has not
        if remaining == 0:
            text += state.detokenizer.finish()
        return text
