"""Which voices fit the recipe, and that the exit status says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from omni_jax.checkpoint.voice_recipe import check_recipe, compare_clip
from omni_jax.checkpoint.voices import Voice, load_voices, save_voices, write_spk_dict
from omni_jax.config import OmniConfig
from omni_jax.processing.speech_mel import LOG_FLOOR
from omni_jax.processing.voice_clip import VoiceClip, read_clip
from tools.check_voices import main

MEDIA = Path(__file__).parents[1] / "media"
SPEECH = MEDIA / "speech.wav"
TINY = OmniConfig.tiny()


@pytest.fixture(scope="module")
def clip() -> VoiceClip:
    return read_clip(SPEECH)


def make_voice(clip: VoiceClip, name: str = "Ada") -> Voice:
    cond = np.random.default_rng(0).standard_normal((1, TINY.token2wav_config.dit_config.enc_emb_dim), np.float32)
    return Voice(name, 611, cond / np.linalg.norm(cond), clip.mel[None])


def misfits(voice: Voice) -> list[str]:
    return [finding.part for finding in check_recipe(voice, TINY) if not finding.fits]


def test_a_voice_of_the_recipe_fits(clip: VoiceClip) -> None:
    assert misfits(make_voice(clip)) == []
    # numbers that were kept in bfloat16 fit too
    rounded = make_voice(clip).ref_mel.view(np.uint32) & np.uint32(0xFFFF0000)
    assert misfits(dataclasses.replace(make_voice(clip), ref_mel=rounded.view(np.float32))) == []


def change_log_base(mel: np.ndarray) -> np.ndarray:
    """The logarithm of base 10, floored at 1e-5 as well."""
    return mel / np.float32(np.log(10))


def floor_at(mel: np.ndarray, value: float) -> np.ndarray:
    return np.maximum(mel, np.float32(value))


def test_each_part_is_told(clip: VoiceClip) -> None:
    voice = make_voice(clip)
    mel = voice.ref_mel.copy()
    mel[0, :2] = LOG_FLOOR  # silence at the beginning, as recordings have it
    cases: Sequence[tuple[dict[str, object], list[str]]] = [
        ({"ref_mel": mel}, []),
        ({"bos_token": 640}, ["bos_token"]),
        ({"cond": 12 * voice.cond}, ["cond: length"]),
        ({"cond": np.zeros((1, 12), np.float32)}, ["cond: length"]),
        ({"cond": np.eye(1, 10, dtype=np.float32)}, ["cond: numbers"]),
        ({"ref_mel": mel[:, :40]}, ["ref_mel: length"]),
        ({"ref_mel": np.tile(mel, (1, 40, 1))}, ["ref_mel: length"]),
        ({"ref_mel": mel[:, :, :60]}, ["ref_mel: bins"]),
        # in decibels
        ({"ref_mel": 8.69 * mel}, ["ref_mel: values", "ref_mel: floor"]),
        ({"ref_mel": change_log_base(mel)}, ["ref_mel: floor"]),
        ({"ref_mel": floor_at(mel, -8)}, ["ref_mel: floor"]),
        # of samples of 16 bits that were not scaled
        ({"ref_mel": mel + np.float32(np.log(32768))}, ["ref_mel: values", "ref_mel: floor"]),
    ]
    for changes, expected in cases:
        assert misfits(dataclasses.replace(voice, **changes)) == expected, changes  # type: ignore[arg-type]


def test_a_clip_is_compared_with_its_sound(clip: VoiceClip) -> None:
    voice = make_voice(clip)
    assert compare_clip(voice, clip.mel).fits
    # the beginning of the sound is a clip of it, and its end is none
    assert compare_clip(dataclasses.replace(voice, ref_mel=voice.ref_mel[:, :120]), clip.mel).fits
    assert not compare_clip(dataclasses.replace(voice, ref_mel=voice.ref_mel[:, -120:]), clip.mel).fits
    assert not compare_clip(dataclasses.replace(voice, ref_mel=voice.ref_mel + 0.3), clip.mel).fits
    assert not compare_clip(voice, clip.mel[:100]).fits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, clip: VoiceClip) -> Path:
    """A checkpoint's voices and its configuration, of which one voice is of another recipe."""
    folder = tmp_path_factory.mktemp("voices")
    TINY.save(folder)
    save_voices(folder, {"Ada": make_voice(clip)})
    loud = dataclasses.replace(make_voice(clip, "Loud"), cond=make_voice(clip).cond * 3)
    write_spk_dict(folder / "spk_dict.pt", {"Ada": make_voice(clip), "Loud": loud})
    return folder


def test_the_exit_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    assert "all 1 voices fit the recipe" in capsys.readouterr().out
    assert main([str(folder), "--audio", f"Ada={SPEECH}"]) == 0
    assert main([str(folder), "--audio", f"Ada={MEDIA / 'speech2.mp3'}"]) == 1
    capsys.readouterr()
    assert main([str(folder / "spk_dict.pt")]) == 1
    out = capsys.readouterr().out
    assert "made in another way: Loud" in out and "3.0000" in out


def test_a_random_checkpoint_does_not_fit(tiny_model: Path) -> None:
    assert main([str(tiny_model)]) == 1
    assert "cond: length" in misfits(load_voices(tiny_model)["Ethan"])


def test_what_cannot_be_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.wav").write_bytes(b"no sound")
    for arguments, told in [
        ([str(tmp_path)], "config.json"),
        ([str(folder), "--audio", "Ada"], "--audio Ada is not NAME=CLIP.wav"),
        ([str(folder), "--audio", "Bob=x.wav"], "there is no voice 'Bob'; there are Ada"),
        ([str(folder), "--audio", f"Ada={tmp_path / 'none.wav'}"], "no such file"),
        ([str(folder), "--audio", f"Ada={tmp_path / 'no.wav'}"], "error: --audio Ada="),
    ]:
        assert main(arguments) == 2
        assert told in capsys.readouterr().err
