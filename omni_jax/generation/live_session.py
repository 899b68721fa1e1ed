"""A dialogue that the model hears and sees while it goes on: all but the last two seconds are read before they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from omni_jax.engine.outputs import Event
from omni_jax.engine.prefill import Clock, Reading
from omni_jax.engine.request import Request
from omni_jax.engine.scheduler import Scheduler
from omni_jax.errors import InputError
from omni_jax.processing.layout import Prompt
from omni_jax.processing.live import LivePrompt, Piece


class LiveSession:
    """One message of a user's on its way to one answer; ``OmniModel.listen`` makes it.

    It holds the caches of this dialogue. They are freed when it is closed or dropped, or when the iterator that
    ``answer`` gave ends, is closed or is dropped. What cannot be taken is an InputError, and the dialogue goes on
    without it.
    """

    def __init__(
        self,
        prompt: LivePrompt,
        scheduler: Scheduler,
        reading: Reading,
        ask: Callable[[Prompt, Mapping[str, Any]], Request],
    ):
        """Reads everything before the media.

        Args:
          prompt: nothing of it has been read.
          scheduler: that will answer, and nothing else.
          reading: nothing so far.
          ask: from the whole prompt and the options of ``answer`` to the request.
        """
        self._prompt, self._ask = prompt, ask
        self._scheduler: Scheduler | None = scheduler
        self._reading: Reading | None = reading
        self._read([prompt.head])

    def audio(self, samples: np.ndarray, rate: int) -> None:
        """Hears more. Each full block of two seconds is read at once; until then this only keeps the samples.

        Args:
          samples: float [n] in -1 to 1, one channel; any number, 10 to 100 ms at a time is usual.
          rate: samples a second, the same each time. Other rates than 16 kHz are resampled.

        Raises:
          InputError: if this is no sound, is too long, or the dialogue is over; it is not taken then.
        """
        self._parts()
        clock = Clock()
        pieces = self._prompt.audio(samples, rate)
        self._prepared(clock)
        self._read(pieces)

    def video(self, picture: Any, seconds: float) -> None:
        """Sees a picture. A window of two seconds is read when all its pictures, and its sound if there is any, came.

        The model looks twice a second (``fps`` of ``PixelSettings``): of each half second it takes the first picture,
        or the last one before it if none came. So a camera may send all that it takes, and a screen only what is new.

        Args:
          picture: a Pillow image, or uint8 [height, width, 3]; all of one size.
          seconds: when it was taken, from the beginning of the dialogue's sound or pictures; not before the last one.

        Raises:
          InputError: if this is no picture, of another size, out of order or too late, or the dialogue is over; it is
            not taken then.
        """
        self._parts()
        clock = Clock()
        pieces = self._prompt.video(picture, seconds)
        self._prepared(clock)
        self._read(pieces)

    def answer(self, text: str = "", **options: Any) -> Iterator[Event]:
        """Ends the message and answers it piece by piece, as ``OmniModel.stream`` does.

        Only what came after the last full window is left to be read. Nothing is read before the first event is asked
        for; closing the iterator ends the reply and frees everything.

        Args:
          text: that follows in the same message.
          **options: see ``Options``; they go before those given to ``listen``. ``modalities`` and ``assume_fps`` were
            settled there.

        Raises:
          InputError: if nothing was heard or seen, the text does not fit, or an option is wrong; the dialogue can go
            on.
        """
        (scheduler, reading), clock = self._parts(), Clock()
        ask = self._ask(self._prompt.whole(text), options)
        rest = self._prompt.end(text)
        self._prepared(clock)
        self.close()
        return _answer(scheduler, reading, rest, ask)

    def close(self) -> None:
        """Ends the dialogue without an answer and frees its caches."""
        self._scheduler = self._reading = None

    def _parts(self) -> tuple[Scheduler, Reading]:
        if self._scheduler is None or self._reading is None:
            raise InputError("this dialogue was answered or closed; begin another with listen")
        return self._scheduler, self._reading

    def _prepared(self, clock: Clock) -> None:
        self._parts()[0].timings.prepare += clock.lap()

    def _read(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            for _ in self._parts()[1].read(piece.prompt, piece.spans):
                pass


def _answer(scheduler: Scheduler, reading: Reading, rest: list[Piece], ask: Request) -> Iterator[Event]:
    task = scheduler.submit(ask, [(piece.prompt, piece.spans) for piece in rest], reading)
    del reading  # the task's now, and freed with it
    for _, event in scheduler.run():
        if task.error is not None:
            raise task.error
        yield event
