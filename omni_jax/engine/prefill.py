"""A prompt on its way into the caches of Thinker and Talker, in chunks of fixed width.

It is prefilled into caches of its own, and is inserted into a slot when all of it is there. So nobody's answer has to
wait for the whole of somebody else's prompt.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp

from omni_jax.batch import Array
from omni_jax.config import OmniConfig
from omni_jax.engine.decode_state import Context
from omni_jax.engine.outputs import SlotUse, Timings
from omni_jax.engine.request import ChunkSizes
from omni_jax.engine.talker_engine import TalkerEngine
from omni_jax.engine.thinker_engine import ThinkerEngine
from omni_jax.engine.thinker_programs import ThinkerPrefix
from omni_jax.engine.token2wav_engine import Token2WavEngine
from omni_jax.processing.prefill_plan import EMPTY_PROMPT, PrefillChunk, PromptPiece, plan_prefill

T = TypeVar("T")

Clock = Callable[[], float]  # seconds, from any beginning


@dataclass(frozen=True)
class Engines:
    """The engines of one model, which all of its requests share.

    Attributes:
      slot_multiple: that numbers of slots must be a multiple of, for the mesh.
      clock: that timings and the deadlines of streams are taken from.
    """

    config: OmniConfig
    chunk_sizes: ChunkSizes
    thinker: ThinkerEngine
    talker: TalkerEngine | None
    token2wav: Token2WavEngine | None
    slot_multiple: int = 1
    clock: Clock = time.perf_counter

    def round_slots(self, num_requests: int) -> int:
        """Slots of a batch for so many requests."""
        # an axis that the mesh does not divide would lie in full on every device
        return -(-num_requests // self.slot_multiple) * self.slot_multiple


class Stopwatch:
    """Seconds since it was made, or since the last lap."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._last = clock()

    def lap(self) -> float:
        now = self._clock()
        seconds = now - self._last
        self._last = now
        return seconds


class Prefix:
    """A prompt as far as it has been prefilled. Dropping it frees its caches.

    Attributes:
      thinker: the dialogue is its first slot; where the mesh needs more slots, they are empty.
      talker: the same, if the Talker prefills along.
      chunks: that have been prefilled.
      length: tokens that have been prefilled.
    """

    def __init__(
        self, engines: Engines, capacity: int, timings: Timings, *, with_talker: bool, adapter: str | None = None
    ):
        """Nothing has been prefilled.

        Args:
          engines: of a model.
          capacity: tokens that there is room for at first.
          timings: to which the time is added.
          with_talker: whether the Talker prefills along.
          adapter: of the Thinker's, that the request has chosen.
        """
        self._engines = engines
        self._timings = timings
        self._adapter = adapter
        self._num_slots = engines.round_slots(1)
        self._pieces: deque[PromptPiece] = deque()
        self._pending: deque[PrefillChunk] = deque()  # of the piece that is being prefilled
        # of the same piece, one array for each call of an encoder
        self._features: list[jax.Array] = []
        self.thinker: ThinkerPrefix = engines.thinker.init_prefix(self._num_slots, capacity)
        self.talker: Context | None = None
        if with_talker:
            assert engines.talker is not None
            self.talker = engines.talker.init_prefix(self._num_slots, capacity)
        self.chunks: list[PrefillChunk] = []
        self.length = 0

    @property
    def num_bytes(self) -> int:
        """Of its arrays."""
        return sum(array.nbytes for array in jax.tree.leaves((self.thinker, self.talker)))

    def fork(self, *, with_talker: bool, timings: Timings) -> Prefix:
        """A copy that can be prefilled further while this one stays; all that was added here must be prefilled.

        Args:
          with_talker: whether the Talker's is copied too.
          timings: to which the time of the copy is added.
        """
        assert not self.pending
        forked = copy.copy(self)
        forked._timings = timings
        forked._pieces = deque()
        forked._pending = deque()
        forked._features = []
        forked.thinker, forked.talker = copy_arrays((self.thinker, self.talker if with_talker else None))
        forked.chunks = list(self.chunks)
        return forked

    @property
    def pending(self) -> bool:
        """Whether something has been added that is not prefilled yet."""
        return bool(self._pieces or self._pending)

    def add(self, pieces: Sequence[PromptPiece]) -> None:
        """Takes the next pieces of the prompt; ``step`` prefills them."""
        self._pieces += pieces

    def step(self) -> SlotUse:
        """Prefills the next chunk, and runs the encoders where a piece begins.

        Returns:
          Positions of the chunk, real ones and all.
        """
        # the encoders run once for a piece, before its first chunk
        if not self._pending:
            self._encode(self._pieces.popleft())
        if not self._pending:  # an empty piece
            return SlotUse()
        stopwatch = Stopwatch(self._engines.clock)
        chunk = self._pending.popleft()
        start = self.length
        self.length += chunk.num_tokens
        thinker = self._engines.thinker
        # resized as the prompt grows: nobody knows a live prompt's length before it ends
        resized = thinker.resize_prefix(self.thinker, self.length)
        self.thinker = thinker.prefill(resized, chunk, self._features, self._adapter)
        # the Talker reads what the Thinker has just written for these positions
        if self.talker is not None:
            self.talker = prefill_talker(self._engines, self.talker, self.thinker.talker_inputs, chunk, start)
        # kept for a reply that is spoken later: the Talker then prefills the same chunks
        self.chunks.append(chunk)
        # between two chunks others have their turn; without waiting, all of them would be queued on the device
        jax.block_until_ready(self.thinker.context.hidden)
        self._timings.prefill += stopwatch.lap()
        return SlotUse(int(chunk.valid.sum()), chunk.valid.size)

    def run(self) -> None:
        """Prefills all that has been added."""
        while self.pending:
            self.step()

    def _encode(self, piece: PromptPiece) -> None:
        stopwatch = Stopwatch(self._engines.clock)
        # slots that only the mesh needs prefill nothing
        spare = [PromptPiece(EMPTY_PROMPT, ())] * (self._num_slots - 1)
        plan = plan_prefill([piece, *spare], self._engines.config)
        # waited for: the time is the encoders', and an error of theirs shows in this call
        features = [self._engines.thinker.encode(media, self._adapter) for media in plan.encoder_inputs]
        self._features = jax.block_until_ready(features)
        self._pending.extend(plan.chunks)
        self._timings.encode += stopwatch.lap()


@jax.jit
def copy_arrays(tree: T) -> T:
    """Arrays of their own, which may be donated."""
    return jax.tree.map(jnp.copy, tree)


def prefill_talker(
    engines: Engines, prefix: Context, talker_inputs: Array | None, chunk: PrefillChunk, start: int
) -> Context:
    """The Talker's prefix after one more chunk; it is resized where the chunk needs it.

    Args:
      engines: of a model that speaks.
      prefix: it is used up.
      talker_inputs: of the Thinker's prefix, with the chunk in it.
      chunk: the next one.
      start: tokens before it.
    """
    assert engines.talker is not None and talker_inputs is not None
    prefix = engines.talker.resize_prefix(prefix, start + chunk.num_tokens)
    return engines.talker.prefill(prefix, talker_inputs, chunk, start)
