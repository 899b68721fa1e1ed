"""A batch of dialogues on their way through the loops: prompts are read, then text, codes and sound come out.

Prompts may be read piece by piece, as somebody speaks. Where sound is streamed, Thinker, Talker and Token2Wav take
turns: some tokens, as many codes as these tokens allow, and a block of sound when there are codes for one. Otherwise
each finishes before the next begins, and Token2Wav sees the whole reply at once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from omni_jax import positions
from omni_jax.batch import Array, Spans
from omni_jax.checkpoint.voices import Voice
from omni_jax.config import OmniConfig
from omni_jax.generation.reply import Event, Reply, ReplyWriter, Timings
from omni_jax.generation.speech import Said, SpeechLoop, SpeechRequest, SpeechState, Talk
from omni_jax.generation.text import NOTHING, TextLoop, TextRequest, TextState
from omni_jax.generation.waveform import Waveform
from omni_jax.generation.waveform_stream import WaveformStream
from omni_jax.positions import Span
from omni_jax.processing.chunks import feed
from omni_jax.processing.layout import Prompt, Usage

ROOM = 512  # tokens or codes of a reply that there is room for at first; caches double when it is used up
NOBODY = Prompt(np.zeros(0, np.int32), (), (), np.zeros(0, np.int32), np.zeros(0, np.int32), Usage())


@dataclass(frozen=True)
class Pace:
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
class Loops:
    """What does the work; it is shared by all requests."""

    config: OmniConfig
    pace: Pace
    text: TextLoop
    speech: SpeechLoop | None
    wave: Waveform | None


@dataclass(frozen=True)
class Voicing:
    """How a reply is to be spoken."""

    voice: Voice
    talk: Talk
    seed: int  # of the noise that the sound is made from


@dataclass
class Ask:
    """One row's request, and what has come of it.

    Attributes:
      prompt: the token ids that the row has read.
      after: the span of the two position ids that the Talker reads behind them.
      usage: what the prompt is made of.
      text: how the Thinker is to answer.
      writer: of the answer.
      voicing: how it is to be spoken, if it is.
    """

    prompt: np.ndarray
    after: Span
    usage: Usage
    text: TextRequest
    writer: ReplyWriter
    voicing: Voicing | None = None
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

    def reply(self, timings: Timings) -> Reply:
        assert self.writer.finish_reason is not None
        reply = Reply(self.writer.text, tuple(self.writer.ids), self.writer.finish_reason, self.usage, timings)
        if self.voicing is None:
            return reply
        codes, audio = (np.concatenate([np.zeros(0, kind), *parts]) for kind, parts in self._parts())
        return dataclasses.replace(reply, codec_ids=tuple(codes.tolist()), audio=audio)

    def _parts(self) -> list[tuple[type, list[np.ndarray]]]:
        return [(np.int32, self.codes), (np.float32, self.audio)]


class Exchange:
    """The state of a batch of dialogues. Dropping it frees all of it."""

    def __init__(self, loops: Loops, rows: int, slots: int, *, speaks: bool):
        """For so many rows, with room for ``slots`` tokens of each; more is made when it is needed."""
        self.timings = Timings()
        self._loops, self._rows = loops, rows
        self._text: TextState | None = loops.text.empty(rows, slots)
        self._heard: Array | None = None  # the Thinker's, once its cache is given up
        self._speech: SpeechState | None = None
        self._begun: set[int] = set()  # rows that speak or have spoken
        if speaks:
            assert loops.speech is not None
            self._speech = loops.speech.empty(rows, slots)

    def read(self, prompts: Sequence[Prompt], spans: Sequence[Sequence[Span]]) -> None:
        """Reads prompts, or the next piece of each.

        Args:
          prompts: of the rows in turn; rows beyond them read nothing.
          spans: of the position ids of each, counted from its first token.
        """
        assert self._text is not None
        clock, spare = Clock(), self._rows - len(prompts)
        text, speech = self._loops.text, self._loops.speech
        plan = feed([*prompts, *[NOBODY] * spare], [*spans, *[[]] * spare], self._loops.config)
        features = jax.block_until_ready([text.encode(call) for call in plan.calls])
        self.timings.encode += clock.lap()
        for stretch in plan.stretches:
            held = int((np.asarray(self._text.cache.end) + stretch.chunk.valid.sum(axis=1)).max())
            self._text = text.read(text.grown(self._text, held), stretch, features)
            if self._speech is not None:
                assert speech is not None and self._text.heard is not None
                self._speech = speech.read(speech.grown(self._speech, held), self._text.heard, stretch.chunk)
        jax.block_until_ready(self._text.hidden)
        self.timings.prefill += clock.lap()

    def answer(self, asks: Sequence[Ask], *, live: bool) -> Iterator[tuple[int, Event]]:
        """Answers what has been read; yields the rows' pieces, and in the end the reply of each.

        Args:
          asks: of the rows in turn.
          live: whether sound is to come as it is made; otherwise it comes with the reply.
        """
        assert self._text is not None
        prompts, requests = {i: a.prompt for i, a in enumerate(asks)}, {i: a.text for i, a in enumerate(asks)}
        self._text = self._loops.text.ask(self._text, requests, prompts)
        stream = self._open(asks) if live and self._speech is not None else None
        steps = self._loops.pace.first_tokens if live else self._loops.pace.tokens
        while self._text is not None or self._to_speak(asks):
            if self._text is not None:
                yield from self._think(asks, steps)
                steps = self._loops.pace.tokens
            if self._speech is not None and (stream is not None or self._text is None):
                yield from self._talk(asks, stream)
        if self._speech is not None and stream is None:
            self._voice(asks)
        for i, ask in enumerate(asks):
            reply = ask.reply(self.timings)
            yield i, Event(None, None if live else reply.audio, reply)

    def _think(self, asks: Sequence[Ask], steps: int) -> Iterator[tuple[int, Event]]:
        """Some tokens of each row; their text."""
        assert self._text is not None
        clock = Clock()
        over = self._each([ask.ended for ask in asks])
        made, self._text = self._loops.text.advance(self._text, steps, ended=over)
        left, pieces = np.asarray(self._text.left), []
        for i, ask in enumerate(asks):
            piece = "" if ask.ended else ask.writer.push(made[i])
            if not ask.ended and left[i] == 0:
                piece += ask.writer.end()
            pieces.append(piece)
        if all(ask.ended for ask in asks):  # the cache is not needed while the reply is spoken to its end
            self._heard, self._text = self._text.heard, None
        self.timings.decode += clock.lap()
        yield from ((i, Event(piece)) for i, piece in enumerate(pieces) if piece)

    def _to_speak(self, asks: Sequence[Ask]) -> bool:
        """Whether a row has something left to say aloud."""
        return self._speech is not None and not all(self._silent(asks))

    def _silent(self, asks: Sequence[Ask]) -> list[bool]:
        """Of each row, whether its speech is over. A reply of one token or none has none."""
        assert self._speech is not None
        left = np.asarray(self._speech.left)
        return [bool(left[i] == 0) if i in self._begun else a.ended and a.tokens < 2 for i, a in enumerate(asks)]

    def _talk(self, asks: Sequence[Ask], stream: WaveformStream | None) -> Iterator[tuple[int, Event]]:
        """Some codes of each row, as far as its text has come; their sound, if it is streamed."""
        speech = self._loops.speech
        assert speech is not None and self._speech is not None
        clock = Clock()
        heard = self._heard if self._text is None else self._text.heard
        assert heard is not None
        said = Said(*(self._each(row) for row in zip(*((len(a.prompt), a.tokens, a.ended) for a in asks), strict=True)))
        new = {i: a for i, a in enumerate(asks) if i not in self._begun and a.tokens >= 2}
        if new:
            self._speech = speech.begin(self._speech, heard, self._requests(new), self._spans(new))
            self._begun |= set(new)
        made = [np.zeros(0, np.int32)] * len(asks)
        if speech.ready(self._speech, said).any():
            codes, self._speech = speech.advance(self._speech, heard, said)
            made = [row[row != NOTHING] for row in codes[: len(asks)]]
        for ask, codes in zip(asks, made, strict=True):
            ask.codes.append(codes)
        self.timings.talk += clock.lap()
        if stream is not None:
            pieces = stream.push(made, self._silent(asks))
            self.timings.wave += clock.lap()
            for i, (ask, piece) in enumerate(zip(asks, pieces, strict=True)):
                ask.audio.append(piece)
                if len(piece):
                    yield i, Event(None, piece)

    def _each(self, values: Sequence[int | bool]) -> np.ndarray:
        """An array with a value for each row; 0 for those beyond the requests."""
        return np.array([*values, *[type(values[0])(0)] * (self._rows - len(values))])

    def _requests(self, asks: Mapping[int, Ask]) -> dict[int, SpeechRequest]:
        out = {}
        for i, ask in asks.items():
            assert ask.voicing is not None
            out[i] = SpeechRequest(len(ask.prompt), ask.voicing.voice.bos_token, ask.voicing.talk)
        return out

    def _spans(self, asks: Mapping[int, Ask]) -> Spans:
        return positions.stack([[asks[i].after] if i in asks else [] for i in range(self._rows)], 2, width=1)

    def _open(self, asks: Sequence[Ask]) -> WaveformStream:
        wave, pace = self._loops.wave, self._loops.pace
        voicings = [a.voicing for a in asks if a.voicing is not None]
        assert wave is not None and len(voicings) == len(asks)
        voices, seeds = [v.voice for v in voicings], [v.seed for v in voicings]
        return wave.stream(voices, seeds, first_chunk_codes=pace.first_chunk_codes, chunk_codes=pace.chunk_codes)

    def _voice(self, asks: Sequence[Ask]) -> None:
        """The sound of all rows that have codes, at once; the others are silent, of no length."""
        clock = Clock()
        assert self._loops.wave is not None
        codes = {i: np.concatenate(a.codes) for i, a in enumerate(asks) if sum(map(len, a.codes))}
        voicings = [asks[i].voicing for i in codes]
        voices, seeds = [v.voice for v in voicings if v], [v.seed for v in voicings if v]
        audio = self._loops.wave.synthesize(list(codes.values()), voices, [None] * len(codes), seeds)
        for i, samples in zip(codes, audio, strict=True):
            asks[i].audio.append(samples)
        self.timings.wave += clock.lap()


class Clock:
    """Seconds since it was made, or since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return self._last - last
