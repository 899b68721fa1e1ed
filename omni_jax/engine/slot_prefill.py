"""Prompts of a batch on their way into slots of the Thinker's, several in each call.

A prompt is cut into blocks, and a call takes the next blocks of the prompts that wait, whosever they are. So a call is
nearly full of tokens, however long the prompts are. Text that another slot begins with too, such as a system prompt, is
copied from there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Int

from omni_jax.engine.outputs import SlotUse, Timings
from omni_jax.engine.prefill import Engines, Stopwatch
from omni_jax.engine.request import RequestState
from omni_jax.engine.thinker_stage import ThinkerStage, count_shared
from omni_jax.processing.layout import Prompt
from omni_jax.processing.prefill_plan import (
    BLOCK_WIDTH,
    CALL_BLOCKS,
    PlacedBlock,
    PrefillChunk,
    PromptPlan,
    stack_blocks,
)
from omni_jax.segments import Text


@dataclass
class _PromptRecord:
    """A prompt that is prefilled.

    Attributes:
      plan: of the whole prompt.
      slot: of the Thinker's.
      text: the tokens it begins with, up to the first that is no text.
      features: one array for each call of an encoder.
      in_slot: whether something of it is in its slot.
      blocks: that have not been read, once it has begun.
    """

    plan: PromptPlan
    slot: int
    text: Int[np.ndarray, " T"]
    features: list[jax.Array]
    in_slot: bool = False
    blocks: deque[PlacedBlock] = field(default_factory=deque)

    @property
    def num_blocks(self) -> int:
        """That have not been read, at most."""
        return len(self.blocks) if self.in_slot else -(-self.plan.num_tokens // BLOCK_WIDTH)


@dataclass
class _Call:
    """What the next call takes.

    Attributes:
      blocks: of all prompts in it.
      first_features: of each block, where its prompt's features begin among ``features``.
      features: of the encoders, for all prompts in it.
      is_new: bool [B], the slots whose dialogue begins with the call.
      states: the requests.
      texts: what the prompt of each begins with.
    """

    is_new: np.ndarray
    blocks: list[PlacedBlock] = field(default_factory=list)
    first_features: list[int] = field(default_factory=list)
    features: list[jax.Array] = field(default_factory=list)
    states: list[RequestState] = field(default_factory=list)
    texts: list[tuple[RequestState, np.ndarray]] = field(default_factory=list)


class SlotPrefill:
    """The prompts that are prefilled into slots, in the order in which they came.

    Attributes:
      current: the requests of the last call.
    """

    def __init__(self, engines: Engines, thinker: ThinkerStage, timings: Timings):
        self._engines = engines
        self._thinker = thinker
        self._timings = timings
        self._records: dict[RequestState, _PromptRecord] = {}
        self.current: list[RequestState] = []

    @property
    def states(self) -> list[RequestState]:
        return list(self._records)

    @property
    def num_blocks(self) -> int:
        """Blocks that wait."""
        return sum(record.num_blocks for record in self._records.values())

    def start(self, state: RequestState) -> None:
        """Takes a request with a prompt in one piece: runs the encoders over its media, and gives it a slot."""
        stopwatch = Stopwatch(self._engines.clock)
        (piece,) = state.request.pieces
        plan = PromptPlan(piece, self._engines.config)
        # waited for: the time is the encoders', and an error of theirs shows in this call
        features = [self._engines.thinker.encode(media, state.request.adapter) for media in plan.encoder_inputs]
        jax.block_until_ready(features)
        self._timings.encode += stopwatch.lap()
        text = find_leading_text(piece.prompt)
        self._records[state] = _PromptRecord(plan, self._thinker.admit_prompt(state, text), text, features)

    def step(self) -> SlotUse:
        """Prefills the next blocks.

        Returns:
          Positions of the call, real ones and all.
        """
        stopwatch = Stopwatch(self._engines.clock)
        call = _Call(np.zeros(self._thinker.num_slots, bool))
        self.current = call.states
        for state, record in self._records.items():
            if len(call.blocks) == CALL_BLOCKS[-1] or not self._add(call, state, record):
                break
        blocks = stack_blocks(call.blocks, call.first_features)
        self._thinker.prefill(blocks, call.features, call.is_new)
        self._timings.prefill += stopwatch.lap()
        return SlotUse(int(blocks.chunk.valid.sum()), blocks.chunk.valid.size)

    def _add(self, call: _Call, state: RequestState, record: _PromptRecord) -> bool:
        """Takes blocks of a prompt into the call; False where the prompt had better wait for the next one."""
        call.states.append(state)
        if not record.in_slot:
            shared = self._thinker.find_shared(record.text, state.request.adapter)
            # a prompt of this call may begin like it; when that has been read, it can be copied
            least = shared.length + BLOCK_WIDTH
            if any(
                other.request.adapter == state.request.adapter and count_shared(text, record.text) >= least
                for other, text in call.texts
            ):
                call.states.pop()
                return False
            self._thinker.copy_shared(shared, record.slot)
            state.num_cached = shared.length
            record.blocks.extend(record.plan.cut_blocks(shared.length, record.slot))
            record.in_slot = True
            call.is_new[record.slot] = not shared.length
        count = min(len(record.blocks), CALL_BLOCKS[-1] - len(call.blocks))
        call.blocks += [record.blocks.popleft() for _ in range(count)]
        call.first_features += [len(call.features)] * count
        call.features += record.features
        call.texts.append((state, record.text))
        return True

    def take_complete(self) -> list[tuple[RequestState, list[PrefillChunk]]]:
        """The requests whose prompts are in their slots, with the chunks that the Talker is to read of them."""
        complete = []
        for state, record in list(self._records.items()):
            if record.in_slot and not record.blocks:
                complete.append((state, record.plan.cut_chunks() if state.speaks else []))
                del self._records[state]
        return complete

    def remove(self, state: RequestState) -> None:
        """Forgets a request, if it is here."""
        self._records.pop(state, None)


def find_leading_text(prompt: Prompt) -> Int[np.ndarray, " T"]:
    """The tokens that a prompt begins with, up to the first that is no text, and without its last one."""
    segment = prompt.segments[0] if prompt.segments else None
    if not isinstance(segment, Text):
        return prompt.tokens[:0]
    # sound that stands alone counts as text there
    is_media = prompt.media_item[: segment.length] >= 0
    length = int(np.argmax(is_media)) if is_media.any() else segment.length
    # the last token is always read: what follows is decoded from its hidden state
    return prompt.tokens[: min(length, len(prompt) - 1)]
