"""Lines of a batch that bring their voice along: what is read, from where, and what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax
from omni_jax import SPEECH_SYSTEM_PROMPT, ClonedVoice
from omni_jax.engine.request import SchedulerConfig
from omni_jax.errors import InputError
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.serving.batch_runner import BatchRunner, FileLocations, RunStatus
from omni_jax.serving.chat_request import parse_body
from omni_jax.serving.media_roots import MediaRoots
from tests.serving import requests
from tests.serving.test_batch_cases import answer, as_lines, error_of

VECTOR = [0.0] * 11 + [1.0]
TALKER = dict(temperature=0, repetition_penalty=2.0, max_tokens=16)
# the sound of an answer has 16 bits
SAMPLE_TOLERANCE = 1.5 / 32768


def make_line(custom_id: str, voice: Any) -> str:
    body = dict(modalities=["text", "audio"], audio={"voice": voice, "format": "pcm16"}, max_completion_tokens=6)
    return requests.line(
        custom_id, "Who is it?", **body, sampling_params_list=[{"temperature": 0}, TALKER, {"seed": 3}]
    )


@pytest.fixture(scope="module")
def runner(model: omni_jax.OmniModel, media_workers: MediaWorkers) -> BatchRunner:
    locations = FileLocations(MediaRoots((str(requests.MEDIA),), str(requests.MEDIA.parent)))
    return BatchRunner(model, "m", media_workers, SchedulerConfig(4, 4), locations, RunStatus())


def samples_of(values: dict[str, Any]) -> np.ndarray:
    assert values["error"] is None, values
    data = values["response"]["body"]["choices"][0]["message"]["audio"]["data"]
    return np.frombuffer(base64.b64decode(data), np.int16) / 32768


def test_lines_bring_clips(runner: BatchRunner, model: omni_jax.OmniModel) -> None:
    speech = (requests.MEDIA / "speech.wav").read_bytes()
    url = f"data:audio/wav;base64,{base64.b64encode(speech).decode()}"
    lines = [
        make_line("path", {"ref_audio": "media/speech.wav", "like": "Ethan", "speaker_vector": VECTOR}),
        make_line("url", {"ref_audio": url, "like": "Ethan", "ref_text": None, "speaker_vector": VECTOR}),
        make_line("other", {"ref_audio": "media/speech2.mp3", "like": "Ethan", "speaker_vector": VECTOR}),
        make_line("name", "Ethan"),
    ]
    results = {name: samples_of(values) for name, values in answer(runner, as_lines(*lines)).items()}
    question = [
        {"role": "system", "content": SPEECH_SYSTEM_PROMPT},
        {"role": "user", "content": "Who is it?"},
    ]
    voice = ClonedVoice(requests.MEDIA / "speech.wav", like="Ethan", speaker_vector=VECTOR)
    options: dict[str, Any] = dict(max_tokens=6, modalities=("text", "audio"), talker=TALKER, noise_seed=3)
    expected = model.generate(question, voice=voice, **options).audio
    assert expected is not None and len(expected)
    np.testing.assert_allclose(results["path"], expected, atol=SAMPLE_TOLERANCE + 1e-3)
    np.testing.assert_allclose(results["url"], results["path"], atol=SAMPLE_TOLERANCE + 1e-3)
    # one code sequence, in three voices
    for name in ("other", "name"):
        assert results[name].shape == expected.shape
        assert np.abs(results[name] - expected).max() > 1e-2


def test_what_costs_its_line_alone(runner: BatchRunner, tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes((requests.MEDIA / "speech.wav").read_bytes())
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "missing": ({"ref_audio": "media/nothing.wav"}, "no such file"),
        "outside": ({"ref_audio": str(tmp_path / "secret.wav")}, "audio.voice.ref_audio: "),
        "above": ({"ref_audio": "../README.md"}, "is not within"),
        "file url": ({"ref_audio": f"file://{tmp_path}/secret.wav"}, "is not within"),
        "web": ({"ref_audio": "http://127.0.0.1:1/x.wav"}, "fetching from the web is off"),
        "picture": ({"ref_audio": "media/picture.png"}, "ref_audio ('"),
        "silent": ({"ref_audio": "media/silent.mp4"}, "it has no sound"),
        "text": ({"ref_audio": "media/speech.wav", "ref_text": "hello"}, "ref_text needs a speech tokenizer"),
        "like": ({"ref_audio": "media/speech.wav", "like": "Eve"}, "voice 'Eve' is unknown"),
    }
    lines = [make_line("good", "Ethan")]
    for name, (voice, _) in cases.items():
        lines.append(make_line(name, {**voice, "speaker_vector": VECTOR}))
    lines.append(make_line("no vector", {"ref_audio": "media/speech.wav"}))
    results = answer(runner, as_lines(*lines))
    assert len(samples_of(results["good"]))
    for name, (_, message) in cases.items():
        assert message in error_of(results[name]), name
    assert "there is no speaker vector" in error_of(results["no vector"])
    assert results["missing"]["error"]["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("voice", "message"),
    [
        ({}, "audio.voice.ref_audio is None; it must be a path or a URL"),
        ({"ref_text": "hello"}, "audio.voice.ref_audio is None"),
        ({"ref_audio": 3}, "audio.voice.ref_audio is 3"),
        ({"ref_audio": "a.wav", "sampling_rate": 16000}, "unknown field of audio.voice sampling_rate"),
        ({"ref_audio": "a.wav", "speaker_vector": "loud"}, "audio.voice.speaker_vector is 'loud'"),
        ({"ref_audio": "a.wav", "speaker_vector": [0] * 5000}, "it must be a list of numbers"),
        ({"ref_audio": "a.wav", "ref_text": 7}, "voice: ref_text is 7"),
        ({"id": {"ref_audio": "a.wav"}}, "it must be a name, or a clip with its ref_audio"),
        (7, "body: audio.voice is 7; it must be a name, or a clip with its ref_audio"),
    ],
)
def test_a_body_that_brings_no_voice(voice: Any, message: str) -> None:
    with pytest.raises(InputError) as e:
        parse_body(json.loads(make_line("x", voice))["body"])
    assert message in str(e.value)
