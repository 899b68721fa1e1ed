"""Processes with limits of time and memory, for work on files of strangers."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from pebble import ProcessExpired, ProcessPool

from omni_jax.errors import InputError

T = TypeVar("T")

MAX_START_SECONDS = 120.0  # until a process is ready for its first call

_GIB = 1 << 30


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


class WorkerStartError(InputError):
    """The processes that decode cannot be started. That is no fault of a request: it ends the run."""


class WorkerPool:
    """A pool of processes; a context manager that ends them.

    A function and its arguments are sent to them by name and by value. What goes over a limit, or ends its process,
    costs that call alone.
    """

    def __init__(self, count: int, limits: MediaLimits, set_up: Callable[..., None] | None = None, *args: Any) -> None:
        """Makes the pool; the processes start with the first call.

        Args:
          count: of the processes.
          limits: of each call.
          set_up: is called with ``args`` in each process before anything else.
        """
        self._limits = limits
        self._count = count
        # as bytes, so that what they hold is unpickled within the limits of a start
        self._start_args = (pickle.dumps((set_up, args)), limits.gigabytes, MAX_START_SECONDS)
        self._lock = threading.Lock()
        self._open_pool()

    def schedule(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Has a process call a function.

        Returns:
          What the function gives. Instead of that it may raise

          * InputError: if the function raises it, or goes over a limit, or its process dies.
          * WorkerStartError: if no process could be started.
          * PreparationError: for whatever else comes up.

        Raises:
          InputError: if an argument cannot be pickled.
          WorkerStartError: if it is known already that no process can be started.
          RuntimeError: if the pool is closed.
        """
        # not by pebble, whose thread would end with what that raises; and unpickled within the limits of the call
        try:
            call = pickle.dumps((function, args))
        except Exception as e:
            raise InputError(f"it cannot be sent to another process: {type(e).__name__}: {e}") from e
        with self._lock:
            if not self._stop.alive:
                raise RuntimeError("the pool is closed")
            # pebble gives a pool up when a process ends that has nothing to do
            if not self._pool.active:
                if not self._started.is_set():
                    raise _start_error()
                self._stop()
                self._open_pool()
            result = self._pool.schedule(_call, args=(call,), timeout=self._limits.seconds)
            started = self._started
        future: Future[T] = Future()
        # not a method: the pool is to go when nobody else has it, whatever waits in it
        result.add_done_callback(functools.partial(_settle, future, self._limits, started))
        return future

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_pool(self) -> None:
        self._pool = ProcessPool(
            max_workers=self._count,
            initializer=_start_worker,
            initargs=self._start_args,
            context=multiprocessing.get_context("spawn"),  # forking a process with jax's threads may deadlock
        )
        self._started = threading.Event()  # set once a process of this pool has done anything
        # for those who do not close it: with the last who uses it, or with the program, the processes end
        self._stop = weakref.finalize(self, _stop_pool, self._pool)


def _settle(future: Future[T], limits: MediaLimits, started: threading.Event, result: Future[T]) -> None:
    """Gives ``future`` what has become of a call in a process, in errors of ours."""
    error = result.exception()
    if not isinstance(error, BrokenProcessPool):
        started.set()
    if error is None:
        future.set_result(result.result())
    else:
        future.set_exception(_translate(error, limits, started.is_set()))


def _translate(error: BaseException, limits: MediaLimits, started: bool) -> Exception:
    if isinstance(error, InputError | PreparationError):
        return error
    # pebble ends the process of what takes too long, and starts another
    if isinstance(error, TimeoutError):
        return InputError(f"its media took over {limits.seconds:g} s to decode, which is the limit")
    if isinstance(error, MemoryError):
        return InputError(f"its media need over {limits.gigabytes:g} GiB to decode, which is the limit")
    if isinstance(error, ProcessExpired):
        return InputError(f"the process that decoded its media died (exit code {error.exitcode})")
    if isinstance(error, BrokenProcessPool):
        if not started:
            return _start_error()
        return PreparationError("the process that was to decode its media died before it began; ask again")
    return PreparationError(f"its messages or media cannot be read: {type(error).__name__}: {error}")


def _start_error() -> WorkerStartError:
    return WorkerStartError(
        f"the processes that decode media cannot be started: they die before they are ready, or take over "
        f"{MAX_START_SECONDS:g} s; what they print says why"
    )


def _stop_pool(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _start_worker(set_up: bytes, gigabytes: float, seconds: float) -> None:
    # the system ends the process if it is not ready by then, whatever code it is in
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory_limit(gigabytes), hard_limit))
    os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerator is the model's, whatever a worker comes to import
    function, args = pickle.loads(set_up)
    if function is not None:
        function(*args)
    # what is loaded by now comes on top, so that the same limit holds for small and large tokenizers
    limit = _memory_limit(gigabytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.setitimer(signal.ITIMER_REAL, 0)


def _call(call: bytes) -> Any:
    function, args = pickle.loads(call)
    return function(*args)


def _memory_limit(gigabytes: float) -> int:
    """Bytes of address space: what is in use, and so much more."""
    # the first number of Linux's account: pages of address space, which is what RLIMIT_AS limits
    with open("/proc/self/statm", encoding="ascii") as file:
        in_use = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return in_use + round(gigabytes * _GIB)


def call_guarded(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls a function in a worker; only errors that can be sent to another process come out of it.

    Raises:
      InputError: if the function does.
      PreparationError: for whatever else it raises, but for MemoryError.
    """
    # errors are made anew from their words: whatever else they hold may not be picklable
    try:
        return function(*args, **kwargs)
    except InputError as e:
        raise InputError(str(e)) from None
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of a library in Rust is no Exception, and some errors cannot be pickled
        raise PreparationError(f"its messages or media cannot be read: {type(e).__name__}: {e}") from None
