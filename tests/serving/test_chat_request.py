"""Bodies of chat completions: what every field comes to, and what is said of a wrong one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.engine.outputs import Reply
from omni_jax.engine.sampling import SamplingParams
from omni_jax.errors import InputError
from omni_jax.processing.layout import Usage
from omni_jax.serving.chat_request import parse_body
from omni_jax.serving.chat_response import make_body
from omni_jax.serving.media_roots import MediaRoots
from omni_jax.serving.sound_formats import encode_sound

HELLO = [{"role": "user", "content": "hi"}]


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


def test_fields() -> None:
    sampling = dict(temperature=0.5, top_p=0.9, top_k=5, repetition_penalty=1.1, seed=3)
    stops = dict(stop=["a", "b"], stop_token_ids=[4])
    speech = dict(modalities=["text", "audio"], audio={"voice": {"id": "Ethan"}, "format": "pcm16"})
    without_effect = dict(model="any", user="somebody", n=1, stream=False, tools=None)
    request = parse_body(body(max_tokens=7, max_completion_tokens=9, **sampling, **stops, **speech, **without_effect))
    assert parse_body(body(adapter="legal")).options.adapter == "legal"
    assert parse_body(body(reply_text="Good morning.")).options.reply_text == "Good morning."
    o = request.options
    assert o.max_tokens == 9
    assert o.sampling == SamplingParams(0.5, 5, 0.9, 1.1, 3)
    assert (o.stop, o.stop_token_ids, o.modalities, o.voice) == (("a", "b"), (4,), ("text", "audio"), "Ethan")
    assert (request.audio_format, request.return_token_ids, request.word_timestamps) == ("pcm16", False, False)


def test_what_stands_beside_the_list_goes_before_it() -> None:
    lists = [{"temperature": 0.7, "max_tokens": 5}, {"top_k": 3, "max_tokens": 8}, {"seed": 6}]
    options = parse_body(body(temperature=0.2, sampling_params_list=lists)).options
    assert (options.sampling.temperature, options.max_tokens, options.noise_seed) == (0.2, 5, 6)
    assert options.talker == {"top_k": 3, "max_tokens": 8}


def test_options_of_all_media_leave_a_part_its_own() -> None:
    parts = [
        {"type": "video", "video": "a.mp4", "fps": 1},
        {"type": "video_url", "video_url": "b.mp4"},
        {"type": "image", "image": "c.png"},
        {"type": "audio", "audio": "d.wav"},
    ]
    kwargs = {"fps": 4, "use_audio_in_video": True, "max_pixels": 50_000}
    request = parse_body({"messages": [{"role": "user", "content": parts}], "mm_processor_kwargs": kwargs})
    options = [part.options for part in request.messages[0].media]
    assert [o.get("fps") for o in options] == [1, 4, None, None]
    assert [o.get("use_audio_in_video") for o in options] == [True, True, None, None]
    assert [o.get("max_pixels") for o in options] == [50_000, 50_000, 50_000, None]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(messages=[]), "at least one message"),
        (dict(tools=[{}]), "tools is [{}]; only [] is supported"),
        (dict(n=2), "n is 2; only 1 is supported"),
        (dict(stream=True), "stream is True"),
        (dict(max_tokens=True), "max_tokens is True"),
        (dict(max_tokens=0), "max_tokens is 0"),
        (dict(temperature="hot"), "temperature is 'hot'"),
        (dict(stop=3), "stop is 3"),
        (dict(stop_token_ids=[1.5]), "stop_token_ids is 1.5"),
        (dict(seed=-1), "seed is -1"),
        (dict(modalities="audio"), "modalities is 'audio'"),
        (dict(audio={"format": "wav"}), 'modalities does not have "audio"'),
        (dict(audio={"speed": 2}), "unknown field of audio speed"),
        (dict(sampling_params_list={}), "sampling_params_list must be a list"),
        (dict(sampling_params_list=[{}, {"tempo": 1}]), "unknown field of sampling_params_list[1] tempo"),
        (dict(sampling_params_list=[{}, {"top_k": "5"}]), "sampling_params_list[1].top_k is '5'"),
        (dict(sampling_params_list=[{}, {}, {"seed": "x"}]), "sampling_params_list[2].seed is 'x'"),
        (dict(mm_processor_kwargs={"colour": 1}), "unknown field of mm_processor_kwargs colour"),
        (dict(mm_processor_kwargs={"fps": 0}), "fps"),
        (dict(return_token_ids="yes"), "return_token_ids is 'yes'"),
        (dict(modalities=["text", "audio"], audio={"word_timestamps": 1}), "audio.word_timestamps is 1"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse_body(body(**fields))


def test_paths_stay_within_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "inner" / "a.png").write_bytes(b"x")

    def sources(*names: Any) -> list[Any]:
        parts = [{"type": "video" if isinstance(name, list) else "image", "image": name} for name in names]
        for part in parts:
            if part["type"] == "video":
                part["video"] = part.pop("image")
        request = parse_body({"messages": [{"role": "user", "content": parts}]})
        return [part.source for message in MediaRoots((str(root),)).confine(request.messages) for part in message.media]

    inside = str((root / "inner" / "a.png").resolve())
    assert sources("inner/a.png", f"file://{inside}", inside, ["inner/a.png"]) == [inside, inside, inside, [inside]]
    assert sources("data:image/png;base64,eA==", "https://a/b.png") == ["data:image/png;base64,eA==", "https://a/b.png"]
    for name in ("../secret.png", "out.png", str(tmp_path / "secret.png"), ["inner/a.png", "../secret.png"]):
        with pytest.raises(InputError, match=r"is not within .*--media-root"):
            sources(name)


def test_media_beside_requests_in_a_bucket() -> None:
    def source(name: str, root: str = "gs://b/in") -> str:
        request = parse_body({"messages": [{"role": "user", "content": [{"type": "image", "image": name}]}]})
        ((part,),) = (message.media for message in MediaRoots((root,), "gs://b/in").confine(request.messages))
        return part.source

    assert source("media/../a.png") == "gs://b/in/a.png"
    for name in ("../a.png", "../../../a.png", "/etc/hostname", "file:///etc/hostname", "../in2/a.png"):
        with pytest.raises(InputError, match="is not within gs://b/in"):
            source(name)
    assert source("../a.png", "gs://b") == "gs://b/a.png"
    with pytest.raises(InputError, match="is not within /"):
        source("a.png", "/")


def test_an_answer() -> None:
    audio = np.array([0, 0.5, -1], np.float32)
    reply = Reply("hello", (1, 2), "stop", Usage(text=3, audio=4), codec_ids=(7,), audio=audio)
    request = parse_body(body(return_token_ids=True, modalities=["text", "audio"]))
    answer = make_body(request, reply, "n", "m", 100, None)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == choice["message"]["audio"]["transcript"] == "hello"
    assert (choice["token_ids"], choice["message"]["audio"]["codec_ids"]) == ([1, 2], [7])
    assert answer["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"audio_tokens": 4, "image_tokens": 0, "video_tokens": 0, "cached_tokens": 0},
        "completion_tokens_details": {"text_tokens": 2, "audio_tokens": 1},
    }
    assert encode_sound(audio, "pcm16") == np.array([0, 16384, -32767], "<i2").tobytes()
    assert encode_sound(audio, "wav")[:4] == b"RIFF"
    # words have times where they are asked for, and are all of the text
    loud = Reply("Good day.", (1, 2), "stop", Usage(), audio=np.sin(np.arange(24_000)).astype(np.float32))
    timed = parse_body(body(modalities=["text", "audio"], audio={"word_timestamps": True}))
    words = make_body(timed, loud, "n", "m", 100, None)["choices"][0]["message"]["audio"]["words"]
    assert [word["word"] for word in words] == ["Good", "day."]
    assert 0 <= words[0]["start"] < words[0]["end"] <= words[1]["start"] < words[1]["end"] <= 1
    assert loud.words is loud.words and Reply("Good day.", (), "stop", Usage()).words == ()
    elsewhere = make_body(request, reply, "n", "m", 100, "a/b.wav")["choices"][0]["message"]["audio"]
    assert elsewhere["path"] == "a/b.wav" and "data" not in elsewhere
