"""The scheduler in a thread of its own, for callers in an event loop.

All of the device's work is done in that thread, so that a slow client, or an event loop that is busy, makes nobody's
sound wait. What comes of a request is kept for its reader, however slowly that reads: a slot is free as soon as the
model is done with it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self, TypeVar

from omni_jax.engine.outputs import Event, Reply
from omni_jax.engine.prefill import Prefix
from omni_jax.engine.prompt_key import PromptKey
from omni_jax.engine.request import RequestState, SchedulerConfig
from omni_jax.generation.model import OmniModel
from omni_jax.generation.options import Options
from omni_jax.models.token2wav import SAMPLE_RATE
from omni_jax.processing.layout import Prompt
from omni_jax.processing.prefill_plan import PromptPiece
from omni_jax.processing.voice_clip import VoiceClip

T = TypeVar("T")

_log = logging.getLogger(__name__)


class ClosedError(RuntimeError):
    """The engine has been closed."""


@dataclass
class Timeline:
    """When pieces of a reply were there, in seconds by the engines' clock.

    Attributes:
      submitted: when the request was given to the scheduler.
      received: when it came, before its media were decoded; None if nobody has noted it.
      first_text: when its first text was there; None before that.
      first_audio: likewise of its sound.
      audio_seconds: of sound so far.
      underruns: pieces of sound that came after a player that began with the first had run dry.
      finished: when the reply was complete.
    """

    submitted: float
    received: float | None = None
    first_text: float | None = None
    first_audio: float | None = None
    audio_seconds: float = 0.0
    underruns: int = 0
    finished: float | None = None

    def describe(self) -> dict[str, float]:
        """How long it took to come to each point, in seconds since the request came."""
        begin = self.submitted if self.received is None else self.received
        points = {
            "prepared": self.submitted,
            "first_text": self.first_text,
            "first_audio": self.first_audio,
            "finished": self.finished,
        }
        return {name: round(time - begin, 4) for name, time in points.items() if time is not None}

    def add(self, event: Event, now: float) -> None:
        """Takes note of a piece."""
        if event.text and self.first_text is None:
            self.first_text = now
        if event.audio is not None and len(event.audio):
            if self.first_audio is None:
                self.first_audio = now
            elif now > self.first_audio + self.audio_seconds:
                self.underruns += 1
            self.audio_seconds += len(event.audio) / SAMPLE_RATE
        if event.reply is not None:
            self.finished = now


@dataclass(eq=False)
class ReplyStream:
    """What comes of one request; to be iterated over once, in the event loop that asked.

    The last event has the whole reply. Whatever ended the request without one is raised in its place.

    Attributes:
      timeline: when its pieces were there.
    """

    timeline: Timeline
    _cancel: Callable[[ReplyStream], None]
    _loop: asyncio.AbstractEventLoop
    _events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    _ended: bool = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        item = await self._events.get()
        if isinstance(item, Exception):
            self._ended = True
            raise item
        self._ended = item.reply is not None
        return item

    async def reply(self) -> Reply:
        """The whole reply; pieces that come before it are passed over."""
        async for event in self:
            if event.reply is not None:
                return event.reply
        raise AssertionError("a stream ends with a reply or an error")

    def cancel(self) -> None:
        """Ends the request, if it has not ended; what it holds is freed after the step that runs."""
        if not self._ended:
            self._ended = True
            self._cancel(self)

    def _put(self, item: Event | Exception) -> None:
        """Adds a piece; called by the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody reads any more
            _log.debug("a reply has no reader any more")


class EngineThread:
    """Steps a scheduler as long as it has something to do; a context manager that ends the thread."""

    def __init__(
        self, model: OmniModel, config: SchedulerConfig, on_finish: Callable[[Timeline, Reply], None] | None = None
    ):
        """Starts the thread.

        Args:
          model: whose scheduler it is.
          config: of the scheduler.
          on_finish: is called in the thread with each reply that is complete.
        """
        self.model = model
        self._config = config
        self._on_finish = on_finish
        self._scheduler = model.scheduler(config)
        self._streams: dict[RequestState, ReplyStream] = {}
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests of which nothing has been prefilled yet."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return self._scheduler.num_running

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    async def submit(
        self,
        prompt: Prompt,
        options: Options,
        *,
        live: bool,
        clip: VoiceClip | None = None,
        key: PromptKey | None = None,
    ) -> ReplyStream:
        """Gives the scheduler a request.

        Args:
          prompt, options, live, clip, key: as of ``OmniModel.submit``.

        Raises:
          InputError: as there.
          ClosedError: if the engine has been closed.
        """

        def submit() -> RequestState:
            return self.model.submit(self._scheduler, prompt, options, live=live, clip=clip, key=key)

        return await self._start(submit)

    async def submit_prefilled(
        self,
        prefix: Prefix,
        pieces: Sequence[PromptPiece],
        prompt: Prompt,
        options: Options,
        *,
        clip: VoiceClip | None = None,
    ) -> ReplyStream:
        """Gives the scheduler a request of which a part has been prefilled.

        Args:
          prefix, pieces, prompt, options, clip: as of ``OmniModel.submit_prefilled``.

        Raises:
          InputError: as there.
          ClosedError: if the engine has been closed.
        """

        def submit() -> RequestState:
            return self.model.submit_prefilled(self._scheduler, prefix, pieces, prompt, options, clip=clip)

        return await self._start(submit)

    async def _start(self, submit: Callable[[], RequestState]) -> ReplyStream:
        stream = ReplyStream(Timeline(self.model.engines.clock()), self._request_cancel, asyncio.get_running_loop())

        def start() -> None:
            self._streams[submit()] = stream

        try:
            await asyncio.wrap_future(self.call(start))
        except asyncio.CancelledError:
            # it may have been given to the scheduler by now
            stream.cancel()
            raise
        return stream

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Has the thread call a function between two steps.

        Raises:
          ClosedError: if the engine has been closed.
        """
        if self._closed:
            raise ClosedError("the engine has been closed")
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(run)
        return future

    def close(self) -> None:
        """Ends the thread after the step that runs; requests that have not ended get a ``ClosedError``."""
        if not self._closed:
            self._closed = True
            self._calls.put(lambda: None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closed:
            self._run_calls()
            if self._scheduler.busy:
                self._step()
        self._fail_all(ClosedError("the server is shutting down"))
        # calls that came meanwhile would wait for ever
        while not self._calls.empty():
            self._calls.get()()

    def _run_calls(self) -> None:
        """Runs the calls that have come; waits for one where there is nothing else to do."""
        if not self._scheduler.busy:
            self._calls.get()()
        while not self._calls.empty():
            self._calls.get()()

    def _step(self) -> None:
        try:
            events = self._scheduler.step()
        except Exception as error:  # of the scheduler itself: it is not known any more where its requests stand
            _log.exception("the scheduler failed; its requests end, and it begins anew")
            self._fail_all(error)
            self._scheduler = self.model.scheduler(self._config)
            return
        now = self.model.engines.clock()
        for state, event in events:
            stream = self._streams.get(state)
            if stream is None:  # cancelled
                continue
            stream.timeline.add(event, now)
            if event.reply is None:
                stream._put(event)
                continue
            del self._streams[state]
            if state.error is not None:
                stream._put(state.error)
                continue
            if self._on_finish is not None:
                self._on_finish(stream.timeline, event.reply)
            stream._put(event)

    def _fail_all(self, error: Exception) -> None:
        for stream in self._streams.values():
            stream._put(error)
        self._streams.clear()

    def _request_cancel(self, stream: ReplyStream) -> None:
        def cancel() -> None:
            for state, other in list(self._streams.items()):
                if other is stream:
                    del self._streams[state]
                    self._scheduler.cancel(state)

        if not self._closed:
            self._calls.put(cancel)
