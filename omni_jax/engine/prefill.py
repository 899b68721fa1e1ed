"""A dialogue's prompt on its way into the caches of Thinker and Talker, in chunks of fixed width.

A prompt is read into caches of its own, and takes its place among those that are answered when it has been read. So
nobody's answer has to wait for the whole of somebody else's prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.engine.outputs import Timings
from omni_jax.engine.talker_engine import SpeechState, TalkerEngine
from omni_jax.engine.thinker_engine import TextState, ThinkerEngine
from omni_jax.engine.token2wav_engine import Token2WavEngine
from omni_jax.mrope import Span
from omni_jax.processing.layout import Prompt, Usage
from omni_jax.processing.prefill_plan import Chunk, feed

ROOM = 512  # tokens or codes of a reply that there is room for at first; caches double when it is used up
EMPTY_PROMPT = Prompt(np.zeros(0, np.int32), (), (), np.zeros(0, np.int32), np.zeros(0, np.int32), Usage())


@dataclass(frozen=True)
class ChunkSizes:
    """How much is done at a time while a reply is streamed: less makes the first piece come sooner, more costs less.

    Attributes:
      first_tokens: of text in the first call of the Thinker.
      tokens: in each later one.
      codes: of speech in a call of the Talker at most.
      first_chunk_codes: that the first piece of sound is made from. Token2Wav looks ahead, see docs/streaming.md.
      chunk_codes: that each later piece adds.
    """

    first_tokens: int = 2
    tokens: int = 8
    codes: int = 16
    first_chunk_codes: int = 36
    chunk_codes: int = 24


@dataclass(frozen=True)
class Engines:
    """What does the work; it is shared by all requests.

    Attributes:
      multiple: that the rows of a batch must be of, for the mesh.
    """

    config: OmniConfig
    pace: ChunkSizes
    text: ThinkerEngine
    speech: TalkerEngine | None
    wave: Token2WavEngine | None
    multiple: int = 1

    def rows(self, requests: int) -> int:
        """Rows of a batch that holds so many requests."""
        return -(-requests // self.multiple) * self.multiple


class Reading:
    """A prompt as far as it has been read. Dropping it frees its caches.

    Attributes:
      text: the Thinker's state; the dialogue is its first row, and where the mesh needs more rows they are empty.
      speech: the Talker's, if it reads along.
      chunks: that were read.
    """

    def __init__(self, loops: Engines, slots: int, timings: Timings, *, speaks: bool):
        """With room for so many tokens; ``speaks`` has the Talker read along."""
        self._loops, self._timings, self._rows = loops, timings, loops.rows(1)
        self.text: TextState = loops.text.empty(self._rows, slots)
        self.speech: SpeechState | None = None
        self.chunks: list[Chunk] = []
        if speaks:
            assert loops.speech is not None
            self.speech = loops.speech.empty(self._rows, slots)

    def read(self, prompt: Prompt, spans: Sequence[Span]) -> Iterator[tuple[int, int]]:
        """Reads a prompt, or the next piece of one: what media there are at first, then a chunk at a time.

        Args:
          prompt: token ids and media.
          spans: of its position ids, counted from its first token.

        Yields:
          After each chunk, how many positions of it are real, and how many were computed.
        """
        clock, spare = Clock(), self._rows - 1
        text, speech = self._loops.text, self._loops.speech
        plan = feed([prompt, *[EMPTY_PROMPT] * spare], [spans, *[[]] * spare], self._loops.config)
        features = jax.block_until_ready([text.encode(call) for call in plan.calls])
        self._timings.encode += clock.lap()
        for stretch in plan.stretches:
            clock.lap()
            valid = stretch.chunk.valid
            held = int((np.asarray(self.text.cache.lengths) + valid.sum(axis=1)).max())
            self.text = text.read(text.grown(self.text, held), stretch, features)
            if self.speech is not None:
                assert speech is not None and self.text.heard is not None
                self.speech = speech.read(speech.grown(self.speech, held), self.text.heard, stretch.chunk)
            self.chunks.append(stretch.chunk)
            jax.block_until_ready(self.text.hidden)
            self._timings.prefill += clock.lap()
            yield int(valid.sum()), valid.size


class Clock:
    """Seconds since it was made, or since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return self._last - last
