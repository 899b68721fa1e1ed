"""OmniModel speaking, as its users meet it, on a small random model."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax
from omni_jax import SPEECH_SYSTEM_PROMPT
from omni_jax.checkpoint.convert import to_jax
from omni_jax.errors import CheckpointError, InputError
from omni_jax.generation.model import OmniModel
from omni_jax.models.ode_solver import Solver

SPEAK: dict[str, Any] = dict(max_tokens=8, modalities=("text", "audio"))
# so that random replies end at different places
SPEAK["talker"] = dict(max_tokens=40, temperature=0.3, top_k=0, top_p=1.0)
SAMPLES_A_CODE = 480
# float32 through 36 evaluations and the vocoder's waves, summed in another order for another batch
TOLERANCE = 1e-3


def ask(*content: Any) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, {"role": "user", "content": parts}]


PICTURE = {"type": "image", "image": np.arange(56 * 84 * 3, dtype=np.uint8).reshape(56, 84, 3)}
SOUND = {"type": "audio", "audio": np.sin(np.arange(8_000) * 0.1).astype(np.float32), "sampling_rate": 16_000}
QUESTIONS = [ask("hello"), ask("a longer question " * 8), ask(PICTURE, "what?"), ask(SOUND), ask("b", SOUND, PICTURE)]
QUESTIONS += [ask(f"number {i}") for i in range(3)]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> OmniModel:
    return omni_jax.load(tiny_model)


def test_eight_replies_at_once_equal_single_ones(model: OmniModel) -> None:
    single = [model.generate(q, **SPEAK) for q in QUESTIONS]
    assert len({len(r.codec_ids) for r in single}) > 1  # of unequal lengths
    for reply in single:
        assert reply.audio is not None and reply.audio.dtype == np.float32
        assert len(reply.audio) == SAMPLES_A_CODE * len(reply.codec_ids)
        assert np.abs(reply.audio).max(initial=0) <= 1
    together = model.generate_batch(QUESTIONS, **SPEAK)
    assert [r.token_ids for r in together] == [r.token_ids for r in single]
    assert [r.codec_ids for r in together] == [r.codec_ids for r in single]
    for a, b in zip(together, single, strict=True):
        assert a.audio is not None and b.audio is not None
        assert np.abs(a.audio - b.audio).max(initial=0) < TOLERANCE


def test_a_checkpoint_says_how_its_flow_is_integrated(tiny_model: Path, tmp_path: Path) -> None:
    distilled = Solver("euler", 4, guidance=False)
    folder = Path(shutil.copytree(tiny_model, tmp_path / "distilled"))
    (folder / "token2wav.json").write_text(distilled.to_json())
    engine = omni_jax.load(folder).engines.token2wav
    assert engine is not None and engine.solver == distilled
    changed = omni_jax.load(folder, token2wav={"steps": 2}).engines.token2wav
    assert changed is not None and changed.solver == Solver("euler", 2, guidance=False)
    with pytest.raises(InputError, match="guidance is no option of token2wav"):
        omni_jax.load(folder, token2wav={"guidance": True})


def test_a_checkpoint_says_how_codes_are_drawn(model: OmniModel, tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "neutral"))
    drawn = {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    path = folder / "generation_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **{f"talker_{name}": value for name, value in drawn.items()}}))
    neutral = omni_jax.load(folder)

    def speak(asked: OmniModel, **talker: Any) -> tuple[int, ...]:
        options = {**SPEAK, "talker": {"max_tokens": 40, **talker}}
        return asked.generate(QUESTIONS[0], **options).codec_ids

    codes = speak(neutral)
    assert codes == speak(model, **drawn)
    assert codes != speak(model)  # as published
    # a request says otherwise
    assert speak(neutral, temperature=0.0) == speak(model, **{**drawn, "temperature": 0.0}) != codes


def test_text_is_the_same_with_and_without_speech(model: OmniModel) -> None:
    spoken, silent = model.generate(QUESTIONS[2], **SPEAK), model.generate(QUESTIONS[2], max_tokens=8)
    assert spoken.token_ids == silent.token_ids
    assert (silent.codec_ids, silent.audio) == ((), None)


def test_the_stream_adds_up_to_the_reply(model: OmniModel) -> None:
    events = list(model.stream(QUESTIONS[0], **SPEAK))
    reply = events[-1].reply
    assert reply is not None and reply.audio is not None
    assert "".join(e.text or "" for e in events) == reply.text
    assert np.array_equal(np.concatenate([e.audio for e in events if e.audio is not None]), reply.audio)


def test_a_reply_of_one_token_is_silent(model: OmniModel) -> None:
    reply = model.generate(QUESTIONS[0], **{**SPEAK, "max_tokens": 1})
    assert reply.codec_ids == ()
    assert reply.audio is not None and reply.audio.shape == (0,)


def test_seeds_and_voices_differ(model: OmniModel) -> None:
    chelsie = model.generate(QUESTIONS[0], **SPEAK, voice="Chelsie")
    again = model.generate(QUESTIONS[0], **SPEAK)
    ethan = model.generate(QUESTIONS[0], **SPEAK, voice="Ethan")
    assert chelsie == again and np.array_equal(chelsie.audio, again.audio)  # type: ignore[arg-type]
    assert not np.array_equal(chelsie.audio, ethan.audio)  # type: ignore[arg-type]
    other = model.generate(QUESTIONS[0], **{**SPEAK, "talker": {**SPEAK["talker"], "seed": 5}})
    assert other.codec_ids != chelsie.codec_ids


def test_synthesize(model: OmniModel) -> None:
    codes = [1, 2, 3, 60]
    wav = model.synthesize(codes, voice="Ethan", seed=3)
    assert wav.shape == (SAMPLES_A_CODE * 4,)
    assert np.array_equal(wav, model.synthesize(np.array(codes), voice="Ethan", seed=3))
    noise = np.random.default_rng(0).standard_normal((8, 80)).astype(np.float32)
    given = model.synthesize(codes, voice="Ethan", noise=noise)
    assert np.array_equal(given, model.synthesize(codes, voice="Ethan", noise=noise, seed=9))
    assert np.abs(given - wav).max() > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codec_ids": []}, "codes must have at least one integer, got none"),
        ({"codec_ids": [66]}, "code 66 is out of range; Token2Wav knows 0 to 65"),
        ({"codec_ids": [-1]}, "code -1 is out of range"),
        ({"codec_ids": [0] * 16385}, "16385 codes; Token2Wav takes at most 16384"),
        ({"codec_ids": [1], "noise": np.zeros((3, 80), np.float32)}, "noise has shape [3, 80]; 1 codes need [2, 80]"),
        ({"codec_ids": [1], "voice": "Nobody"}, "voice 'Nobody' is unknown; this checkpoint has Chelsie, Ethan"),
    ],
)
def test_what_cannot_be_synthesized(model: OmniModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        model.synthesize(**arguments)


def test_an_unknown_voice_matters_only_if_speech_is_asked_for(model: OmniModel) -> None:
    with pytest.raises(InputError, match="voice 'Nobody' is unknown; this checkpoint has Chelsie, Ethan"):
        model.generate(QUESTIONS[0], **SPEAK, voice="Nobody")
    assert model.generate(QUESTIONS[0], max_tokens=2, voice="Nobody").token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": ("text", "smell")}, "modalities is ('text', 'smell'); it must be"),
        ({"modalities": "audio"}, "modalities is 'audio'; it must be"),
        ({**SPEAK, "talker": 3}, "talker is 3; it must be a dict of options"),
        ({**SPEAK, "talker": {"speed": 2}}, "unknown talker option speed; known: temperature"),
        ({**SPEAK, "talker": {"top_p": 0}}, "talker top_p is 0; it must be above 0"),
    ],
)
def test_a_wrong_option_of_speech(model: OmniModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        model.generate(QUESTIONS[0], **options)


def test_another_system_prompt_warns(model: OmniModel) -> None:
    with pytest.warns(UserWarning, match=r"omni_jax\.SPEECH_SYSTEM_PROMPT") as found:
        model.generate(QUESTIONS[0][1:], **SPEAK)
        model.generate_batch([QUESTIONS[0][1:]], **SPEAK)
        model.listen(QUESTIONS[0][1:], modalities=("text", "audio"))
    assert [warning.filename for warning in found] == [__file__] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(QUESTIONS[0], **SPEAK)
        model.generate(QUESTIONS[0][1:], max_tokens=2)


def test_a_model_without_its_voice(tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    silent = omni_jax.load(tiny_model, components=("thinker",))
    to_jax(tiny_checkpoint, tmp_path / "silent", components=["thinker"])
    for model in (silent, omni_jax.load(tmp_path / "silent")):
        assert model.generate(QUESTIONS[0], max_tokens=2).token_ids
        with pytest.raises(InputError, match=r"speech needs talker and token2wav, .*convert and load all components"):
            model.generate(QUESTIONS[0], **SPEAK)
        with pytest.raises(InputError, match="speech needs talker and token2wav"):
            model.synthesize([1])
    with pytest.raises(CheckpointError, match="talker was asked for; nothing goes without thinker"):
        omni_jax.load(tiny_model, components=("talker",))
