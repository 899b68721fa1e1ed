"""Files of requests: good ones of every kind, and bad ones of every kind there is."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from omni_jax import SPEECH_SYSTEM_PROMPT
from omni_jax.serving.batch_lines import URL

MEDIA = Path(__file__).parents[1] / "media"
SMALL = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 16}


def line(custom_id: str, content: Any, **body: Any) -> str:
    speaks = "audio" in body.get("modalities", ())
    system = [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}] if speaks else []
    messages = [*system, {"role": "user", "content": content}]
    body = {"model": "m", "messages": messages, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": body})


def good(number: int) -> str:
    """Text, a picture, a sound, a silent video or one with sound; every fifth is spoken. Greedy."""
    text = {"type": "text", "text": f"What is number {number}?"}
    sound = base64.b64encode((MEDIA / "speech.wav").read_bytes()).decode()
    media: list[list[dict[str, Any]]] = [
        [],
        [{"type": "image_url", "image_url": {"url": "media/picture.jpg"}}],
        [{"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}],
        [{"type": "video_url", "video_url": "media/silent.mp4"}],
        [{"type": "video", "video": "media/video.mp4", "use_audio_in_video": True}],
        [],
        [],
    ]
    body: dict[str, Any] = dict(max_completion_tokens=1 + number % 9, mm_processor_kwargs=SMALL, return_token_ids=True)
    if number % 5 == 0:
        talker = dict(temperature=0, repetition_penalty=2.0, max_tokens=12 + number % 30)
        body |= dict(modalities=["text", "audio"], audio=dict(voice="Ethan", format="wav"))
        body["sampling_params_list"] = [{"temperature": 0}, talker, {"seed": number}]
    return line(f"good-{number}", [*media[number % len(media)], text], **body)


def bad() -> list[tuple[str | bytes, str]]:
    """Lines that cannot be answered, and a part of what must be said about each."""

    def with_body(custom_id: str, **body: Any) -> str:
        return line(custom_id, "hi", **body)

    def with_part(custom_id: str, **part: Any) -> str:
        return line(custom_id, [part])

    def changed(custom_id: str, /, **fields: Any) -> str:
        return json.dumps({**json.loads(line(custom_id, "hi")), **fields})

    return [
        ("{not json", "not JSON"),
        (b'{"custom_id": "\xff"}', "not UTF-8"),
        ("[1, 2]", "must be an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"custom_id": "nan", "x": NaN}', "NaN is no JSON number"),
        (changed("", custom_id=""), "custom_id is ''"),
        (changed("b1", method="GET"), "method is 'GET'"),
        (changed("b2", url="/v1/embeddings"), "url is '/v1/embeddings'"),
        (changed("b3", body=7), "body must be an object"),
        (changed("b4", priority=1), "unknown field priority"),
        (changed("good-0"), "was there before"),
        (with_body("b5", temprature=1), "unknown field of the body temprature"),
        (with_body("b6", temperature=-1), "temperature is -1"),
        (with_body("b7", max_completion_tokens="many"), "max_tokens is 'many'"),
        (with_body("b8", modalities=["audio", "smell"]), "modalities is"),
        (with_body("b9", modalities=["text", "audio"], audio={"voice": "Nobody"}), "voice 'Nobody' is unknown"),
        (with_body("b10", modalities=["text", "audio"], audio={"format": "ogg"}), "audio.format is 'ogg'"),
        (
            with_body("b11", modalities=["text", "audio"], sampling_params_list=[{}, {"max_tokens": 10**9}]),
            "max_tokens is 1000000000",
        ),
        (changed("b12", body={"messages": [{"role": "wizard", "content": "hi"}]}), "unknown role 'wizard'"),
        (with_part("b13", type="image", image="media/nothing.jpg"), "no such file"),
        (with_part("b14", type="image", image="/etc/hostname"), "is not within"),
        (with_part("b15", type="image", image="../../secret.png"), "is not within"),
        (with_part("b16", type="image_url", image_url={"url": "http://127.0.0.1:1/x.png"}), "from the web is off"),
        (with_part("b17", type="audio", audio="media/picture.jpg"), "audio"),
        (line("b18", "word " * 40_000), "over the limit"),
    ]
