"""Processes that decode media, so that a file which hangs, or takes all memory, or kills its decoder costs one request.

They turn messages into prompts: decoding, resampling, features, tokens. The model works on while they do.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from pathlib import Path

import jax
from pebble import ProcessExpired, ProcessPool

from omni_jax.errors import InputError
from omni_jax.processing.chat import Message
from omni_jax.processing.fetch import RemoteAccess
from omni_jax.processing.layout import Prompt
from omni_jax.processing.processor import Processor

_GIB = 1 << 30
_processor: Processor | None = None  # of this process, where it is a worker


@dataclass(frozen=True)
class MediaLimits:
    """What the media of one request may cost.

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

    def __init__(self, folder: Path, count: int, limits: MediaLimits, access: RemoteAccess):
        """Makes the pool; the processes start with the first request.

        Args:
          folder: of the model, whose processor they load.
          count: of the processes.
          limits: of each request's media.
          access: from which hosts and buckets media may be fetched.
        """
        self.limits = limits
        self._pool = ProcessPool(
            max_workers=count,
            initializer=_start_worker,
            initargs=(folder, access, limits.gigabytes),
            context=multiprocessing.get_context("spawn"),  # forking a process with jax's threads may deadlock
        )

    def submit(self, messages: tuple[Message, ...], assume_fps: float | None, max_length: int) -> Future[Prompt]:
        """Sends a request to a worker; ``result`` tells what has become of it."""
        return self._pool.schedule(_prepare, args=(messages, assume_fps, max_length), timeout=self.limits.seconds)

    def result(self, future: Future[Prompt]) -> Prompt:
        """The prompt of a request that is done.

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
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> MediaWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start_worker(folder: Path, access: RemoteAccess, gigabytes: float) -> None:
    global _processor
    jax.config.update("jax_platforms", "cpu")  # the accelerator is the model's
    _processor = Processor.load(folder, access=access)
    # the first number of Linux's account: pages of address space, which is what RLIMIT_AS limits
    with open("/proc/self/statm", encoding="ascii") as file:
        in_use = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    # what is loaded counts too, so that the same limit holds for small and large tokenizers
    limit = in_use + round(gigabytes * _GIB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _prepare(messages: tuple[Message, ...], assume_fps: float | None, max_length: int) -> Prompt:
    """What a worker does with a request; only errors that can be sent to another process come out of it."""
    assert _processor is not None
    # errors are made anew from their words: whatever else they hold may not be picklable
    try:
        return _processor(messages, assume_fps=assume_fps, max_length=max_length)
    except InputError as e:
        raise InputError(str(e)) from None
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of a library in Rust is no Exception, and some errors cannot be pickled
        raise PreparationError(f"its messages or media cannot be read: {type(e).__name__}: {e}") from None
