"""Processes that decode media, so that a file which hangs, or takes all memory, or kills its decoder costs one request.

They turn messages into prompts: decoding, resampling, features, tokens. The model works on while they do. Or they read
the media of messages alone, for a processor that ``isolate`` has made; or they look whether a file is media at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from PIL import Image

from omni_jax.errors import InputError
from omni_jax.processing.chat import MediaPart, Message
from omni_jax.processing.images import find_encoded, read_image
from omni_jax.processing.layout import Item, Prompt, TokenBudget
from omni_jax.processing.media import check_media
from omni_jax.processing.processor import Processor
from omni_jax.processing.processor_config import ProcessorConfig
from omni_jax.processing.sources import Source
from omni_jax.processing.voice_clip import VoiceClip
from omni_jax.processing.worker_pool import MediaLimits, PreparationError, WorkerPool, call_guarded

T = TypeVar("T")

_processor: Processor | None = None  # of this process, where it is a worker


class MediaWorkers:
    """A pool of such processes; a context manager that ends them."""

    def __init__(self, processor: Processor | None, count: int, limits: MediaLimits):
        """Makes the pool; the processes start with the first call.

        Args:
          processor: that each of them has a copy of; None: only ``check_media`` is called.
          count: of the processes.
          limits: of each request's media.
        """
        self._pool = WorkerPool(count, limits, _set_processor, processor)

    def submit(self, messages: tuple[Message, ...], assume_fps: float | None, max_length: int) -> Future[Prompt]:
        """Sends a request to a worker; ``result`` tells what has become of it.

        Raises:
          WorkerStartError: if no worker could be started.
        """
        return self._pool.schedule(_prepare, messages, assume_fps, max_length)

    def submit_clip(self, source: Any, rate: int | None) -> Future[VoiceClip]:
        """Sends the clip of a voice to a worker; see ``Processor.read_clip``.

        Raises:
          WorkerStartError: if no worker could be started.
        """
        return self._pool.schedule(_read_clip, source, rate)

    def submit_picture(self, source: Any) -> Future[Image.Image]:
        """Sends a picture to a worker; see ``images.read_image``.

        Raises:
          WorkerStartError: if no worker could be started.
        """
        return self._pool.schedule(_read_picture, find_encoded(source))

    def result(self, future: Future[T]) -> T:
        """The prompt of a request, or the clip of its voice, that is done.

        Raises:
          InputError: if it cannot be served, or went over a limit, or its worker died.
          WorkerStartError: if no worker could be started.
          PreparationError: for whatever else came up.
        """
        return future.result()

    def read_media(
        self, settings: ProcessorConfig, part: MediaPart, assume_fps: float | None, budget: TokenBudget
    ) -> Item:
        """Has a worker read one item of media, and waits for it; see ``Processor.read_media``.

        Raises:
          InputError: if it cannot be read, goes over a limit, or ends the worker; or if no worker could be started.
        """
        # pickled, a Pillow picture would be decoded here
        part = dataclasses.replace(part, source=find_encoded(part.source))
        return self._call(_read_media, settings, part, assume_fps, budget)

    def read_picture(self, source: Any) -> Image.Image:
        """Has a worker read a picture, and waits for it; see ``images.read_image``, also for what is raised."""
        return self._call(_read_picture, find_encoded(source))

    def read_clip(self, source: Any, rate: int | None) -> VoiceClip:
        """Has a worker read the clip of a voice, and waits for it; see ``Processor.read_clip``."""
        return self._call(_read_clip, source, rate)

    def check_media(self, source: Source) -> None:
        """Has a worker look into a file; see ``media.check_media``, also for what is raised."""
        self._call(_check_media, source)

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, function: Callable[..., T], *args: Any) -> T:
        try:
            return self._pool.schedule(function, *args).result()
        except PreparationError as e:
            raise InputError(str(e)) from e


def isolate(processor: Processor, count: int = 1, limits: MediaLimits | None = None) -> Processor:
    """The same processor, whose media are read in processes of their own.

    They start with the first item of media, and end with the processor.

    Args:
      processor: as ``Processor.load`` gives it.
      count: of the processes.
      limits: of each item of media.
    """
    return processor.with_media_reader(MediaWorkers(processor, count, limits or MediaLimits()))


def _set_processor(processor: Processor | None) -> None:
    global _processor
    _processor = processor


# what workers do; a function of this module is all that is sent to them of it


def _prepare(messages: tuple[Message, ...], assume_fps: float | None, max_length: int) -> Prompt:
    assert _processor is not None
    return call_guarded(_processor, messages, assume_fps=assume_fps, max_length=max_length)


def _read_media(settings: ProcessorConfig, part: MediaPart, assume_fps: float | None, budget: TokenBudget) -> Item:
    assert _processor is not None
    # the caller's may be another one by now (``with_pixels``)
    _processor.settings = settings
    return call_guarded(_processor.read_media, part, assume_fps, budget)


def _read_picture(source: Any) -> Image.Image:
    return call_guarded(read_image, source)


def _read_clip(source: Any, rate: int | None) -> VoiceClip:
    assert _processor is not None
    return call_guarded(_processor.read_clip, source, rate)


def _check_media(source: Source) -> None:
    call_guarded(check_media, source)
