"""The stage in which Token2Wav makes sound of codes: streams block by block, whole replies in lists."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from omni_jax.engine.outputs import Event, Timings, Utilization
from omni_jax.engine.prefill import Engines, Stopwatch
from omni_jax.engine.request import RequestState, Stage
from omni_jax.engine.stage import StageOutput
from omni_jax.engine.token2wav_engine import MIN_VOICES, Token2WavEngine
from omni_jax.engine.token2wav_lists import longest_list, round_num_blocks
from omni_jax.engine.token2wav_streaming import Token2WavStream
from omni_jax.models.token2wav import SAMPLE_RATE

MAX_PADDING = 1 / 8  # of the blocks of a list, where fewer replies fill a shorter one better
_MAX_WAIT_SECONDS = 20.0  # of a whole reply beside streams that never have the time for it; then it goes first
_NEW_STREAM_SECONDS = 0.5  # a stream with less sound ahead of its listener than this goes before new streams


@dataclass
class _StreamRecord:
    """A stream of sound.

    Attributes:
      stream: None before the first codes.
      num_pushed: codes that the stream has been given.
      is_last: whether no more codes follow.
      is_complete: whether all sound has been given.
      start: when the first sound was given, by the engines' clock.
      last: when the last sound was given.
      num_samples: given so far.
    """

    stream: Token2WavStream | None = None
    num_pushed: int = 0
    is_last: bool = False
    is_complete: bool = False
    start: float = 0.0
    last: float = 0.0
    num_samples: int = 0


class VocoderStage:
    """Makes sound of codes. A step gives one piece of one stream, or the sound of one list of whole replies."""

    def __init__(self, engines: Engines, block_sizes: tuple[int, ...], timings: Timings, utilization: Utilization):
        self._engines = engines
        self._timings = timings
        self._engine = engines.token2wav
        self._block_sizes = block_sizes
        self._utilization = utilization
        self._streams: dict[RequestState, _StreamRecord] = {}
        self._waiting: dict[RequestState, float] = {}  # whole replies, and since when, by the engines' clock

    @property
    def states(self) -> list[RequestState]:
        return [*self._streams, *self._waiting]

    @property
    def waiting(self) -> list[RequestState]:
        """Whole replies that have no sound yet."""
        return list(self._waiting)

    def open_stream(self, state: RequestState) -> None:
        """Takes a live request, whose codes are going to come."""
        self._streams[state] = _StreamRecord()

    def end_stream(self, state: RequestState) -> None:
        """Says that a live request gets no more codes."""
        self._streams[state].is_last = True

    def enqueue(self, state: RequestState) -> None:
        """Takes a request whose codes are complete."""
        state.stage = Stage.VOCODER
        self._waiting[state] = self._engines.clock()

    def remove(self, state: RequestState) -> None:
        """Forgets a request, if it is here."""
        self._streams.pop(state, None)
        self._waiting.pop(state, None)

    def is_stream_complete(self, state: RequestState) -> bool:
        """Whether all sound of a live request has been given."""
        return self._streams[state].is_complete

    def step(self, *, is_idle: bool) -> StageOutput:
        """The next piece of the stream that needs it most; and the sound of a list of whole replies that is due.

        Args:
          is_idle: whether no other stage has anything to do, so that a list that is not full is due.

        Returns:
          ``finished`` has the whole replies that have their sound.
        """
        stopwatch = Stopwatch(self._engines.clock)
        output = self._step_streams()
        # a list costs a whole solve, so streams go first and a list waits until it is worth one
        if self._waiting and (self._has_listeners() or self._is_list_full() or is_idle):
            output.extend(self._synthesize(self._take_list()))
        self._timings.token2wav += stopwatch.lap()
        return output

    def _step_streams(self) -> StageOutput:
        output = StageOutput()
        for state in sorted(self._streams, key=self._seconds_ahead):
            try:
                # one with nothing due costs nothing, so the next is tried
                piece = self._step_stream(state)
            except Exception as error:
                output.fail([state], error)
                continue
            if len(piece):
                # one piece a step: then the decoders have their turn, and all streams are ranked anew
                output.events.append((state, self._make_event(state, piece)))
                break
        return output

    def _make_event(self, state: RequestState, piece: np.ndarray) -> Event:
        """A piece of sound, as its listener gets it."""
        assert self._engine is not None
        record = self._streams[state]
        now = self._engines.clock()
        hold_back = None
        # a player starts with the first sound, so what it has heard is counted from there
        if not record.num_samples:
            record.start = now
            hold_back = self._engine.pace.hold_back(len(piece) / SAMPLE_RATE)
        else:
            self._engine.pace.add_interval(now - record.last)
        record.last = now
        record.num_samples += len(piece)
        return Event(audio=piece, hold_back=hold_back)

    def _is_list_full(self) -> bool:
        if not self._block_sizes:
            return False
        return sum(self._count_blocks(self.waiting)) >= self._block_sizes[-1] * self._num_lists

    def _step_stream(self, state: RequestState) -> np.ndarray:
        """Gives a stream its new codes; returns the samples that are due, float32 [samples]."""
        record = self._streams[state]
        codes = state.all_codes()
        new_codes = codes[record.num_pushed :]
        if record.is_complete or not (new_codes.size or record.is_last):
            return np.zeros(0, np.float32)
        # a push that ends a stream gives all of its samples
        record.is_complete = record.is_last
        if not codes.size:  # the Talker ended at once
            return np.zeros(0, np.float32)
        if record.stream is None:
            record.stream = self._make_stream(state)
        record.num_pushed = len(codes)
        stopwatch = Stopwatch(self._engines.clock)
        (piece,) = record.stream.push([new_codes], [record.is_last])
        assert self._engine is not None
        if record.num_samples and len(piece):
            self._engine.pace.add_piece(stopwatch.lap(), record.stream.chunk_blocks[1])
        state.audio.append(piece)
        return piece

    def _make_stream(self, state: RequestState) -> Token2WavStream:
        sizes = self._engines.chunk_sizes
        speech = state.request.speech
        assert self._engine is not None and speech is not None
        return self._engine.stream(
            [speech.voice],
            [speech.noise_seed],
            first_chunk_codes=sizes.first_chunk_codes,
            chunk_codes=sizes.chunk_codes,
            first_look_ahead=sizes.first_look_ahead,
        )

    def _seconds_ahead(self, state: RequestState) -> float:
        """Seconds of sound that the listener has not heard yet."""
        record = self._streams[state]
        # nobody hears it yet, so it cannot run dry: it comes behind those that soon will
        if not record.num_samples:
            return _NEW_STREAM_SECONDS
        return record.start + record.num_samples / SAMPLE_RATE - self._engines.clock()

    def _synthesize(self, states: list[RequestState]) -> StageOutput:
        engine = self._engine
        assert engine is not None
        if not states:
            return StageOutput()
        stopwatch = Stopwatch(self._engines.clock)
        try:
            audio = self._synthesize_list(engine, states)
        except Exception as error:
            if len(states) == 1:
                return StageOutput(failed=[(states[0], error)])
            # which of them it was shows when each is alone
            output = StageOutput()
            for state in states:
                output.extend(self._synthesize([state]))
            return output
        for state, samples in zip(states, audio, strict=True):
            state.audio.append(samples)
        num_blocks = self._round_list(states)
        engine.pace.add_list(stopwatch.lap(), num_blocks)
        num_blocks *= self._num_lists
        num_codes = sum(state.num_codes for state in states)
        self._utilization.vocoder.add(num_codes, num_blocks * engine.codes_per_block)
        return StageOutput(finished=states)

    def _synthesize_list(self, engine: Token2WavEngine, states: list[RequestState]) -> list[np.ndarray]:
        """The sound of each of some whole replies, from one call."""
        codes = []
        voices = []
        seeds = []
        for state in states:
            speech = state.request.speech
            assert speech is not None
            codes.append(state.all_codes())
            voices.append(speech.voice)
            seeds.append(speech.noise_seed)
        return engine.synthesize(codes, voices, [None] * len(states), seeds, self._block_sizes)

    def _take_list(self) -> list[RequestState]:
        """Takes the first reply that waits, and those behind it that fit into the largest list with it.

        While somebody listens, only replies whose list is done before the sound of any stream runs out; but the first
        one, alone, when it has waited for too long.
        """
        assert self._engine is not None
        has_listeners = self._has_listeners()
        first, since = next(iter(self._waiting.items()))
        if has_listeners and self._engines.clock() - since > _MAX_WAIT_SECONDS:
            self.remove(first)
            return [first]
        taken: list[RequestState] = []
        seconds = self._seconds_to_spare()
        per_block = self._engine.pace.seconds_per_block
        for state in self._waiting:
            num_blocks = self._round_list([*taken, state])
            fits = not self._block_sizes or num_blocks <= self._block_sizes[-1]
            fits = fits and _count_voices([*taken, state]) <= MIN_VOICES
            if has_listeners:
                fits = per_block is not None and num_blocks * per_block <= seconds and (fits or not taken)
            elif not taken:
                # the first one is taken whatever its size; a short one may fit although one before it did not
                fits = True
            if fits:
                taken.append(state)
        taken = self._trim_padding(taken)
        for state in taken:
            self.remove(state)
        return taken

    def _trim_padding(self, states: list[RequestState]) -> list[RequestState]:
        """As many of the first replies as leave at most ``MAX_PADDING`` of their list empty; all, if no number does."""
        for count in range(len(states), 0, -1):
            first = states[:count]
            num_blocks = self._round_list(first) * self._num_lists
            if num_blocks - sum(self._count_blocks(first)) <= MAX_PADDING * num_blocks:
                return first
        return states

    def _has_listeners(self) -> bool:
        """Whether the sound of some live request is not complete."""
        return any(not record.is_complete for record in self._streams.values())

    def _seconds_to_spare(self) -> float:
        """Until the sound of the first stream runs out; 0 while a listener waits for the first sound."""
        seconds = math.inf
        for state, record in self._streams.items():
            if not record.is_complete:
                seconds = min(seconds, self._seconds_ahead(state) if record.num_samples else 0.0)
        return seconds

    def _round_list(self, states: list[RequestState]) -> int:
        """Blocks of the longest list that these replies are dealt to, rounded as it is solved."""
        return round_num_blocks(longest_list(self._count_blocks(states), self._num_lists), self._block_sizes)

    @property
    def _num_lists(self) -> int:
        assert self._engine is not None
        return self._engine.num_lists

    def _count_blocks(self, states: list[RequestState]) -> list[int]:
        assert self._engine is not None
        return [self._engine.count_blocks(state.num_codes) for state in states]


def _count_voices(states: list[RequestState]) -> int:
    voices = set()
    for state in states:
        if state.request.speech is not None:
            voices.add(state.request.speech.voice)
    return len(voices)
