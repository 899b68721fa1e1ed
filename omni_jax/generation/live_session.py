"""A dialogue whose sound and pictures come while it goes on: all but the last seconds are prefilled as they come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from omni_jax.engine.outputs import Event
from omni_jax.engine.prefill import Prefix, Stopwatch
from omni_jax.engine.request import RequestState
from omni_jax.engine.scheduler import Scheduler
from omni_jax.errors import InputError
from omni_jax.processing.layout import Prompt
from omni_jax.processing.live import LivePrompt
from omni_jax.processing.prefill_plan import PromptPiece

MakeRequest: TypeAlias = Callable[[Sequence[PromptPiece], Prompt, Mapping[str, Any]], RequestState]


class LiveSession:
    """One message of a user's on its way to one answer; ``OmniModel.listen`` makes it.

    It holds the caches of this dialogue. They are freed when it is closed or dropped, or when the iterator that
    ``answer`` gave ends, is closed or is dropped. What cannot be taken is an InputError, and the dialogue goes on
    without it.
    """

    def __init__(self, prompt: LivePrompt, scheduler: Scheduler, prefix: Prefix, make_request: MakeRequest):
        """Prefills everything before the media.

        Args:
          prompt: nothing of it has been prefilled.
          scheduler: that will answer, and nothing else.
          prefix: that holds nothing.
          make_request: from the pieces that have not been prefilled, the whole prompt, and the options of ``answer``.
        """
        self._prompt = prompt
        self._make_request = make_request
        # both are None once the dialogue is answered or closed, so that its caches can be freed
        self._scheduler: Scheduler | None = scheduler
        self._prefix: Prefix | None = prefix
        self._prefill([prompt.head])

    def audio(self, samples: Float[np.ndarray, " n"], rate: int) -> None:
        """Takes more sound. Each full block of two seconds is prefilled at once; until then samples are only kept.

        Args:
          samples: float [n] in -1 to 1, one channel; any number, 10 to 100 ms at a time is usual.
          rate: samples a second, the same each time. Other rates than 16 kHz are resampled.

        Raises:
          InputError: if this is no sound, is too long, or the dialogue is over; it is not taken then.
        """
        scheduler = self._open_scheduler()
        # decoding and resampling count as preparation; encoders and prefill have times of their own
        stopwatch = Stopwatch(scheduler.clock)
        pieces = self._prompt.audio(samples, rate)
        scheduler.timings.prepare += stopwatch.lap()
        self._prefill(pieces)

    def video(self, picture: Any, seconds: float) -> None:
        """Takes a picture. Two seconds are prefilled when all their pictures, and their sound if there is any, came.

        The model looks twice a second (``fps`` of ``PixelSettings``): of each half second it takes the first picture,
        or the last one before it if none came. So a camera may send all that it takes, and a screen only what is new.

        Args:
          picture: a Pillow image, or uint8 [height, width, 3]; all of one size.
          seconds: when it was taken, from the beginning of the dialogue's sound or pictures; not before the last one.

        Raises:
          InputError: if this is no picture, of another size, out of order or too late, or the dialogue is over; it is
            not taken then.
        """
        scheduler = self._open_scheduler()
        stopwatch = Stopwatch(scheduler.clock)
        pieces = self._prompt.video(picture, seconds)
        scheduler.timings.prepare += stopwatch.lap()
        self._prefill(pieces)

    def answer(self, text: str = "", **options: Any) -> Generator[Event, None, None]:
        """Ends the message and answers it piece by piece, as ``OmniModel.stream`` does.

        Only what came after the last two full seconds remains to be prefilled. Nothing is computed before the first
        event is asked for; closing the iterator ends the reply and frees everything.

        Args:
          text: that follows in the same message.
          **options: see ``Options``; they go before those given to ``listen``. ``modalities``, ``assume_fps`` and
            ``adapter`` were settled there.

        Raises:
          InputError: if no sound or picture came, the text does not fit, or an option is wrong; the dialogue can go
            on.
        """
        scheduler = self._open_scheduler()
        stopwatch = Stopwatch(scheduler.clock)
        whole = self._prompt.whole_prompt(text)
        # for its errors alone: a wrong option is found before the prompt is ended, and the dialogue can go on
        self._make_request([], whole, options)
        state = self._make_request(self._prompt.end(text), whole, options)
        scheduler.submit(state, self._prefix)
        scheduler.timings.prepare += stopwatch.lap()
        # from here on the scheduler alone holds the prefix, and frees it with the reply
        self.close()
        return scheduler.run_alone(state)

    def close(self) -> None:
        """Ends the dialogue without an answer and frees its caches."""
        self._scheduler = None
        self._prefix = None

    def _open_scheduler(self) -> Scheduler:
        if self._scheduler is None:
            raise InputError("this dialogue was answered or closed; begin another with listen")
        return self._scheduler

    def _prefill(self, pieces: Sequence[PromptPiece]) -> None:
        assert self._prefix is not None
        self._prefix.add(pieces)
        # at once: nobody is answered yet, so there is nothing that it could delay
        self._prefix.run()
