"""The objects of the server's API, in JSON Schema."""

from __future__ import annotations

from typing import Any

from omni_jax.checks import SEED_MAX
from omni_jax.generation.options import MAX_STOP
from omni_jax.serving.batch_lines import URL
from omni_jax.serving.file_store import MAX_NAME
from omni_jax.serving.sound_formats import SOUND_FORMATS
from omni_jax.serving.speech_endpoint import MAX_CHARACTERS


def _text(about: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": about, **more}


def _whole(about: str, **more: Any) -> dict[str, Any]:
    return {"type": "integer", "description": about, **more}


def _number(about: str, **more: Any) -> dict[str, Any]:
    return {"type": "number", "description": about, **more}


def _yes_or_no(about: str) -> dict[str, Any]:
    return {"type": "boolean", "description": about}


def _object(about: str, properties: dict[str, Any], required: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "description": about,
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **more,
    }


def _answer(about: str, properties: dict[str, Any]) -> dict[str, Any]:
    """An object that the server gives, which may have more fields."""
    return {"type": "object", "description": about, "properties": properties, "required": list(properties)}


def _list_of(name: str) -> dict[str, Any]:
    items = {"type": "array", "items": {"$ref": f"#/components/schemas/{name}"}}
    return _answer(f"All {name.lower()}s.", {"object": _text("list"), "data": items})


_SAMPLING = {
    "temperature": _number("0: the most likely one.", minimum=0, maximum=2),
    "top_p": _number("Of the likeliest that have this probability together.", exclusiveMinimum=0, maximum=1),
    "top_k": _whole("Of so many likeliest; 0 for all.", minimum=0, maximum=1000),
    "repetition_penalty": _number("Of what was there before.", exclusiveMinimum=0, maximum=10),
    "seed": _whole("Of what is drawn.", minimum=0, maximum=SEED_MAX),
}
_STOP = {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOP}

_PARTS = [
    _object("Text.", {"type": {"const": "text"}, "text": _text("What is said.")}, ("type", "text")),
    _object(
        "A picture.",
        {
            "type": {"const": "image_url"},
            "image_url": _object("Where it is.", {"url": _text("data: URL, address, or path.")}, ("url",)),
        },
        ("type", "image_url"),
    ),
    _object(
        "A sound.",
        {
            "type": {"const": "input_audio"},
            "input_audio": _object(
                "Its file.",
                {"data": _text("In base64."), "format": _text("Of the file.", enum=["wav", "mp3", "flac", "opus"])},
                ("data", "format"),
            ),
        },
        ("type", "input_audio"),
    ),
    _object(
        "A video.",
        {
            "type": {"const": "video_url"},
            "video_url": _object("Where it is.", {"url": _text("data: URL, address, or path.")}, ("url",)),
        },
        ("type", "video_url"),
    ),
]

_REQUESTS: dict[str, Any] = {
    "Message": _object(
        "What somebody says.",
        {
            "role": _text("Who.", enum=["system", "user", "assistant"]),
            "content": {
                "description": "What.",
                "oneOf": [{"type": "string"}, {"type": "array", "items": {"oneOf": _PARTS}}],
            },
        },
        ("role", "content"),
    ),
    "ChatRequest": _object(
        "docs/batch.md has all fields.",
        {
            "model": _text("As /v1/models names it."),
            "messages": {
                "type": "array",
                "description": "The dialogue.",
                "items": {"$ref": "#/components/schemas/Message"},
                "minItems": 1,
            },
            "modalities": {"description": "Whether to speak.", "enum": [["text"], ["text", "audio"]]},
            "audio": _object(
                "How to speak.",
                {
                    "voice": {
                        "description": "A name, {id}, or a clip.",
                        "oneOf": [{"type": "string"}, {"type": "object"}],
                    },
                    "format": _text("Of the sound.", enum=list(SOUND_FORMATS)),
                    "word_timestamps": _yes_or_no("Say when each word is spoken."),
                },
            ),
            "stream": _yes_or_no("Send pieces as they are made."),
            "stream_options": _object("Of pieces.", {"include_usage": _yes_or_no("Count tokens in a last piece.")}),
            "max_completion_tokens": _whole("Of the reply, at most.", minimum=1, maximum=2**31 - 1),
            "max_tokens": _whole("The same.", minimum=1, maximum=2**31 - 1),
            **_SAMPLING,
            "stop": {"description": "Texts that end the reply.", "oneOf": [{"type": "string", "minLength": 1}, _STOP]},
            "return_token_ids": _yes_or_no("Give the ids of text and speech too."),
            "reply_text": _text("What is spoken in place of an answer.", minLength=1),
        },
        ("messages",),
    ),
    "SpeechRequest": _object(
        "What is to be spoken.",
        {
            "model": _text("As /v1/models names it."),
            "input": _text("The text.", minLength=1, maxLength=MAX_CHARACTERS),
            "voice": {"description": "A name, or {id}.", "oneOf": [{"type": "string"}, {"type": "object"}]},
            "response_format": _text("Of the sound.", enum=[*SOUND_FORMATS, "pcm"]),
            "stream_format": _text("Bytes, or events.", enum=["audio", "sse"]),
            "ref_audio": _text("A clip of the voice: data: URL, address, or path."),
            "ref_text": _text("What the clip says, word for word."),
            "word_timestamps": _yes_or_no("Say when each word is spoken, in the last event of stream_format sse."),
            "max_tokens": _whole("Codes, 50 a second, at most.", minimum=1, maximum=2**31 - 1),
            **_SAMPLING,
        },
        ("input",),
    ),
    "TranscriptionRequest": _object(
        "What is heard.",
        {
            "file": _text("Any file that FFmpeg reads.", format="binary"),
            "model": _text("As /v1/models names it."),
            "language": _text("Of ISO 639-1, or a name.", maxLength=40),
            "prompt": _text("What came before, or how words are spelt."),
            "response_format": _text("Of the answer.", enum=["json", "text", "verbose_json"]),
            "temperature": _number("0: the most likely one.", minimum=0, maximum=2),
            "stream": _yes_or_no("Send pieces as they are made."),
        },
        ("file",),
    ),
    "VoiceRequest": _object(
        "A voice of somebody who has agreed to it.",
        {
            "name": _text("That requests choose it by.", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$"),
            "audio_sample": _text("1 to 30 seconds of it.", format="binary"),
            "consent": _text("Who speaks, and that they have agreed.", minLength=20, maxLength=4000),
            "ref_text": _text("What is said, word for word."),
        },
        ("name", "audio_sample", "consent"),
    ),
    "FileRequest": _object(
        "A file of requests.",
        {"file": _text("Lines as in docs/batch.md.", format="binary"), "purpose": _text("What for.", enum=["batch"])},
        ("file", "purpose"),
    ),
    "BatchRequest": _object(
        "A batch.",
        {
            "input_file_id": _text("Of a file that was uploaded."),
            "endpoint": _text("Of its requests.", enum=[URL]),
            "completion_window": _text("OpenAI's.", enum=["24h"]),
            "metadata": {
                "type": "object",
                "description": "The client's.",
                "additionalProperties": {"type": "string", "maxLength": 512},
                "maxProperties": 16,
            },
        },
        ("input_file_id", "endpoint", "completion_window"),
    ),
}

_ANSWERS: dict[str, Any] = {
    "Error": _answer(
        "What is wrong.", {"error": _answer("It.", {"message": _text("In words."), "type": _text("Kind.")})}
    ),
    "ChatCompletion": _answer(
        "An answer.",
        {
            "id": _text("Its id."),
            "object": _text("chat.completion"),
            "created": _whole("Seconds since 1970."),
            "model": _text("Which."),
            "choices": {"type": "array", "items": {"type": "object"}, "minItems": 1, "maxItems": 1},
            "usage": {"type": "object"},
        },
    ),
    "Transcription": _answer("What is said.", {"text": _text("In words."), "usage": {"type": "object"}}),
    "Voice": _answer("A voice.", {"id": _text("Its name."), "object": _text("audio.voice")}),
    "VoiceList": _list_of("Voice"),
    "Deleted": _answer("What is gone.", {"id": _text("Its id."), "deleted": _yes_or_no("Always true.")}),
    "File": _answer(
        "A file.",
        {"id": _text("Its id."), "bytes": _whole("Its size."), "filename": _text("Its name.", maxLength=MAX_NAME)},
    ),
    "FileList": _list_of("File"),
    "Batch": _answer(
        "A batch.", {"id": _text("Its id."), "status": _text("OpenAI's."), "input_file_id": _text("Of it.")}
    ),
    "BatchList": _list_of("Batch"),
    "Model": _answer("A model.", {"id": _text("Its name."), "object": _text("model")}),
    "ModelList": _list_of("Model"),
}

SCHEMAS: dict[str, Any] = {**_REQUESTS, **_ANSWERS}
