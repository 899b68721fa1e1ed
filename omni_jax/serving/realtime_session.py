"""A realtime session: sound and pictures come, the server takes turns, and answers until it is interrupted.

The model takes turns: it does not listen while it speaks. What a user says over an answer is a new turn, which ends the
answer where the session asks for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from omni_jax.checks import check_int, check_names, shown
from omni_jax.errors import InputError
from omni_jax.processing.sources import decode_base64
from omni_jax.serving.conversation import Conversation, Item, make_id, parse_item
from omni_jax.serving.http_errors import make_error
from omni_jax.serving.input_buffer import InputBuffer
from omni_jax.serving.realtime_audio import RATES, PacketBuffer, decode_samples
from omni_jax.serving.realtime_config import SessionConfig
from omni_jax.serving.realtime_response import Response
from omni_jax.serving.service import Service
from omni_jax.serving.turn_detection import Boundary, TurnDetector, VoiceDetector, WebRtcDetector

Send = Callable[[dict[str, Any]], Awaitable[None]]
MakeDetector = Callable[[float], VoiceDetector]

_MAX_APPEND_BYTES = 15 << 20  # of one packet, as OpenAI has it
_log = logging.getLogger(__name__)


class RealtimeSession:
    """One connection's dialogue; events go in through ``handle``, and out through ``send``."""

    def __init__(self, service: Service, send: Send, make_detector: MakeDetector = WebRtcDetector):
        """Nothing is sent yet.

        Args:
          service: that answers.
          send: takes the events of the server's.
          make_detector: of voice, for a threshold.
        """
        self.service = service
        self.config = SessionConfig()
        self.conversation = Conversation()
        self._id = make_id("sess")
        self._send_event = send
        self._make_detector = make_detector
        self._buffer: InputBuffer | None = None
        self._packets = PacketBuffer(RATES[self.config.input_format])
        self._detector: TurnDetector | None = None
        self._response: Response | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._handlers: dict[str, Callable[[dict[str, Any]], Awaitable[None]]] = {
            "session.update": self._update_session,
            "input_audio_buffer.append": self._append_audio,
            "input_audio_buffer.commit": self._commit_audio,
            "input_audio_buffer.clear": self._clear_audio,
            "input_image_buffer.append": self._append_picture,
            "conversation.item.create": self._create_item,
            "conversation.item.retrieve": self._retrieve_item,
            "conversation.item.delete": self._delete_item,
            "conversation.item.truncate": self._truncate_item,
            "response.create": self._create_response,
            "response.cancel": self._cancel_response,
        }

    async def begin(self) -> None:
        """Tells the client of the session."""
        self._reset_input()
        await self.send("session.created", session=self._describe())

    async def handle(self, event: dict[str, Any]) -> None:
        """Does what an event of the client's asks for; what is wrong with it is told, and the session goes on."""
        kind = event.get("type")
        try:
            handler = self._handlers.get(kind) if isinstance(kind, str) else None
            if handler is None:
                raise InputError(f"type is {shown(kind)}; it must be one of {', '.join(self._handlers)}")
            await handler(event)
        except Exception as error:
            await self.send_error(error, event.get("event_id"))

    async def close(self) -> None:
        """Ends what is going on."""
        if self._response is not None:
            await self._response.cancel("client_cancelled")
        for task in list(self._tasks):
            task.cancel()
        if self._buffer is not None:
            self._buffer.close()

    async def send(self, kind: str, **values: Any) -> None:
        """Sends an event."""
        await self._send_event({"type": kind, "event_id": make_id("event"), **values})

    async def send_error(self, error: Exception, event_id: Any = None) -> None:
        """Tells the client of an error."""
        _, body = make_error(error)
        details = body["error"]
        assert isinstance(details, dict)
        await self.send("error", error={**details, "event_id": event_id if isinstance(event_id, str) else None})

    async def add_item(self, item: Item, previous_id: str | None = None) -> None:
        """Puts an item into the conversation, and tells the client."""
        before = self.conversation.insert(item, previous_id)
        await self.send("conversation.item.added", previous_item_id=before, item=item.describe())
        if item.status == "completed":
            await self.send("conversation.item.done", previous_item_id=before, item=item.describe())

    def start(self, work: Awaitable[None]) -> None:
        """Has some work done beside; its error is told."""

        async def run() -> None:
            try:
                await work
            except Exception as error:
                await self.send_error(error)

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the session ---

    async def _update_session(self, event: dict[str, Any]) -> None:
        check_names("field of the event", event, ("type", "event_id", "session"))
        values = event.get("session")
        if not isinstance(values, dict):
            raise InputError(f"session is {shown(values)}; it must be an object")
        config = self.config.update(values)
        self.service.check_options(config.options)
        input_changed = (config.input_format, config.turn_detection) != (
            self.config.input_format,
            self.config.turn_detection,
        )
        self.config = config
        if input_changed:
            self._reset_input()
        await self.send("session.updated", session=self._describe())

    def _describe(self) -> dict[str, Any]:
        return {"id": self._id, "model": self.service.spec.model_name, **self.config.describe()}

    def _reset_input(self) -> None:
        rate = RATES[self.config.input_format]
        self._packets = PacketBuffer(rate)
        self._buffer = None
        self._detector = None
        detection = self.config.turn_detection
        if detection is not None:
            self._detector = TurnDetector(
                self._make_detector(detection.threshold),
                rate,
                threshold=detection.threshold,
                silence_seconds=detection.silence_duration_ms / 1000,
            )

    # --- sound and pictures ---

    async def _append_audio(self, event: dict[str, Any]) -> None:
        check_names("field of the event", event, ("type", "event_id", "audio", "sequence"))
        audio = event.get("audio")
        if not isinstance(audio, str) or len(audio) > _MAX_APPEND_BYTES:
            raise InputError(f"audio is {shown(audio)}; it must be base64 of up to {_MAX_APPEND_BYTES} characters")
        number = event.get("sequence")
        if number is not None:
            check_int("sequence", number, 0)
        samples = decode_samples(decode_base64(audio, "audio"), self.config.input_format)
        await self._take(self._packets.push(samples, number))

    async def _take(self, samples: np.ndarray) -> None:
        """Takes sound whose order is settled."""
        if not len(samples):
            return
        buffer = self._open_buffer()
        buffer.push(samples)
        if self._detector is None:
            buffer.begin_turn(0.0)
            return
        for boundary in self._detector.push(samples):
            await self._take_turn(boundary)

    async def _take_turn(self, boundary: Boundary) -> None:
        detection = self.config.turn_detection
        assert detection is not None
        buffer = self._open_buffer()
        if boundary.kind == "start":
            begin = max(boundary.seconds - detection.prefix_padding_ms / 1000, 0.0)
            if detection.interrupt_response and self._response is not None:
                await self._response.cancel("turn_detected")
            buffer.begin_turn(begin)
            await self.send(
                "input_audio_buffer.speech_started", audio_start_ms=round(begin * 1000), item_id=buffer.item_id
            )
            return
        end = round(boundary.seconds * 1000)
        await self.send("input_audio_buffer.speech_stopped", audio_end_ms=end, item_id=buffer.item_id)
        await self._commit(buffer)
        if detection.create_response:
            await self._respond(self.config)

    async def _append_picture(self, event: dict[str, Any]) -> None:
        check_names("field of the event", event, ("type", "event_id", "image"))
        image = event.get("image")
        if not isinstance(image, str) or len(image) > _MAX_APPEND_BYTES:
            raise InputError(f"image is {shown(image)}; it must be base64 of up to {_MAX_APPEND_BYTES} characters")
        data = decode_base64(image, "image")
        picture = await self.service.read_picture(data)
        buffer = self._open_buffer()
        buffer.push_picture(picture)

    def _open_buffer(self) -> InputBuffer:
        if self._buffer is None:
            self._buffer = InputBuffer(self, RATES[self.config.input_format])
        return self._buffer

    async def _commit_audio(self, event: dict[str, Any]) -> None:
        check_names("field of the event", event, ("type", "event_id"))
        await self._take(self._packets.finish())
        self._packets = PacketBuffer(RATES[self.config.input_format])
        if self._buffer is None or not self._buffer.num_samples:
            raise InputError("the input audio buffer is empty; append audio first")
        self._buffer.begin_turn(0.0)
        await self._commit(self._buffer)

    async def _commit(self, buffer: InputBuffer) -> None:
        """Makes an item of the user's of what was heard."""
        item = buffer.commit()
        previous = self.conversation.last_id
        await self.send("input_audio_buffer.committed", previous_item_id=previous, item_id=item.id)
        await self.add_item(item)
        if self.config.transcribes:
            self.start(self._transcribe(item))

    async def _transcribe(self, item: Item) -> None:
        (part,) = [part for part in item.parts if part.samples is not None]
        assert part.samples is not None
        where = {"item_id": item.id, "content_index": item.parts.index(part)}
        kind = "conversation.item.input_audio_transcription"
        try:
            with self.service.admit():
                reply = await self.service.transcribe(part.samples, part.rate)
        except Exception as error:
            _, body = make_error(error)
            await self.send(f"{kind}.failed", **where, **body)
            return
        part.text = reply.text
        usage = {"type": "duration", "seconds": len(part.samples) / part.rate}
        await self.send(f"{kind}.completed", **where, transcript=reply.text, usage=usage)

    async def _clear_audio(self, event: dict[str, Any]) -> None:
        check_names("field of the event", event, ("type", "event_id"))
        if self._buffer is not None:
            self._buffer.close()
        self._reset_input()
        await self.send("input_audio_buffer.cleared")

    # --- the conversation ---

    async def _create_item(self, event: dict[str, Any]) -> None:
        check_names("field of the event", event, ("type", "event_id", "previous_item_id", "item"))
        await self.add_item(parse_item(event.get("item")), event.get("previous_item_id"))
        self._forget_prefix()

    async def _retrieve_item(self, event: dict[str, Any]) -> None:
        check_names("field of the event", event, ("type", "event_id", "item_id"))
        item = self.conversation.find(event.get("item_id"))
        await self.send("conversation.item.retrieved", item=item.describe(with_audio=True))

    async def _delete_item(self, event: dict[str, Any]) -> None:
        check_names("field of the event", event, ("type", "event_id", "item_id"))
        self.conversation.delete(event.get("item_id"))
        self._forget_prefix()
        await self.send("conversation.item.deleted", item_id=event["item_id"])

    async def _truncate_item(self, event: dict[str, Any]) -> None:
        check_names("field of the event", event, ("type", "event_id", "item_id", "content_index", "audio_end_ms"))
        where = {name: event.get(name) for name in ("item_id", "content_index", "audio_end_ms")}
        self.conversation.truncate(**where)
        self._forget_prefix()
        await self.send("conversation.item.truncated", **where)

    def _forget_prefix(self) -> None:
        """What was prefilled of the dialogue is not what it is any more."""
        if self._buffer is not None:
            self._buffer.restart()

    # --- answers ---

    async def _create_response(self, event: dict[str, Any]) -> None:
        check_names("field of the event", event, ("type", "event_id", "response"))
        values = event.get("response") or {}
        if not isinstance(values, dict):
            raise InputError(f"response is {shown(values)}; it must be an object")
        own = {name: values.get(name) for name in ("conversation", "input", "metadata")}
        rest = {name: value for name, value in values.items() if name not in own}
        if own["conversation"] not in (None, "auto", "none"):
            raise InputError(f"response.conversation is {shown(own['conversation'])}; it must be 'auto' or 'none'")
        items = None
        if own["input"] is not None:
            if not isinstance(own["input"], list):
                raise InputError(f"response.input is {shown(own['input'])}; it must be a list of items")
            items = [self._read_input(value, f"response.input[{i}]") for i, value in enumerate(own["input"])]
        config = self.config.update(rest)
        metadata = own["metadata"] if isinstance(own["metadata"], dict) else None
        await self._respond(config, items=items, metadata=metadata, is_apart=own["conversation"] == "none")

    def _read_input(self, value: Any, where: str) -> Item:
        """An item of one answer's own: a new one, or a reference to one of the conversation's."""
        if isinstance(value, dict) and value.get("type") == "item_reference":
            return self.conversation.find(value.get("id"))
        return parse_item(value, where)

    async def _respond(
        self,
        config: SessionConfig,
        *,
        items: list[Item] | None = None,
        metadata: dict[str, str] | None = None,
        is_apart: bool = False,
    ) -> None:
        """Begins an answer.

        Args:
          config: how it is made.
          items: that are answered, in place of the conversation.
          metadata: of the client's.
          is_apart: whether the answer is to be left out of the conversation.
        """
        if self._response is not None and not self._response.ended:
            raise InputError("the conversation has an answer in progress already; cancel it first")
        messages = self.conversation.make_messages(config.instructions, items)
        if not any(message["role"] == "user" for message in messages):
            raise InputError("there is nothing to answer; say something, or create an item")
        turn = None if items is not None or self._buffer is None else self._buffer.take_turn(config)
        self._response = Response(self, config, metadata, is_apart=is_apart)
        self.start(self._response.run(messages, turn))

    async def _cancel_response(self, event: dict[str, Any]) -> None:
        check_names("field of the event", event, ("type", "event_id", "response_id"))
        if self._response is None or self._response.ended:
            raise InputError("there is no answer in progress")
        wanted = event.get("response_id")
        if wanted is not None and wanted != self._response.id:
            raise InputError(f"response_id is {shown(wanted)}; the answer in progress is {self._response.id}")
        await self._response.cancel("client_cancelled")
