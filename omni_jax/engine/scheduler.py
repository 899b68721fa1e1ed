"""The engine: requests in, pieces of replies out, as many at once as there are slots.

A request is read, answered by the Thinker, spoken by the Talker and voiced by Token2Wav, and each of these works on
batches of fixed shape whose rows come and go: who has been read takes a row of the Thinker's, who has said all of his
text gives it back. One ``step`` does a little of each, and what it does is one jitted call of each at most, so that a
request can join or leave between two steps.

Where sound is to come as it is made, Thinker, Talker and Token2Wav take turns: some tokens, as many codes as these
allow, and a block of sound when there are codes for one. Otherwise a reply is spoken when its text is whole, so that a
row of the Thinker's is not kept while the Talker, which takes many more steps, has its turn; and the sound of several
replies is made at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from omni_jax import mrope
from omni_jax.batch import Array
from omni_jax.engine.outputs import Event, Reply, Timings
from omni_jax.engine.prefill import Clock, Engines, Reading
from omni_jax.engine.request import Request, RequestState, SchedulerConfig, Utilization
from omni_jax.engine.talker_engine import STRIDE, Said, SpeechRequest, SpeechState
from omni_jax.engine.thinker_engine import PAD_TOKEN, TextState
from omni_jax.engine.token2wav_engine import size_for
from omni_jax.engine.token2wav_streaming import WaveformStream
from omni_jax.errors import CheckpointError, InputError
from omni_jax.models.token2wav import SAMPLE_RATE
from omni_jax.mrope import Span
from omni_jax.processing.layout import Prompt

_SHORT = 0.5  # seconds of sound ahead of a listener, under which a stream goes before those that have not started


class Scheduler:
    """Requests at work. Dropping it frees all that it holds.

    Attributes:
      timings: where the time went.
      load: how much of the work was padding.
    """

    def __init__(self, loops: Engines, slots: SchedulerConfig | None = None):
        self.timings, self.load = Timings(), Utilization()
        self._loops, self._slots = loops, slots or SchedulerConfig()
        self._waiting: deque[RequestState] = deque()
        self._reader: RequestState | None = None
        self._rows: list[RequestState | None] = [None] * loops.rows(self._slots.thinker)
        self._to_speak: deque[RequestState] = deque()  # whose text is whole
        self._seats: list[RequestState | None] = [None] * loops.rows(self._slots.talker)
        self._to_voice: list[RequestState] = []  # whose codes are whole
        self._bursting = True
        self._text: TextState | None = None
        self._speech: SpeechState | None = None
        self._script: jax.Array | None = None
        self._done: list[tuple[RequestState, Event]] = []

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._tasks() or self._done)

    @property
    def waiting(self) -> int:
        """Requests of which nothing has been read yet."""
        return len(self._waiting)

    @property
    def answering(self) -> int:
        """Requests that are answered or spoken now."""
        return len({id(t) for t in [*self._rows, *self._seats] if t is not None})

    def read(self, slots: int, *, speaks: bool) -> Reading:
        """The caches for a prompt that is read before it is submitted."""
        return Reading(self._loops, slots, self.timings, speaks=speaks)

    def submit(
        self, ask: Request, pieces: Sequence[tuple[Prompt, Sequence[Span]]], reading: Reading | None = None
    ) -> RequestState:
        """Takes a request.

        Args:
          ask: what is asked.
          pieces: of the prompt that are to be read, each with the spans of its position ids.
          reading: what came before them, if something did; it has the Talker read along if the request is live and
            spoken.
        """
        task = RequestState(ask, reading=reading, pieces=pieces)
        self._waiting.append(task)
        return task

    def cancel(self, task: RequestState) -> None:
        """Ends a request without an answer; what it held is free at once."""
        self._leave(task)
        self._done = [(other, event) for other, event in self._done if other is not task]

    def run(self) -> Iterator[tuple[RequestState, Event]]:
        """Works until nothing is left to do."""
        while self.busy:
            yield from self.step()

    def step(self) -> Iterator[tuple[RequestState, Event]]:
        """Does a little of everything, and yields what has come of it."""
        self._read()
        yield from self._think()
        self._talk()
        yield from self._stream()
        self._voice()
        done, self._done = self._done, []
        yield from done

    # who is where

    def _tasks(self) -> list[RequestState]:
        every = [*self._waiting, self._reader, *self._rows, *self._to_speak, *self._seats, *self._to_voice]
        return [task for task in every if task is not None]

    def _leave(self, task: RequestState) -> None:
        """Takes a request out of every stage."""
        self._waiting = deque(t for t in self._waiting if t is not task)
        self._to_speak = deque(t for t in self._to_speak if t is not task)
        self._to_voice = [t for t in self._to_voice if t is not task]
        self._rows = [None if t is task else t for t in self._rows]
        self._seats = [None if t is task else t for t in self._seats]
        if self._reader is task:
            self._reader = None
        task.reading = task.unread = task.heard = task.stream = None
        self._tidy()

    def _tidy(self) -> None:
        """Frees the caches that nobody is in."""
        if not any(self._rows):
            self._text = None
        if not any(self._seats):
            self._speech = self._script = None

    def _finish(self, task: RequestState) -> None:
        self._leave(task)
        reply = task.ask.reply(self.timings)
        self._done.append((task, Event(None, None if task.ask.live else reply.audio, reply)))

    def _fail(self, task: RequestState, error: Exception) -> None:
        self._leave(task)
        task.error = error
        self._done.append((task, Event(None, None, Reply.failed(error))))

    # reading

    def _read(self) -> None:
        """Reads until all rows of the Thinker are taken; only a chunk of one prompt where somebody waits for sound."""
        while self._reader is not None or self._next():
            task = self._reader
            assert task is not None and task.unread is not None
            try:
                share = next(task.unread, None)
            except (InputError, CheckpointError, jax.errors.JaxRuntimeError) as e:
                self._fail(task, e)
                continue
            if share is None:
                self._place(task)
            else:
                self.load.read.add(*share)
                if any(t is not None and t.ask.live for t in [*self._rows, *self._seats]):
                    return

    def _next(self) -> bool:
        """Begins to read the next request that there is room for."""
        self._burst()
        in_turn = sorted(self._waiting, key=lambda t: not t.ask.live)
        task = next((t for t in in_turn if self._has_room(t)), None)
        if task is None:
            return False
        self._waiting.remove(task)
        self._reader = task
        if task.reading is None:
            task.reading = self.read(task.ask.room, speaks=task.speaks and task.ask.live)
        task.unread = _all(task.reading, task.pieces)
        return True

    def _burst(self) -> None:
        """Decides whether to read requests that are spoken when their text is whole; they come in bursts.

        A step of the Thinker costs the same for one row as for many, and speech takes so much longer than text that
        its rows would be taken one at a time; so it waits until there is little left to speak, and then fills up.
        """
        ahead = len(self._to_speak) + sum(t is not None and t.speaks and not t.ask.live for t in self._rows)
        if ahead >= len(self._seats) + len(self._rows):
            self._bursting = False
        elif len(self._to_speak) <= len(self._seats) // 2:
            self._bursting = True

    def _has_room(self, task: RequestState) -> bool:
        """Whether a request may be read."""
        if None not in self._rows:
            return False
        if not task.speaks:
            return True
        return None in self._seats if task.ask.live else self._bursting

    def _place(self, task: RequestState) -> None:
        """Gives a request that has been read its row, and where it is live a seat of the Talker's."""
        reading, ask, loops = task.reading, task.ask, self._loops
        assert reading is not None
        self._reader, task.reading, task.unread = None, None, None
        task.chunks = reading.chunks
        text = loops.text.ask(reading.text, {0: ask.text}, {0: ask.prompt})
        if self._text is None:
            self._text = loops.text.empty(len(self._rows), text.cache.capacity)
        task.row = self._rows.index(None)
        self._rows[task.row] = task
        self._text = loops.text.put(self._text, task.row, text)
        if reading.speech is not None:
            self._sit(task, reading.speech)

    def _sit(self, task: RequestState, speech: SpeechState) -> None:
        """Gives a request whose prompt the Talker has read a seat."""
        loop = self._loops.speech
        assert loop is not None
        if self._speech is None:
            self._speech = loop.empty(len(self._seats), speech.cache.capacity)
            self._script = loop.script(len(self._seats))
        task.seat = self._seats.index(None)
        self._seats[task.seat] = task
        self._speech = loop.put(self._speech, task.seat, speech)

    # text

    def _think(self) -> Iterator[tuple[RequestState, Event]]:
        """Some tokens of every row; their text."""
        tasks = [task for task in self._rows if task is not None]
        if not tasks or self._text is None:
            return
        clock, pace = Clock(), self._loops.pace
        hurry = any(task.ask.live and not task.ask.writer.ids for task in tasks)
        steps = pace.first_tokens if hurry else pace.tokens
        over = np.array([task is None or task.ask.ended for task in self._rows])
        made, self._text = self._loops.text.advance(self._text, steps, ended=over)
        left = np.asarray(self._text.left)
        steps_made = int((made != PAD_TOKEN).any(axis=0).sum())
        self.load.think.add(int((made != PAD_TOKEN).sum()), steps_made * len(self._rows))
        pieces = []
        for task in tasks:
            assert task.row is not None
            piece = task.ask.writer.push(made[task.row])
            if not task.ask.ended and left[task.row] == 0:
                piece += task.ask.writer.end()
            if piece:
                pieces.append((task, Event(piece)))
        self._write(self._text.heard)
        for task in tasks:
            if task.ask.ended:
                self._said(task)
        self._tidy()
        self.timings.decode += clock.lap()
        yield from pieces

    def _said(self, task: RequestState) -> None:
        """Gives back the row of a request whose text is whole."""
        assert self._text is not None and task.row is not None
        row, task.row = task.row, None
        self._rows[row] = None
        if task.seat is not None:  # its speech goes on
            return
        if not task.speaks or task.ask.live or task.ask.tokens < 2:
            self._finish(task)
        else:
            assert self._text.heard is not None and self._loops.speech is not None
            task.heard = self._loops.speech.alone(self._text.heard, row, self._loops.rows(1))
            self._to_speak.append(task)

    def _write(self, heard: Array | None) -> None:
        """Takes what the Thinker has said since to the script of each live request."""
        while True:
            behind = [t for t in self._seats if t is not None and t.row is not None and t.written < t.ask.tokens]
            if not behind or heard is None:
                return
            self._written(heard, behind, {id(task): task.row for task in behind})

    def _written(self, heard: Array, tasks: Sequence[RequestState], rows: dict[int, int | None]) -> None:
        assert self._script is not None and self._loops.speech is not None
        source, place, begin = (np.full(len(self._seats), value) for value in (-1, 0, 0))
        for task in tasks:
            source[task.seat], place[task.seat] = rows[id(task)], len(task.ask.prompt)
            begin[task.seat] = task.written
            task.written = min(task.written + STRIDE, task.ask.tokens)
        self._script = self._loops.speech.written(self._script, heard, source, place, begin)

    # speech

    def _talk(self) -> None:
        """Some codes of every seat, as far as its text has come."""
        kept = self._reader is not None and self._reader.speaks and self._reader.ask.live
        while self._to_speak and self._seats.count(None) > kept:
            self._listen(self._to_speak.popleft())
        tasks = [task for task in self._seats if task is not None]
        if not tasks or self._more_to_come():
            return
        clock, loop = Clock(), self._loops.speech
        assert loop is not None and self._speech is not None and self._script is not None
        new = {task.seat: task for task in tasks if not task.started and task.ask.tokens >= 2}
        if new:
            requests = {seat: _request(task) for seat, task in new.items() if seat is not None}
            spans = [[new[i].ask.after] if i in new else [] for i in range(len(self._seats))]
            self._speech = loop.begin(self._speech, self._script, requests, mrope.stack(spans, 2, width=1))
            for task in new.values():
                task.started = True
        said = self._said_so_far()
        if loop.ready(self._speech, said).any():
            made, self._speech = loop.advance(self._speech, self._script, said)
            spoken = made != PAD_TOKEN
            self.load.talk.add(int(spoken.sum()), int(spoken.any(axis=0).sum()) * len(self._seats))
            for task in tasks:
                codes = made[task.seat]
                task.ask.codes.append(codes[codes != PAD_TOKEN])
                task.fresh.append(task.ask.codes[-1])
        for task in tasks:
            if not task.ask.live and self._silent(task):
                self._spoken(task)
        self._tidy()
        self.timings.talk += clock.lap()

    def _more_to_come(self) -> bool:
        """Whether the Talker had better wait: seats are free, nobody listens, and texts are on their way to them."""
        if None not in self._seats or any(task is not None and task.ask.live for task in self._seats):
            return False
        on_the_way = [*self._rows, self._reader, *(self._waiting if self._bursting else ())]
        return any(task is not None and task.speaks and not task.ask.live for task in on_the_way)

    def _said_so_far(self) -> Said:
        asks = [None if task is None or not task.started else task.ask for task in self._seats]
        tokens = np.array([0 if ask is None else ask.tokens for ask in asks])
        ended = np.array([ask is not None and ask.ended for ask in asks])
        return Said(np.zeros(len(asks), np.int32), tokens, ended)

    def _listen(self, task: RequestState) -> None:
        """The Talker hears a request whose text is whole, prompt and reply."""
        loop, heard, clock = self._loops.speech, task.heard, Clock()
        assert loop is not None and heard is not None
        speech = loop.empty(self._loops.rows(1), task.ask.room)
        for chunk in task.chunks:
            held = int((np.asarray(speech.cache.lengths) + chunk.valid.sum(axis=1)).max())
            speech = loop.read(loop.grown(speech, held), heard, chunk)
        self._sit(task, speech)
        while task.written < task.ask.tokens:
            self._written(heard, [task], {id(task): 0})
        task.heard, task.chunks = None, ()
        self.timings.talk += clock.lap()

    def _silent(self, task: RequestState) -> bool:
        """Whether the speech of a request is over. A reply of one token or none has none."""
        if not task.started:
            return task.ask.ended and task.ask.tokens < 2
        assert self._speech is not None
        return bool(np.asarray(self._speech.left)[task.seat] == 0)

    def _spoken(self, task: RequestState) -> None:
        """Gives back the seat of a request whose codes are whole."""
        assert task.seat is not None
        self._seats[task.seat], task.seat = None, None
        if sum(map(len, task.ask.codes)):
            self._to_voice.append(task)
        else:
            self._finish(task)

    # sound

    def _stream(self) -> Iterator[tuple[RequestState, Event]]:
        """The next piece of sound of the live request that needs it most."""
        clock = Clock()
        live = [task for task in self._seats if task is not None and task.ask.live]
        for task in sorted(live, key=self._time_left):
            over = self._silent(task)
            if not task.fresh and not over:
                continue
            if over and not sum(map(len, task.ask.codes)):
                self._silenced(task)
                continue
            codes, task.fresh = np.concatenate([np.zeros(0, np.int32), *task.fresh]), []
            if task.stream is None:
                task.stream = self._open(task)
            (piece,) = task.stream.push([codes], [over])
            task.ask.audio.append(piece)
            if over:
                self._silenced(task)
            if len(piece):
                task.plays = task.plays or time.perf_counter()
                task.given += len(piece)
                self.timings.wave += clock.lap()
                yield task, Event(None, piece)
                return
        self.timings.wave += clock.lap()

    def _silenced(self, task: RequestState) -> None:
        """Gives back the seat of a live request that has been heard to its end; its text may go on."""
        assert task.seat is not None
        self._seats[task.seat], task.seat, task.stream = None, None, None
        if task.ask.ended:
            self._finish(task)
        self._tidy()

    def _time_left(self, task: RequestState) -> float:
        """Seconds until a listener has heard all that there is."""
        if not task.given:
            return _SHORT
        return task.plays + task.given / SAMPLE_RATE - time.perf_counter()

    def _open(self, task: RequestState) -> WaveformStream:
        wave, pace, voicing = self._loops.wave, self._loops.pace, task.ask.voicing
        assert wave is not None and voicing is not None
        first, later = pace.first_chunk_codes, pace.chunk_codes
        return wave.stream([voicing.voice], [voicing.seed], first_chunk_codes=first, chunk_codes=later)

    def _voice(self) -> None:
        """The sound of whole replies, when a list of blocks is full or nothing else is left to do."""
        others = len(self._tasks()) > len(self._to_voice)
        if not self._to_voice or (others and not self._full()):
            return
        clock, wave = Clock(), self._loops.wave
        assert wave is not None
        tasks = self._list()
        codes = [np.concatenate(task.ask.codes) for task in tasks]
        voicings = [task.ask.voicing for task in tasks if task.ask.voicing is not None]
        voices, seeds = [v.voice for v in voicings], [v.seed for v in voicings]
        audio = wave.synthesize(codes, voices, [None] * len(tasks), seeds, self._slots.blocks)
        for task, samples in zip(tasks, audio, strict=True):
            task.ask.audio.append(samples)
        self.timings.wave += clock.lap()
        size = size_for(sum(map(self._blocks, tasks)), self._slots.blocks)
        self.load.voice.add(sum(map(len, codes)), size * wave.codes_a_block)
        for task in tasks:
            self._finish(task)

    def _full(self) -> bool:
        blocks = self._slots.blocks
        return bool(blocks) and sum(map(self._blocks, self._to_voice)) >= blocks[-1]

    def _list(self) -> list[RequestState]:
        """The replies of the next list, from the first on."""
        if not self._slots.blocks:
            return list(self._to_voice)
        tasks, blocks = self._to_voice[:1], self._blocks(self._to_voice[0])
        for task in self._to_voice[1:]:
            if blocks + self._blocks(task) <= self._slots.blocks[-1]:
                tasks.append(task)
                blocks += self._blocks(task)
        return tasks

    def _blocks(self, task: RequestState) -> int:
        assert self._loops.wave is not None
        return self._loops.wave.blocks(sum(map(len, task.ask.codes)))


def _request(task: RequestState) -> SpeechRequest:
    voicing = task.ask.voicing
    assert voicing is not None
    return SpeechRequest(len(task.ask.prompt), 0, voicing.voice.bos_token, voicing.talk)


def _all(reading: Reading, pieces: Iterable[tuple[Prompt, Sequence[Span]]]) -> Iterator[tuple[int, int]]:
    for prompt, spans in pieces:
        yield from reading.read(prompt, spans)
