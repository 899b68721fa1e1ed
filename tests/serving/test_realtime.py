"""Realtime sessions as OpenAI's own client has them with the server."""

from __future__ import annotations

import base64
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import OpenAI
from openai.resources.realtime.realtime import RealtimeConnection

import omni_jax
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.processing.media import read_audio
from omni_jax.serving.realtime_audio import PCM_RATE
from omni_jax.serving.wav import pcm16
from tests.serving import requests
from tests.serving.http_client import connect, find_server, serve_http

MODEL = "omni"
SPEECH = read_audio(str(requests.MEDIA / "speech.wav"), MelSettings(sampling_rate=PCM_RATE))
PACKET = 2400  # 100 ms
MAX_GROWTH = 48 << 20  # bytes of the server, over eighty sessions
SHORT = {"max_output_tokens": 8, "talker": {"temperature": 0.0, "max_tokens": 40}}
LONG = {"max_output_tokens": 4000, "talker": {"temperature": 0.0, "max_tokens": 1000}}
TEXT: dict[str, Any] = {"output_modalities": ["text"], **SHORT}
BY_HAND: dict[str, Any] = {"audio": {"input": {"turn_detection": None}}}


@pytest.fixture(scope="module")
def address(tiny_model: Path) -> Iterator[str]:
    with serve_http(tiny_model, "--name", MODEL, "--sessions", "4") as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return connect(address)


def update(connection: RealtimeConnection, **session: Any) -> Any:
    connection.send({"type": "session.update", "session": {"type": "realtime", **session}})
    return wait(connection, "session.updated").session


def wait(connection: RealtimeConnection, kind: str, seen: list[Any] | None = None) -> Any:
    """The next event of a kind; those before it are put into a list."""
    deadline = time.monotonic() + 60
    while (seconds := deadline - time.monotonic()) > 0:
        # the client's own has no limit of time
        event = connection.parse_event(connection._connection.recv(timeout=seconds))
        assert kind == "error" or event.type != "error", event
        if event.type == kind:
            return event
        if seen is not None:
            seen.append(event)
    raise AssertionError(f"no {kind} came")


def push(connection: RealtimeConnection, samples: np.ndarray, **more: Any) -> None:
    data = base64.b64encode(pcm16(samples)).decode()
    connection.send({"type": "input_audio_buffer.append", "audio": data, **more})


def say(connection: RealtimeConnection, samples: np.ndarray) -> None:
    for begin in range(0, len(samples), PACKET):
        push(connection, samples[begin : begin + PACKET])


def with_silence(samples: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 1e-4, len(samples) + 2 * PCM_RATE).astype(np.float32)
    noise[PCM_RATE // 2 : PCM_RATE // 2 + len(samples)] += samples
    return noise


def quantized(samples: np.ndarray) -> np.ndarray:
    """As they come over the wire."""
    return np.frombuffer(pcm16(samples), "<i2").astype(np.float32) / 32768


def test_a_turn_by_hand_is_answered_as_in_this_process(client: OpenAI, model: omni_jax.OmniModel) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        assert wait(connection, "session.created").session.type == "realtime"
        update(connection, **SHORT, **BY_HAND)
        say(connection, SPEECH)
        connection.input_audio_buffer.commit()
        item_id = wait(connection, "input_audio_buffer.committed").item_id
        assert wait(connection, "conversation.item.done").item.id == item_id
        connection.response.create()
        seen: list[Any] = []
        done = wait(connection, "response.done", seen).response
    assert done.status in ("completed", "incomplete")
    kinds = [event.type for event in seen]
    for kind in ("response.created", "response.output_item.added", "response.content_part.added"):
        assert kind in kinds
    transcript = "".join(event.delta for event in seen if event.type == "response.output_audio_transcript.delta")
    data = b"".join(base64.b64decode(event.delta) for event in seen if event.type == "response.output_audio.delta")
    session = model.listen(
        [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}],
        modalities=("text", "audio"),
        max_tokens=8,
        talker=SHORT["talker"],
    )
    session.audio(quantized(SPEECH), PCM_RATE)
    *_, event = session.answer()
    assert event.reply is not None and event.reply.audio is not None
    assert transcript == event.reply.text == done.output[0].content[0].transcript
    assert len(data) == 2 * len(event.reply.audio)
    assert done.usage.output_token_details.audio_tokens == len(event.reply.codec_ids)


def test_the_server_takes_turns_and_is_interrupted(client: OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        wait(connection, "session.created")
        update(connection, **LONG)
        say(connection, with_silence(SPEECH))
        started = wait(connection, "input_audio_buffer.speech_started")
        assert abs(started.audio_start_ms - 200) < 400
        wait(connection, "input_audio_buffer.speech_stopped")
        item = wait(connection, "response.output_item.added").item
        wait(connection, "response.output_audio.delta")
        # somebody speaks over it
        say(connection, with_silence(SPEECH)[: PCM_RATE * 2])
        seen: list[Any] = []
        done = wait(connection, "response.done", seen).response
        assert done.status == "cancelled" and done.status_details.reason == "turn_detected"
        connection.conversation.item.truncate(item_id=item.id, content_index=0, audio_end_ms=0)
        wait(connection, "conversation.item.truncated")
        connection.conversation.item.retrieve(item_id=item.id)
        kept = wait(connection, "conversation.item.retrieved").item
        assert kept.status == "incomplete" and not kept.content[0].transcript
        # the turn that interrupted is answered in its turn
        update(connection, **SHORT)
        say(connection, np.zeros(2 * PCM_RATE, np.float32))
        assert wait(connection, "response.done").response.status in ("completed", "incomplete")


def test_an_answer_is_cancelled(client: OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        wait(connection, "session.created")
        update(connection, **LONG, **BY_HAND)
        create_message(connection, "Tell me a story.")
        connection.response.create()
        wait(connection, "response.output_audio.delta")
        connection.response.cancel()
        done = wait(connection, "response.done").response
        assert done.status == "cancelled" and done.status_details.reason == "client_cancelled"
        connection.response.cancel()
        assert "no answer" in wait(connection, "error").error.message


def create_message(connection: RealtimeConnection, *content: Any) -> None:
    parts = [{"type": "input_text", "text": part} if isinstance(part, str) else part for part in content]
    connection.conversation.item.create(item={"type": "message", "role": "user", "content": parts})
    wait(connection, "conversation.item.done")


def test_text_and_pictures(client: OpenAI, model: omni_jax.OmniModel) -> None:
    data = base64.b64encode((requests.MEDIA / "picture.jpg").read_bytes()).decode()
    url = f"data:image/jpeg;base64,{data}"
    with client.realtime.connect(model=MODEL) as connection:
        wait(connection, "session.created")
        update(connection, instructions="Be kind.", **TEXT, **BY_HAND)
        create_message(connection, {"type": "input_image", "image_url": url}, "What is this?")
        connection.response.create()
        seen: list[Any] = []
        done = wait(connection, "response.done", seen).response
    text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": parts}]
    assert text == model.generate(messages, max_tokens=8).text == done.output[0].content[0].text


def test_camera_frames_are_seen_with_the_sound(client: OpenAI) -> None:
    image = base64.b64encode((requests.MEDIA / "picture.png").read_bytes()).decode()
    with client.realtime.connect(model=MODEL) as connection:
        wait(connection, "session.created")
        update(connection, **TEXT, **BY_HAND)
        for begin in range(0, len(SPEECH), PACKET):
            if begin % (5 * PACKET) == 0:
                connection.send({"type": "input_image_buffer.append", "image": image})
            push(connection, SPEECH[begin : begin + PACKET])
        connection.input_audio_buffer.commit()
        connection.response.create()
        usage = wait(connection, "response.done").response.usage
    details = usage.input_token_details
    assert details.image_tokens > 0 and details.audio_tokens > 0


def test_a_transcript_of_the_turn(client: OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        wait(connection, "session.created")
        update(connection, audio={"input": {"turn_detection": None, "transcription": {"model": "any"}}}, **TEXT)
        say(connection, SPEECH)
        connection.input_audio_buffer.commit()
        event = wait(connection, "conversation.item.input_audio_transcription.completed")
        assert isinstance(event.transcript, str)


@pytest.mark.parametrize("audio_format", ["audio/pcmu", "audio/pcma"])
def test_sound_of_a_telephone(client: OpenAI, audio_format: str) -> None:
    form = {"type": audio_format}
    with client.realtime.connect(model=MODEL) as connection:
        wait(connection, "session.created")
        update(
            connection, **SHORT, audio={"input": {"turn_detection": None, "format": form}, "output": {"format": form}}
        )
        connection.send({"type": "input_audio_buffer.append", "audio": base64.b64encode(b"\x55" * 8000).decode()})
        connection.input_audio_buffer.commit()
        connection.response.create()
        seen: list[Any] = []
        done = wait(connection, "response.done", seen).response
        num_codes = done.usage.output_token_details.audio_tokens
    sizes = [len(base64.b64decode(event.delta)) for event in seen if event.type == "response.output_audio.delta"]
    assert num_codes and sum(sizes) == num_codes * 160  # 20 ms of 8 kHz, a byte each


def test_an_answer_apart_leaves_the_conversation(client: OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        wait(connection, "session.created")
        update(connection, **TEXT, **BY_HAND)
        own = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello?"}]}]
        connection.response.create(response={"conversation": "none", "input": own, "metadata": {"topic": "x"}})
        seen: list[Any] = []
        done = wait(connection, "response.done", seen).response
        assert done.metadata == {"topic": "x"} and done.conversation_id is None
        assert not [event for event in seen if event.type.startswith("conversation.")]
        connection.response.create()
        assert "nothing to answer" in wait(connection, "error").error.message


@pytest.mark.parametrize("fraction", [0.2])
def test_late_and_lost_packets_cost_themselves_alone(client: OpenAI, fraction: float) -> None:
    rng = np.random.default_rng(0)
    packets = [SPEECH[begin : begin + 480] for begin in range(0, len(SPEECH) - 480, 480)]
    order = [number for number in range(len(packets)) if rng.random() > fraction / 2]
    late = [number for number in order if rng.random() < fraction / 2]
    order.sort(key=lambda number: number + (5 if number in late else 0))
    with client.realtime.connect(model=MODEL) as connection:
        wait(connection, "session.created")
        update(connection, **SHORT, **BY_HAND)
        for number in order:
            push(connection, packets[number], sequence=number)
        connection.input_audio_buffer.commit()
        item = wait(connection, "conversation.item.done").item
        connection.conversation.item.retrieve(item_id=item.id)
        kept = wait(connection, "conversation.item.retrieved").item
        connection.response.create()
        assert wait(connection, "response.done").response.status in ("completed", "incomplete")
    received = np.frombuffer(base64.b64decode(kept.content[0].audio), "<i2").reshape(-1, 480)
    first = order[0]
    assert len(received) == len(packets) - first or len(received) == order[-1] - first + 1
    for place, samples in enumerate(received):
        wanted = np.frombuffer(pcm16(packets[first + place]), "<i2")
        is_lost = first + place not in order
        assert (samples == 0).all() if is_lost else np.abs(samples - wanted).max() <= 1


@pytest.mark.parametrize(
    "event, message",
    [
        ("nothing", "JSON"),
        ("[]", "object"),
        ("{}", "type"),
        ('{"type": "response.shout"}', "response.shout"),
        ('{"type": "input_audio_buffer.append", "audio": 3}', "audio"),
        ('{"type": "input_audio_buffer.append", "audio": "!!"}', "base64"),
        ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "two each"),
        ('{"type": "input_audio_buffer.commit"}', "empty"),
        ('{"type": "conversation.item.delete", "item_id": "x"}', "item_id"),
        ('{"type": "conversation.item.create", "item": {"role": "user"}}', "content"),
        ('{"type": "session.update", "session": {"audio": {"output": {"voice": "Nobody"}}}}', "Nobody"),
        ('{"type": "response.cancel"}', "no answer"),
    ],
)
def test_what_is_wrong_is_told_and_the_session_goes_on(client: OpenAI, event: str, message: str) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        wait(connection, "session.created")
        connection._connection.send(event)
        assert message in wait(connection, "error").error.message
        update(connection, **TEXT)


def test_an_unknown_model_is_refused(client: OpenAI) -> None:
    with pytest.raises(Exception, match="1008"), client.realtime.connect(model="gpt-5") as connection:
        connection.recv()


def read_metric(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sessions_that_are_dropped_leave_nothing(address: str, client: OpenAI) -> None:
    """A hundred, some of them without a word; nor does memory grow from the twentieth to the last."""
    rng = np.random.default_rng(0)
    server = find_server(address)
    size = 0
    for number in range(100):
        if number == 20:
            size = server.memory_info().rss
        # what was cut off cannot be closed in order
        with contextlib.suppress(OSError), client.realtime.connect(model=MODEL) as connection:
            steps: list[Callable[[RealtimeConnection], Any]] = [
                lambda connection: wait(connection, "session.created"),
                lambda connection: update(connection, **LONG, **BY_HAND),
                lambda connection: say(connection, SPEECH[:PCM_RATE]),
                lambda connection: connection.input_audio_buffer.commit(),
                lambda connection: connection.response.create(),
                lambda connection: wait(connection, "response.output_audio_transcript.delta"),
            ]
            for step in steps[: int(rng.integers(len(steps) + 1))]:
                step(connection)
            if number % 2:
                # as of a client that has lost its network
                connection._connection.socket.shutdown(socket.SHUT_RDWR)
    for name in ("omni_sessions_open", "omni_slots_used", "omni_requests_open", "omni_requests_waiting"):
        wait_until(lambda name=name: read_metric(address, name) == 0)
    assert server.memory_info().rss - size < MAX_GROWTH


def test_no_more_sessions_than_are_allowed(address: str, client: OpenAI) -> None:
    wait_until(lambda: read_metric(address, "omni_sessions_open") == 0)
    managers = [client.realtime.connect(model=MODEL) for _ in range(4)]
    connections = [manager.enter() for manager in managers]
    try:
        for connection in connections:
            wait(connection, "session.created")
        with pytest.raises(Exception, match="1013"), client.realtime.connect(model=MODEL) as refused:
            refused.recv()
    finally:
        for connection in connections:
            connection.close()
