"""What the scheduler works on: a request as it was asked, and where it stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from omni_jax.batch import Array
from omni_jax.checkpoint.voices import Voice
from omni_jax.engine.outputs import Reply, ReplyWriter, Timings
from omni_jax.engine.prefill import ROOM, Reading
from omni_jax.engine.talker_engine import TalkerParams
from omni_jax.engine.thinker_engine import TextRequest
from omni_jax.engine.token2wav_streaming import WaveformStream
from omni_jax.mrope import Span
from omni_jax.processing.layout import Prompt, Usage
from omni_jax.processing.prefill_plan import Chunk

BLOCK_SIZES = (16, 32, 64, 128)  # of lists of whole replies, in blocks of 0.24 s of speech


@dataclass(frozen=True)
class SchedulerConfig:
    """How many requests are in each stage at once.

    Attributes:
      thinker: rows of text that is being said.
      talker: rows of speech that is being said.
      blocks: sizes of the lists of blocks, 0.24 seconds each, that whole replies are voiced in; a list waits until the
        largest is full or nothing else is left to do. Without them all that is left is voiced at once.
    """

    thinker: int = 1
    talker: int = 1
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Voicing:
    """How a reply is to be spoken."""

    voice: Voice
    talk: TalkerParams
    seed: int  # of the noise that the sound is made from


@dataclass
class Request:
    """What is asked of the model, and what has come of it.

    Attributes:
      prompt: the token ids.
      after: the span of the two position ids that the Talker reads behind them.
      usage: what the prompt is made of.
      text: how the Thinker is to answer.
      writer: of the answer.
      voicing: how it is to be spoken, if it is.
      live: whether sound is to come as it is made; otherwise it comes with the reply.
    """

    prompt: np.ndarray
    after: Span
    usage: Usage
    text: TextRequest
    writer: ReplyWriter
    voicing: Voicing | None = None
    live: bool = False
    codes: list[np.ndarray] = field(default_factory=list)
    audio: list[np.ndarray] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the text is whole."""
        return self.writer.finish_reason is not None

    @property
    def tokens(self) -> int:
        """How many tokens of the reply are known to be spoken."""
        return self.writer.spoken if self.ended else self.writer.settled

    @property
    def room(self) -> int:
        """Tokens that caches should have room for at first."""
        said = min(ROOM, self.text.max_tokens)
        if self.voicing is not None:
            said = max(said, min(ROOM, self.voicing.talk.max_tokens + 2))
        return len(self.prompt) + said

    def reply(self, timings: Timings) -> Reply:
        assert self.writer.finish_reason is not None
        timings = dataclasses.replace(timings)
        reply = Reply(self.writer.text, tuple(self.writer.ids), self.writer.finish_reason, self.usage, timings)
        if self.voicing is None:
            return reply
        codes = np.concatenate([np.zeros(0, np.int32), *self.codes])
        audio = np.concatenate([np.zeros(0, np.float32), *self.audio])
        return dataclasses.replace(reply, codec_ids=tuple(codes.tolist()), audio=audio)


@dataclass(eq=False)
class RequestState:
    """A request on its way through the scheduler; ``Scheduler.submit`` makes it.

    Attributes:
      ask: what is asked.
      error: why there is no answer, once that is known.

    The rest is the scheduler's: where the request stands.
    """

    ask: Request
    error: Exception | None = None
    reading: Reading | None = None
    pieces: Sequence[tuple[Prompt, Sequence[Span]]] = ()
    unread: Iterator[tuple[int, int]] | None = None
    chunks: Sequence[Chunk] = ()  # of the prompt, for the Talker
    row: int | None = None  # of the Thinker
    heard: Array | None = None  # what the Thinker read and said, [1, slots, E], once it has given back the row
    seat: int | None = None  # the row of the Talker
    written: int = 0  # tokens in the script
    started: bool = False  # whether the Talker has read the voice
    fresh: list[np.ndarray] = field(default_factory=list)  # codes that the stream of sound has not got yet
    stream: WaveformStream | None = None
    plays: float = 0.0  # when the first packet was given
    given: int = 0  # samples

    @property
    def speaks(self) -> bool:
        return self.ask.voicing is not None


@dataclass
class Share:
    """How much of what was computed held something."""

    used: int = 0
    computed: int = 0

    def add(self, used: int, computed: int) -> None:
        self.used, self.computed = self.used + used, self.computed + computed


@dataclass
class Utilization:
    """What a scheduler has done: positions of prompts, tokens and codes of both loops, and codes that became sound."""

    read: Share = field(default_factory=Share)
    think: Share = field(default_factory=Share)
    talk: Share = field(default_factory=Share)
    voice: Share = field(default_factory=Share)
