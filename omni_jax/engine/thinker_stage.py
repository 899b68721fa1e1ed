"""The stage in which the Thinker decodes the text of up to a number of requests at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, Int

from omni_jax.engine.decode_state import DecodedTokens, DecodeResult
from omni_jax.engine.outputs import Event, Timings, Utilization
from omni_jax.engine.prefill import Engines, Prefix
from omni_jax.engine.request import RequestState, Stage
from omni_jax.engine.stage import SlotStage, StageOutput
from omni_jax.engine.thinker_programs import ThinkerState
from omni_jax.processing.prefill_plan import BLOCK_WIDTH, PrefillBlocks, PrefillChunk


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


@dataclass
class _SlotText:
    """Text that a slot's dialogue begins with. It stays when the request leaves, for as long as the slot is free.

    Attributes:
      adapter: that the request chose.
      tokens: up to the first that is no text.
      num_prefilled: positions of the dialogue that the cache holds.
    """

    adapter: str | None
    tokens: Int[np.ndarray, " T"]
    num_prefilled: int = 0


@dataclass(frozen=True)
class SharedPrefix:
    """Text that a slot holds and that a prompt begins with.

    Attributes:
      slot: that holds it.
      length: tokens; 0 if there is none.
    """

    slot: int = 0
    length: int = 0


def count_shared(a: Int[np.ndarray, " S"], b: Int[np.ndarray, " T"]) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(np.argmax(differs)) if differs.any() else length


class ThinkerStage(SlotStage):
    """Decodes text, some tokens of every slot in a step.

    A request comes with a prefix (``admit``), or its prompt is read into its slot: ``admit_prompt``, ``prefill`` for
    each call of blocks, and ``begin``.
    """

    _device_state: ThinkerState | None

    def __init__(self, engines: Engines, num_slots: int, timings: Timings, utilization: Utilization):
        super().__init__(engines.round_slots(num_slots))
        self._engines = engines
        self._timings = timings
        self._engine = engines.thinker
        self._utilization = utilization
        self._records: dict[RequestState, _SlotRecord] = {}  # of the requests whose text is decoded
        self._texts: dict[int, _SlotText] = {}  # of slots whose prompt was read into them

    @property
    def decoding(self) -> list[RequestState]:
        return list(self._records)

    @property
    def device_state(self) -> ThinkerState | None:
        """For the Talker, which reads along; None while no slot is taken."""
        return self._device_state

    def admit(self, state: RequestState, prefix: Prefix) -> None:
        """Puts a prefilled prompt into a free slot."""
        slot = self._take_slot(state, prefix.thinker.context.capacity)
        text = state.request.text
        assert self._device_state is not None
        self._device_state = self._engine.insert(self._device_state, slot, prefix.thinker, text)
        self._records[state] = _SlotRecord(prefix.length, text.max_tokens, prefix.chunks)
        state.stage = Stage.TEXT

    def reserve(self, capacity: int) -> None:
        """Allocates the slots with room for so many positions; otherwise the first request has them allocated."""
        self._device_state = self._engine.init_state(self.num_slots, capacity)

    def admit_prompt(self, state: RequestState, text: Int[np.ndarray, " T"]) -> int:
        """Gives a request a free slot, which its prompt is then read into.

        Args:
          state: of the request.
          text: that its prompt begins with.

        Returns:
          The slot.
        """
        slot = self._take_slot(state, state.request.initial_capacity)
        self._texts[slot] = _SlotText(state.request.adapter, text)
        return slot

    def find_shared(self, text: Int[np.ndarray, " T"], adapter: str | None) -> SharedPrefix:
        """What some slot holds already of a prompt that begins with this text; what is too short to matter is left."""
        best = SharedPrefix()
        for slot, held in self._texts.items():
            # keys and values are those of the adapter that has read the text
            if held.adapter != adapter:
                continue
            length = min(count_shared(held.tokens, text), held.num_prefilled)
            if length >= max(BLOCK_WIDTH, best.length + 1):
                best = SharedPrefix(slot, length)
        return best

    def copy_shared(self, shared: SharedPrefix, slot: int) -> None:
        """Copies it into a slot that its prompt is read into; does nothing where there is none."""
        if not shared.length:
            return
        assert self._device_state is not None
        self._device_state = self._engine.copy_prefix(self._device_state, shared.slot, slot, shared.length)
        self._texts[slot].num_prefilled = shared.length

    def prefill(self, blocks: PrefillBlocks, features: Sequence[jax.Array], is_new: Bool[np.ndarray, " B"]) -> None:
        """Reads blocks of prompts into their slots; see ``ThinkerEngine.prefill_blocks``."""
        assert self._device_state is not None
        adapters = self._adapters()
        of_blocks = [adapters[slot] for slot in blocks.slot.tolist()]
        self._device_state = self._engine.prefill_blocks(self._device_state, blocks, features, is_new, of_blocks)
        # between two calls others have their turn; without waiting, all of them would be queued on the device
        jax.block_until_ready(self._device_state.context.hidden)
        ends = blocks.start + blocks.chunk.valid.sum(axis=1)
        for slot, end in zip(blocks.slot.tolist(), ends.tolist(), strict=True):
            if slot in self._texts:
                self._texts[slot].num_prefilled = max(self._texts[slot].num_prefilled, end)

    def begin(self, state: RequestState, chunks: Sequence[PrefillChunk]) -> None:
        """Has a request answered whose prompt has been read into its slot; ``chunks`` of it are for the Talker."""
        slot = self.slot_of(state)
        text = state.request.text
        assert slot is not None and self._device_state is not None
        self._device_state = self._engine.begin(self._device_state, slot, text)
        self._records[state] = _SlotRecord(state.request.prompt_length, text.max_tokens, chunks)
        state.stage = Stage.TEXT

    def remove(self, state: RequestState) -> None:
        self._records.pop(state, None)
        super().remove(state)
        if self._device_state is None:
            self._texts.clear()

    def dispatch(self) -> DecodeResult | None:
        if self._device_state is None or not self._records:
            return None
        num_tokens = self._num_tokens()
        finished = np.ones(self.num_slots, bool)
        length = 0
        remaining = 0
        for slot, state in enumerate(self._slots):
            if state is None or state not in self._records:
                continue
            # a reply that a stop string ended goes on for the device, until it is told
            finished[slot] = state.detokenizer.finished
            # the host counts lengths itself: reading them would wait for the device
            record = self._records[state]
            length = max(length, record.length)
            remaining = max(remaining, record.remaining)
        # slots share one capacity, which must be enough for the longest of them after this call
        resized = self._engine.resize(self._device_state, length + min(num_tokens, remaining))
        self._device_state, result = self._engine.decode(resized, num_tokens, finished, self._adapters())
        return result

    def collect(self, decoded: DecodedTokens) -> StageOutput:
        output = StageOutput()
        used = 0
        steps = 0
        for slot, state in enumerate(self._slots):
            if state is None or state not in self._records:
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

    def _take_slot(self, state: RequestState, capacity: int) -> int:
        """Gives a request a free slot, with room for so many positions."""
        slot = self._slots.index(None)
        # the first request decides the capacity, and later ones may raise it
        if self._device_state is None:
            self._device_state = self._engine.init_state(self.num_slots, capacity)
        else:
            self._device_state = self._engine.resize(self._device_state, capacity)
        self._slots[slot] = state
        self._texts.pop(slot, None)
        return slot

    def _adapters(self) -> list[str | None]:
        """What each slot's request has chosen."""
        return [None if state is None else state.request.adapter for state in self._slots]

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
