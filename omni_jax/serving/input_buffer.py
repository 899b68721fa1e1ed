"""What a realtime session has heard and seen of the user, on its way to an item, and into the model meanwhile."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import logging
from typing import Any

import numpy as np
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.generation.options import Options
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.voice_clip import VoiceClip
from omni_jax.serving.conversation import Item, Part, make_id
from omni_jax.serving.engine_thread import ReplyStream
from omni_jax.serving.live_turn import LiveTurn
from omni_jax.serving.realtime_config import SessionConfig
from omni_jax.serving.realtime_protocol import Session
from omni_jax.serving.service import Service

_log = logging.getLogger(__name__)

_IDLE_SECONDS = 65.0  # of sound that are kept while nobody speaks; the padding before a speech is at most 60
_CAMERA_SECONDS = 5.0  # a picture that came so long before a speech, or later, shows what is spoken of
_MAX_PICTURES = 600  # of a turn
_MAX_PICTURE_BYTES = 256 << 20  # of all of them, decoded


class PrefillTask:
    """Prefills one turn while it comes. Whatever fails, the turn can still be answered from its item."""

    def __init__(self, service: Service, messages: list[dict[str, Any]], options: Options, rate: int, *, video: bool):
        """Begins with what came before."""
        self.options = options
        self._rate = rate
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._turn: LiveTurn | None = None
        self._error: Exception | None = None
        self._task = asyncio.create_task(self._run(service, messages, video))

    def push(self, item: Any) -> None:
        """Takes samples, or a picture with its time."""
        self._queue.put_nowait(item)

    async def answer(self, options: Options, clip: VoiceClip | None) -> ReplyStream | None:
        """The answer; None where something could not be prefilled."""
        self._queue.put_nowait(None)
        await self._task
        if self._error is not None or self._turn is None:
            return None
        return await self._turn.answer(options, clip)

    def cancel(self) -> None:
        """Drops what was prefilled."""
        self._task.cancel()
        self._turn = None

    async def _run(self, service: Service, messages: list[dict[str, Any]], video: bool) -> None:
        try:
            make_prompt = functools.partial(service.make_live_prompt, messages, audio=True, video=video)
            self._turn = await LiveTurn.begin(service.engine, make_prompt, self.options)
            while (item := await self._queue.get()) is not None:
                if isinstance(item, tuple):
                    await self._turn.push_picture(*item)
                else:
                    await self._turn.push_audio(item, self._rate)
        except Exception as error:
            if not isinstance(error, InputError):
                _log.exception("a turn could not be prefilled while it came")
            self._error = error
            self._turn = None


class InputBuffer:
    """Sound and pictures since the last item.

    Attributes:
      item_id: of the item that they become.
    """

    def __init__(self, session: Session, rate: int):
        """``session`` has the conversation so far, and how it is answered."""
        self.item_id = make_id("item")
        self._session = session
        self._rate = rate
        self._samples: list[np.ndarray] = []
        self._first = 0  # how many samples came before those that are kept
        self._pictures: list[tuple[Image.Image, int]] = []  # and how many samples had come by then
        self._begin: int | None = None  # of the turn, in samples since the session began
        self._prefill: PrefillTask | None = None
        self._complete: PrefillTask | None = None  # of the turn that was committed last

    @property
    def num_samples(self) -> int:
        """That are kept."""
        return sum(map(len, self._samples))

    def push(self, samples: np.ndarray) -> None:
        """Takes more sound.

        Raises:
          InputError: if the turn lasts too long; it is not taken then.
        """
        limit = MelSettings().max_seconds
        if self._begin is not None and (self.num_samples + len(samples)) / self._rate > limit:
            raise InputError(f"the turn has {limit:g} s of sound, which is the limit; commit or clear it")
        self._samples.append(samples)
        if self._prefill is not None:
            self._prefill.push(samples)
        if self._begin is None:
            self._drop(max(self.num_samples - int(_IDLE_SECONDS * self._rate), 0))

    def push_picture(self, picture: Image.Image) -> None:
        """Takes a picture, which shows what there is to see now."""
        if len(self._pictures) >= _MAX_PICTURES:
            raise InputError(f"the turn has {_MAX_PICTURES} pictures, which is the limit; commit or clear it")
        if self._pictures and self._pictures[0][0].size != picture.size:
            raise InputError(f"the picture is {picture.size}, those before it {self._pictures[0][0].size}")
        num_bytes = sum(3 * other.width * other.height for other, _ in [*self._pictures, (picture, 0)])
        if num_bytes > _MAX_PICTURE_BYTES:
            raise InputError(
                f"the turn's pictures have {num_bytes} bytes, over {_MAX_PICTURE_BYTES}; send smaller ones"
            )
        had_none = not self._pictures
        self._pictures.append((picture, self._first + self.num_samples))
        if self._begin is None:
            oldest = self._first + self.num_samples - int(_CAMERA_SECONDS * self._rate)
            self._pictures = [item for item in self._pictures if item[1] >= oldest]
        elif had_none:
            self.restart()  # as a turn with pictures
        elif self._prefill is not None:
            self._prefill.push(self._timed(self._pictures[-1]))

    def begin_turn(self, seconds: float) -> None:
        """Somebody began to speak at this time of the session's sound; nothing if they had already."""
        if self._begin is not None:
            return
        self._drop(max(int(seconds * self._rate) - self._first, 0))
        self._begin = self._first
        self._start_prefill()

    def commit(self) -> Item:
        """The item of what was heard; what comes now belongs to the next."""
        samples = np.concatenate(self._samples)
        # in later turns the last picture stands for those that were seen with this one
        parts = [Part("input_image", image_url=_encode(picture)) for picture, _ in self._pictures[-1:]]
        parts.append(Part("input_audio", samples=samples, rate=self._rate))
        item = Item(self.item_id, "user", parts)
        self._complete = self._prefill
        self._prefill = None
        self._first += len(samples)
        self._samples = []
        self._pictures = []
        self._begin = None
        self.item_id = make_id("item")
        return item

    def take_turn(self, config: SessionConfig) -> PrefillTask | None:
        """What was prefilled of the turn that was committed last, if it is what is answered in this way."""
        complete = self._complete
        self._complete = None
        if complete is None:
            return None
        options = config.options
        same_prompt = config.instructions == self._session.config.instructions
        if same_prompt and complete.options.speaks == options.speaks:
            return complete
        complete.cancel()
        return None

    def restart(self) -> None:
        """Prefills anew: what came before, or what it consists of, has changed."""
        self._cancel()
        if self._begin is not None:
            self._start_prefill()

    def close(self) -> None:
        """Drops everything."""
        self._cancel()
        self._samples = []
        self._pictures = []

    def _start_prefill(self) -> None:
        session = self._session
        config = session.config
        messages = session.conversation.make_messages(config.instructions)
        video = bool(self._pictures)
        self._prefill = PrefillTask(session.service, messages, config.options, self._rate, video=video)
        for item in self._pictures:
            self._prefill.push(self._timed(item))
        for samples in self._samples:
            self._prefill.push(samples)

    def _timed(self, item: tuple[Image.Image, int]) -> tuple[Image.Image, float]:
        picture, num_samples = item
        assert self._begin is not None
        return picture, max(num_samples - self._begin, 0) / self._rate

    def _drop(self, count: int) -> None:
        """Forgets the first samples."""
        if not count:
            return
        samples = np.concatenate(self._samples)[count:]
        self._first += count
        self._samples = [samples]

    def _cancel(self) -> None:
        for task in (self._prefill, self._complete):
            if task is not None:
                task.cancel()
        self._prefill = None
        self._complete = None


def _encode(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
