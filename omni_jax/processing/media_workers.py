"""Processes that decode media, so that a file which hangs, or takes all memory, or kills its decoder costs one request.

They turn messages into prompts: decoding, resampling, features, tokens. The model works on while they do. Or they read
the media of messages alone, for a processor that ``isolate`` has made.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import weakref
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from pebble import ProcessExpired, ProcessPool

from omni_jax.errors import InputError
from omni_jax.processing.chat import MediaPart, Message
from omni_jax.processing.layout import Item, Prompt, TokenBudget
from omni_jax.processing.processor import Processor
from omni_jax.processing.processor_config import ProcessorConfig

T = TypeVar("T")

_GIB = 1 << 30
_processor: Processor | None = None  # of this process, where it is a worker


@dataclass(frozen=True)
class MediaLimits:
    """What the media of one request may cost, or one item of media where they are read one by one.

    Attributes:
      seconds: to decode and process them.
      gigabytes: of memory (GiB), beyond what a worker has before it begins.
    """

    seconds: float = 120.0
    gigabytes: float = 8.0


class PreparationError(Exception):
    """A request's messages or media made some library fail in a way that it does not announce."""


class MediaWorkers:
    """A pool of such processes; a context manager that ends them."""

    def __init__(self, processor: Processor, count: int, limits: MediaLimits):
        """Makes the pool; the processes start with the first request.

        Args:
          processor: that each of them has a copy of.
          count: of the processes.
          limits: of each request's media.
        """
        self.limits = limits
        self._pool = ProcessPool(
            max_workers=count,
            initializer=_start_worker,
            initargs=(processor, limits.gigabytes),
            context=multiprocessing.get_context("spawn"),  # forking a process with jax's threads may deadlock
        )
        # for those who do not close it: with the last who uses it, or with the program, the processes end
        self._stop = weakref.finalize(self, _stop_pool, self._pool)

    def submit(self, messages: tuple[Message, ...], assume_fps: float | None, max_length: int) -> Future[Prompt]:
        """Sends a request to a worker; ``result`` tells what has become of it."""
        return self._pool.schedule(_prepare, args=(messages, assume_fps, max_length), timeout=self.limits.seconds)

    def read_media(
        self, settings: ProcessorConfig, part: MediaPart, assume_fps: float | None, budget: TokenBudget
    ) -> Item:
        """Has a worker read one item of media, and waits for it; see ``Processor.read_media``.

        Raises:
          InputError: if it cannot be read, goes over a limit, or ends the worker.
        """
        args = (settings, part, assume_fps, budget)
        try:
            return self.result(self._pool.schedule(_read_media, args=args, timeout=self.limits.seconds))
        except PreparationError as e:
            raise InputError(str(e)) from e

    def result(self, future: Future[Any]) -> Any:
        """The prompt of a request, or the item of media, that is done.

        Raises:
          InputError: if it cannot be served, or went over a limit, or its worker died.
          PreparationError: for whatever else came up.
        """
        try:
            return future.result()
        except (InputError, PreparationError):
            raise
        # pebble ends the process of what takes too long, and starts another
        except TimeoutError as e:
            raise InputError(f"its media took over {self.limits.seconds:g} s to decode, which is the limit") from e
        except MemoryError as e:
            raise InputError(f"its media need over {self.limits.gigabytes:g} GiB to decode, which is the limit") from e
        except ProcessExpired as e:
            raise InputError(f"the process that decoded its media died (exit code {e.exitcode})") from e
        except Exception as e:
            raise PreparationError(f"its messages or media cannot be read: {type(e).__name__}: {e}") from e

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._stop()

    def __enter__(self) -> MediaWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def isolate(processor: Processor, count: int = 1, limits: MediaLimits | None = None) -> Processor:
    """The same processor, whose media are read in processes of their own.

    They start with the first item of media, and end with the processor.

    Args:
      processor: as ``Processor.load`` gives it.
      count: of the processes.
      limits: of each item of media.
    """
    return processor.with_media_reader(MediaWorkers(processor, count, limits or MediaLimits()).read_media)


def _stop_pool(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _start_worker(processor: Processor, gigabytes: float) -> None:
    global _processor
    jax.config.update("jax_platforms", "cpu")  # the accelerator is the model's
    _processor = processor
    # the first number of Linux's account: pages of address space, which is what RLIMIT_AS limits
    with open("/proc/self/statm", encoding="ascii") as file:
        in_use = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    # what is loaded counts too, so that the same limit holds for small and large tokenizers
    limit = in_use + round(gigabytes * _GIB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _prepare(messages: tuple[Message, ...], assume_fps: float | None, max_length: int) -> Prompt:
    """What a worker does with a request; only errors that can be sent to another process come out of it."""
    assert _processor is not None
    return _call(_processor, messages, assume_fps=assume_fps, max_length=max_length)


def _read_media(settings: ProcessorConfig, part: MediaPart, assume_fps: float | None, budget: TokenBudget) -> Item:
    """What a worker does with an item of media."""
    assert _processor is not None
    # the caller's may be another one by now (``with_pixels``)
    _processor.settings = settings
    return _call(_processor.read_media, part, assume_fps, budget)


def _call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    # errors are made anew from their words: whatever else they hold may not be picklable
    try:
        return function(*args, **kwargs)
    except InputError as e:
        raise InputError(str(e)) from None
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of a library in Rust is no Exception, and some errors cannot be pickled
        raise PreparationError(f"its messages or media cannot be read: {type(e).__name__}: {e}") from None
