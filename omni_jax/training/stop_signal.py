"""How a run is told to stop: SIGTERM, by which a machine that is taken away says so, or Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Notices that the run is to stop; all processes stop after the same step. A second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self._received = threading.Event()
        self._previous: dict[int, Any] = {}  # handlers, by signal

    def __enter__(self) -> StopSignal:
        # only the main thread may set a handler
        if threading.current_thread() is not threading.main_thread():
            return self
        self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        # of several processes, jax notices SIGTERM (its preemption service)
        if jax.process_count() == 1:
            # it only takes note: the step that goes on is finished and saved
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: self._received.set())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # whoever presses it again does not want to wait for a checkpoint
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
        if jax.process_count() == 1:
            self._received.set()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def stops_after(self, step: int) -> bool:
        """Whether the run is to stop after a step; the same on all processes."""
        if jax.process_count() == 1:
            return self._received.is_set()
        # the signal reaches processes at different times; this agrees on a step that none has passed
        return multihost_utils.reached_preemption_sync_point(step)
