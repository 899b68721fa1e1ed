"""One answer of a realtime session, as events."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np

from omni_jax.engine.outputs import Event, Reply
from omni_jax.models.token2wav import SAMPLE_RATE
from omni_jax.processing.audio import Resampler
from omni_jax.processing.chat import parse_messages
from omni_jax.serving.chat_request import ChatRequest
from omni_jax.serving.conversation import Item, Part, make_id
from omni_jax.serving.engine_thread import ReplyStream
from omni_jax.serving.http_errors import make_error
from omni_jax.serving.input_buffer import PrefillTask
from omni_jax.serving.realtime_audio import RATES, encode_samples
from omni_jax.serving.realtime_config import SessionConfig
from omni_jax.serving.realtime_protocol import Session


class Response:
    """An answer; ``run`` makes it.

    Attributes:
      id: that events name it by.
      ended: whether nothing more comes of it.
    """

    def __init__(self, session: Session, config: SessionConfig, metadata: dict[str, str] | None, *, is_apart: bool):
        """Nothing is sent yet.

        Args:
          session: that it belongs to.
          config: how it is made.
          metadata: of the client's.
          is_apart: whether it is left out of the conversation.
        """
        self.id = make_id("resp")
        self.ended = False
        self._session = session
        self._config = config
        self._metadata = metadata
        self._is_apart = is_apart
        self._speaks = config.output_modality == "audio"
        self._part = Part("output_audio" if self._speaks else "output_text")
        self._item = Item(make_id("item"), "assistant", [self._part], "in_progress")
        self._samples: list[np.ndarray] = []
        self._stream: ReplyStream | None = None
        self._status = "in_progress"
        self._details: dict[str, Any] | None = None
        self._reply: Reply | None = None
        rate = RATES[config.output_format]
        self._resampler = None if rate == SAMPLE_RATE else Resampler(SAMPLE_RATE, rate)
        self._lock = asyncio.Lock()

    async def run(self, messages: list[dict[str, Any]], turn: PrefillTask | None) -> None:
        """Answers, and sends what comes of it.

        Args:
          messages: that are answered.
          turn: what has been prefilled of them, if anything.
        """
        session = self._session
        await session.send("response.created", response=self._describe())
        try:
            service = session.service
            with service.admit():
                options = service.check_options(self._config.options)
                clip = await service.find_clip(options)
                self._stream = None if turn is None else await turn.answer(options, clip)
                if self._stream is None:
                    request = ChatRequest(parse_messages(messages), options)
                    self._stream = await service.answer(request, live=True)
                await self._open_item()
                async for event in self._stream:
                    async with self._lock:
                        if self.ended:
                            return
                        await self._send_piece(event)
                        if event.reply is not None:
                            self._reply = event.reply
                            is_whole = event.reply.finish_reason == "stop"
                            details = None if is_whole else {"type": "incomplete", "reason": "max_output_tokens"}
                            await self._end("completed" if is_whole else "incomplete", details)
        except Exception as error:
            async with self._lock:
                if not self.ended:
                    _, body = make_error(error)
                    await self._end("failed", {"type": "failed", **body})
        finally:
            # where it was cancelled before there was a stream
            if self._stream is not None:
                self._stream.cancel()

    async def cancel(self, reason: str) -> None:
        """Ends the answer where it is; ``reason`` is "client_cancelled" or "turn_detected"."""
        async with self._lock:
            if self.ended:
                return
            if self._stream is not None:
                self._stream.cancel()
            await self._end("cancelled", {"type": "cancelled", "reason": reason})

    async def _open_item(self) -> None:
        async with self._lock:
            if self.ended:
                return
            await self._session.send("response.output_item.added", **self._place(), item=self._item.describe())
            if not self._is_apart:
                await self._session.add_item(self._item)
            part = self._describe_part()
            await self._session.send("response.content_part.added", **self._place_in_item(), part=part)

    async def _send_piece(self, event: Event) -> None:
        place = self._place_in_item()
        if event.text:
            self._part.text += event.text
            kind = "response.output_audio_transcript.delta" if self._speaks else "response.output_text.delta"
            await self._session.send(kind, **place, delta=event.text)
        if event.audio is not None and self._speaks:
            self._samples.append(event.audio)
            samples = event.audio if self._resampler is None else self._resampler.push(event.audio)
            await self._send_audio(samples, event.hold_back)

    async def _send_audio(self, samples: np.ndarray, hold_back: float | None) -> None:
        if not len(samples):
            return
        data = base64.b64encode(encode_samples(samples, self._config.output_format)).decode()
        # no field of OpenAI's: how long a player had better wait with the first sound
        more = {} if hold_back is None else {"hold_back": round(hold_back, 3)}
        await self._session.send("response.output_audio.delta", **self._place_in_item(), delta=data, **more)

    async def _end(self, status: str, details: dict[str, Any] | None) -> None:
        self.ended = True
        self._status = status
        self._details = details
        self._item.status = "completed" if status == "completed" else "incomplete"
        if self._speaks:
            self._part.samples = np.concatenate([np.zeros(0, np.float32), *self._samples])
            self._part.rate = SAMPLE_RATE
        session = self._session
        place = self._place_in_item()
        if self._stream is not None:
            if self._speaks:
                if self._resampler is not None:
                    await self._send_audio(self._resampler.finish(), None)
                await session.send("response.output_audio.done", **place)
                await session.send("response.output_audio_transcript.done", **place, transcript=self._part.text)
            else:
                await session.send("response.output_text.done", **place, text=self._part.text)
            await session.send("response.content_part.done", **place, part=self._describe_part())
            await session.send("response.output_item.done", **self._place(), item=self._item.describe())
            if not self._is_apart:
                await session.send("conversation.item.done", previous_item_id=None, item=self._item.describe())
        await session.send("response.done", response=self._describe())

    def _place(self) -> dict[str, Any]:
        return {"response_id": self.id, "output_index": 0}

    def _place_in_item(self) -> dict[str, Any]:
        return {**self._place(), "item_id": self._item.id, "content_index": 0}

    def _describe_part(self) -> dict[str, Any]:
        """OpenAI's object of the part, whose type has another name here than in an item."""
        if self._speaks:
            return {"type": "audio", "transcript": self._part.text}
        return {"type": "text", "text": self._part.text}

    def _describe(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": self._status,
            "status_details": self._details,
            "output": [self._item.describe()] if self.ended and self._stream is not None else [],
            "conversation_id": None if self._is_apart else self._session.conversation.id,
            "output_modalities": [self._config.output_modality],
            "max_output_tokens": self._config.max_tokens,
            "metadata": self._metadata,
            "usage": None if self._reply is None else _make_usage(self._reply),
        }


def _make_usage(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    num_text = len(reply.token_ids)
    num_codes = len(reply.codec_ids)
    pictures = usage.image + usage.video
    details = {"text_tokens": usage.text, "audio_tokens": usage.audio, "image_tokens": pictures}
    return {
        "total_tokens": usage.total + num_text + num_codes,
        "input_tokens": usage.total,
        "output_tokens": num_text + num_codes,
        "input_token_details": {**details, "cached_tokens": usage.cached},
        "output_token_details": {"text_tokens": num_text, "audio_tokens": num_codes},
    }
