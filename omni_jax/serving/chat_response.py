"""OpenAI's chat completions: the body of an answer, with its speech."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from omni_jax.engine.outputs import Reply
from omni_jax.serving.chat_request import ChatRequest
from omni_jax.serving.sound_formats import encode_sound

EXPIRY_SECONDS = 24 * 3600  # OpenAI's field says until when it keeps sound, which is in the answer here


def make_body(
    request: ChatRequest, reply: Reply, name: str, model_name: str, now: int, path: str | None
) -> dict[str, Any]:
    """The body of an answer.

    Args:
      request: what was asked.
      reply: the answer.
      name: of the request, for ids.
      model_name: what the answer calls the model.
      now: seconds since 1970.
      path: of the file that the speech is in; it is in the body if None.
    """
    # OpenAI has no content where an answer is spoken; here the text stands in both places
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.audio is not None:
        message["audio"] = _make_audio(request, reply, name, now, path)
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
    if request.return_token_ids:
        choice["token_ids"] = list(reply.token_ids)
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": now,
        "model": model_name,
        "choices": [choice],
        "usage": make_usage(reply),
    }


def _make_audio(request: ChatRequest, reply: Reply, name: str, now: int, path: str | None) -> dict[str, Any]:
    audio: dict[str, Any] = {
        "id": f"audio-{name}",
        "expires_at": now + EXPIRY_SECONDS,
        "transcript": reply.text,
    }
    # OpenAI's API has the data alone; a minute of speech is four megabytes of base64
    if path is not None:
        audio["path"] = path
    elif reply.audio is not None:
        data = encode_sound(reply.audio, request.audio_format)
        audio["data"] = base64.b64encode(data).decode()
    if request.return_token_ids:
        audio["codec_ids"] = list(reply.codec_ids)
    if request.word_timestamps:
        audio["words"] = make_words(reply)
    return audio


async def find_words(request: ChatRequest, reply: Reply) -> None:
    """Has the words of a long reply found in a thread, where they were asked for: meanwhile other streams go on."""
    if request.word_timestamps:
        await asyncio.to_thread(getattr, reply, "words")  # which keeps them


def make_words(reply: Reply) -> list[dict[str, Any]]:
    """When each word is spoken, in seconds, as OpenAI's transcriptions have it."""
    return [{"word": w.text, "start": round(w.begin, 3), "end": round(w.end, 3)} for w in reply.words]


def make_usage(reply: Reply) -> dict[str, Any]:
    """The tokens of an answer and of its prompt."""
    usage = reply.usage
    text_tokens = len(reply.token_ids)
    audio_tokens = len(reply.codec_ids)
    values: dict[str, Any] = {
        "prompt_tokens": usage.total,
        "completion_tokens": text_tokens + audio_tokens,
        "total_tokens": usage.total + text_tokens + audio_tokens,
        "prompt_tokens_details": {
            "audio_tokens": usage.audio,
            "image_tokens": usage.image,
            "video_tokens": usage.video,
            "cached_tokens": usage.cached,
        },
        "completion_tokens_details": {"text_tokens": text_tokens, "audio_tokens": audio_tokens},
    }
    # no field of OpenAI's, so it is there only where it says something
    if usage.num_bad_packets:
        values["bad_packets"] = usage.num_bad_packets
    return values
