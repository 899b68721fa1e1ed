"""``serve.py http`` as OpenAI's own client meets it."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
import wave
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI

import omni_jax
import serve
from benchmarks.serve import serve as serve_benchmark
from omni_jax.engine.outputs import Reply
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.serving.wav import pcm16
from tests.serving import requests
from tests.serving.http_client import KEY, connect, find_server, serve_http
from tests.speaker_model import write_speaker_model

MODEL = "omni"
MESSAGES = [
    {"role": "system", "content": SPEECH_SYSTEM_PROMPT},
    {"role": "user", "content": "What is on the menu today?"},
]
TALKER = {"max_tokens": 60, "temperature": 0.0}
SPEECH = {"modalities": ["text", "audio"], "audio": {"voice": "Ethan", "format": "pcm16"}}
EXTRA = {"return_token_ids": True, "sampling_params_list": [{}, TALKER]}
CONSENT = "I am the speaker of this clip and agree that my voice is used."


@pytest.fixture(scope="module")
def address(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    keys = folder / "keys"
    keys.write_text(f"another\n{KEY}\n")
    speaker_model = write_speaker_model(folder / "speaker.onnx")
    options = ["--api-keys", str(keys), "--media-root", str(requests.MEDIA), "--speaker-model", str(speaker_model)]
    with serve_http(tiny_model, "--name", MODEL, *options) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return connect(address)


@pytest.fixture(scope="module")
def reply(model: omni_jax.OmniModel) -> Reply:
    """What the model answers in this process."""
    return model.generate(MESSAGES, modalities=("text", "audio"), voice="Ethan", max_tokens=12, talker=TALKER)


def test_text(client: OpenAI, reply: Reply) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12)
    assert answer.choices[0].message.content == reply.text
    assert answer.choices[0].finish_reason == reply.finish_reason
    assert answer.usage is not None and answer.usage.prompt_tokens == reply.usage.total


def test_streamed_text(client: OpenAI, reply: Reply) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == reply.text and sum(map(bool, texts)) > 1
    assert chunks[-1].choices[0].finish_reason == reply.finish_reason
    assert not last.choices and last.usage is not None and last.usage.completion_tokens == len(reply.token_ids)


def test_a_second_turn_goes_on_from_the_first(client: OpenAI) -> None:
    words = "What is on the menu today, and what was on it yesterday? " * 3
    turns = [{"role": "user", "content": words}]
    usages = []
    for question in ("And tomorrow?", ""):
        stream = client.chat.completions.create(
            model=MODEL, messages=turns, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
        *_, last = list(stream)
        usages.append(last.usage)
        turns += [{"role": "assistant", "content": "Fish."}, {"role": "user", "content": question}]
    first, second = usages
    assert first is not None and second is not None and second.prompt_tokens_details is not None
    assert second.prompt_tokens_details.cached_tokens == first.prompt_tokens


def test_speech(client: OpenAI, reply: Reply) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=12, extra_body=EXTRA, **{**SPEECH, "audio": {"voice": "Ethan"}}
    )
    audio = answer.choices[0].message.audio
    assert audio is not None and audio.transcript == reply.text and reply.audio is not None
    assert tuple(audio.codec_ids) == reply.codec_ids
    with wave.open(io.BytesIO(base64.b64decode(audio.data))) as file:
        assert (file.getframerate(), file.getnframes()) == (24_000, len(reply.audio))


def test_streamed_speech(client: OpenAI, reply: Reply) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=12,
        stream=True,
        extra_body=EXTRA,
        **{**SPEECH, "audio": {**SPEECH["audio"], "word_timestamps": True}},
    )
    transcript, data, codec_ids, ended, words = "", b"", (), False, []
    for chunk in stream:
        audio = getattr(chunk.choices[0].delta, "audio", None)
        if audio is not None:
            transcript += audio.transcript or ""
            data += base64.b64decode(audio.data or "")
            ended = audio.expires_at is not None
            codec_ids = tuple(getattr(audio, "codec_ids", None) or codec_ids)
            words += getattr(audio, "words", None) or []
    assert ended and transcript == reply.text and codec_ids == reply.codec_ids and reply.audio is not None
    assert [word["word"] for word in words] == [word.text for word in reply.words]
    # noise and sums of a stream and of a whole differ in their order alone (tests/streaming.py)
    streamed = np.frombuffer(data, "<i2").astype(np.int32)
    whole = np.frombuffer(pcm16(reply.audio), "<i2").astype(np.int32)
    assert streamed.shape == whole.shape and np.abs(streamed - whole).max() <= 33


def test_an_earlier_spoken_answer_is_named_by_its_id(client: OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, extra_body=EXTRA, **SPEECH)
    audio = first.choices[0].message.audio
    assert audio is not None
    question = {"role": "user", "content": "And tomorrow?"}
    turns = [{"role": "assistant", "content": audio.transcript}, {"role": "assistant", "audio": {"id": audio.id}}]
    answers = []
    for turn in turns:
        made = client.chat.completions.create(model=MODEL, messages=[*MESSAGES, turn, question], max_tokens=8)
        answers.append((made.choices[0].message.content, made.usage))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("response_format", ["wav", "mp3", "opus", "aac", "flac", "pcm"])
def test_text_to_speech(client: OpenAI, response_format: str) -> None:
    options = dict(model=MODEL, voice="Chelsie", input="Good morning.", response_format=response_format)
    made = client.audio.speech.create(**options, extra_body={"max_tokens": 60, "seed": 3})
    assert len(made.read()) > 100


def test_text_to_speech_as_events(client: OpenAI, address: str) -> None:
    body = dict(model=MODEL, voice="Chelsie", input="Good morning.", response_format="pcm", max_tokens=60, seed=3)
    whole = client.audio.speech.create(
        model=MODEL,
        voice="Chelsie",
        input="Good morning.",
        response_format="pcm",
        extra_body=dict(max_tokens=60, seed=3),
    )
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(
        f"{address}/v1/audio/speech", json={**body, "stream_format": "sse"}, headers=headers, timeout=60
    )
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert b"".join(base64.b64decode(event.get("audio", "")) for event in events) == whole.read()
    assert [event["type"] for event in events][-1] == "speech.audio.done" and "words" not in events[-1]
    timed = {**body, "stream_format": "sse", "word_timestamps": True}
    answer = httpx.post(f"{address}/v1/audio/speech", json=timed, headers=headers, timeout=60)
    words = json.loads(answer.text.rstrip().splitlines()[-1].removeprefix("data: "))["words"]
    assert [word["word"] for word in words] == ["Good", "morning."]
    bare = httpx.post(f"{address}/v1/audio/speech", json={**body, "word_timestamps": True}, headers=headers)
    assert bare.status_code == 400 and "stream_format" in bare.json()["error"]["message"]


def test_transcription(client: OpenAI) -> None:
    path = requests.MEDIA / "speech.wav"
    with path.open("rb") as file:
        whole = client.audio.transcriptions.create(model=MODEL, file=file)
    with path.open("rb") as file:
        events = list(client.audio.transcriptions.create(model=MODEL, file=file, stream=True))
    assert events[-1].type == "transcript.text.done" and events[-1].text == whole.text
    with path.open("rb") as file:
        text = client.audio.transcriptions.create(model=MODEL, file=file, response_format="text")
    assert text == whole.text + "\n"


def test_voices(address: str, client: OpenAI) -> None:
    url = f"{address}/v1/audio/voices"
    with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        assert http.get(url).json()["voices"] == ["Chelsie", "Ethan"]
        data = (requests.MEDIA / "speech.wav").read_bytes()
        files = {"audio_sample": ("clip.wav", data)}
        refused = http.post(url, data={"name": "mine", "consent": ""}, files=files)
        assert refused.status_code == 400 and "consent" in refused.json()["error"]["message"]
        added = http.post(url, data={"name": "mine", "consent": CONSENT}, files=files)
        assert added.status_code == 200, added.text
        assert http.post(url, data={"name": "mine", "consent": CONSENT}, files=files).status_code == 409
        assert http.get(url).json()["voices"][-1] == "mine"
        options = dict(model=MODEL, input="Good morning.", response_format="pcm", extra_body={"max_tokens": 40})
        made = client.audio.speech.create(voice="mine", **options).read()
        assert made != client.audio.speech.create(voice="Chelsie", **options).read()
        assert http.delete(f"{url}/mine").json()["deleted"]
        assert http.delete(f"{url}/mine").status_code == 404
        assert http.delete(f"{url}/Chelsie").status_code == 409
        with pytest.raises(openai.BadRequestError, match="mine"):
            client.audio.speech.create(voice="mine", **options)


def test_batch(client: OpenAI, reply: Reply) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12}
    lines = [
        {"custom_id": "good", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "bad", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "max_tokens": 0}},
        {"custom_id": "good", "method": "POST", "url": "/v1/chat/completions", "body": body},
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("requests.jsonl", data), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"of": "a test"}
    )
    deadline = time.monotonic() + 60
    while batch.status not in ("completed", "failed") and time.monotonic() < deadline:
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed" and batch.output_file_id is not None and batch.error_file_id is not None
    counts = batch.request_counts
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (3, 1, 2)
    (answer,) = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == reply.text
    errors = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert {error["custom_id"] for error in errors} == {"good", "bad"}
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_media_of_every_kind(client: OpenAI) -> None:
    sound = base64.b64encode((requests.MEDIA / "speech.wav").read_bytes()).decode()
    picture = base64.b64encode((requests.MEDIA / "picture.jpg").read_bytes()).decode()
    parts = [
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
        {"type": "video_url", "video_url": {"url": (requests.MEDIA / "video.mp4").as_uri()}},
        {"type": "text", "text": "What is this?"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}], max_tokens=4)
    details = answer.usage.prompt_tokens_details if answer.usage else None
    assert details is not None and details.audio_tokens and details.image_tokens and details.video_tokens


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "gpt-5"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "colour"),
        ({"extra_body": {"stream": "yes"}}, openai.BadRequestError, "stream"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({**SPEECH, "audio": {"voice": "Nobody", "format": "wav"}}, openai.BadRequestError, "Nobody"),
        ({**SPEECH, "audio": {"voice": "Ethan", "format": "ogg"}}, openai.BadRequestError, "ogg"),
    ],
)
def test_what_cannot_be_served_is_told(
    client: OpenAI, change: dict[str, object], error: type[openai.APIStatusError], message: str
) -> None:
    with pytest.raises(error, match=message):
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "max_tokens": 4, **change})


def test_files_outside_of_the_folder_are_not_read(client: OpenAI, tmp_path: Path) -> None:
    part = {"type": "image_url", "image_url": {"url": str(tmp_path / "picture.png")}}
    with pytest.raises(openai.BadRequestError, match="not within"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [part]}])


def test_a_key_is_asked_for(address: str) -> None:
    with pytest.raises(openai.AuthenticationError):
        connect(address, "wrong").models.list()
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{address}/ready").json() == {"ready": True}


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "omni_jax"


def test_metrics_count(client: OpenAI, address: str) -> None:
    def read(name: str) -> float:
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    before = read("omni_replies_total")
    client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4)
    assert read("omni_replies_total") == before + 1
    # the path of the route, and nothing of what a request may hold
    counted = 'omni_responses_total{path="/v1/chat/completions",status="200"}'
    assert counted in httpx.get(f"{address}/metrics").text
    httpx.get(f"{address}/v1/models/gpt-5/secret", headers={"Authorization": f"Bearer {KEY}"})
    assert "secret" not in httpx.get(f"{address}/metrics").text
    assert read("omni_ttft_seconds_count") > 0 and read("omni_requests_open") == 0


def test_the_benchmark_asks_it(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out = tmp_path / "serve.json"
    picture = tmp_path / "serve.png"
    serve_benchmark(address, voice="Ethan", concurrency=(1, 3), requests=4, max_tokens=4, json_out=out, picture=picture)
    rounds = json.loads(out.read_text())["rounds"]
    assert [values["requests"] for values in rounds.values()] == [4, 4] and rounds["3"]["spoken"] > 0
    assert picture.stat().st_size > 1000
    assert "audio_ttfp_p50" in capsys.readouterr().out


def test_a_server_that_is_told_to_stop_finishes_what_it_has(tiny_model: Path) -> None:
    with serve_http(tiny_model, "--name", MODEL) as address:
        stream = connect(address).chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=64, stream=True, extra_body=EXTRA, **SPEECH
        )
        first = next(iter(stream))
        find_server(address).terminate()
        chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason is not None
    assert any(getattr(chunk.choices[0].delta, "audio", None) for chunk in chunks)


def test_an_address_that_is_taken_is_told_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve.main(["http", "--model", str(tmp_path), "--port", str(port)]) == 1
    assert f"--port {port}" in capsys.readouterr().err
