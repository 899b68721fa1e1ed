from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from omni_jax.checkpoint import torch_file, voices
from omni_jax.checkpoint.voices import Voice
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError

TINY = OmniConfig.tiny()


def voice(name: str = "Ethan", bos_token: int = 611, width: int = 12, frames: int = 9, bands: int = 80) -> Voice:
    rng = np.random.default_rng(frames)
    cond = rng.standard_normal((1, width), dtype=np.float32)
    return Voice(name, bos_token, cond, rng.standard_normal((1, frames, bands), dtype=np.float32))


def same(a: dict[str, Voice], b: dict[str, Voice]) -> bool:
    return list(a) == list(b) and all(a[name].equals(b[name]) for name in a)


VOICES = {"Ethan": voice(), "Ünal/../x": voice("Ünal/../x", 5, frames=5), "Chelsie": voice("Chelsie", 613, frames=7)}


def test_the_published_file_is_read_and_written(tmp_path: Path) -> None:
    voices.write_spk_dict(tmp_path / "spk_dict.pt", VOICES)
    assert same(voices.read_spk_dict(tmp_path / "spk_dict.pt"), VOICES)


def test_our_file_is_read_and_written(tmp_path: Path) -> None:
    voices.save_voices(tmp_path, VOICES)
    voices.save_voices(tmp_path, VOICES)
    assert [p.name for p in tmp_path.iterdir()] == ["voices.npz"]
    assert same(voices.load_voices(tmp_path), VOICES)


def test_other_numbers_are_not_the_same() -> None:
    assert not voice().equals(voice(bos_token=1))
    assert not voice().equals(voice("Chelsie"))
    assert not voice().equals(voice(frames=8))
    assert not voice().equals(dataclasses.replace(voice(), cond=voice().cond + 1))


def test_random_checkpoints_have_the_published_voices(tiny_model: Path) -> None:
    found = voices.load_voices(tiny_model)
    assert list(found) == ["Chelsie", "Ethan"]
    assert [v.ref_mel.shape for v in found.values()] == [(1, 37, 80), (1, 52, 80)]
    assert same(found, voices.read_spk_dict(tiny_model / "spk_dict.pt"))
    published = OmniConfig.qwen2_5_omni_7b().talker_config
    shift = published.tts_text_pad_token_id - TINY.talker_config.tts_text_pad_token_id
    assert [v.bos_token + shift for v in found.values()] == [151872, 151870]


def test_choosing() -> None:
    assert voices.choose(VOICES, "Ethan").name == "Ethan"
    assert voices.choose(VOICES).name == "Chelsie"
    assert voices.choose({"Ethan": voice(), "Ada": voice("Ada")}).name == "Ethan"
    with pytest.raises(InputError, match=r"voice 'ethan' is unknown; this checkpoint has Ethan, Ünal/../x, Chelsie"):
        voices.choose(VOICES, "ethan")


def raw(path: Path, **changes: Any) -> Path:
    """A published file of one voice, in which some entries are others."""
    entry = {"bos_token": 611, "cond": voice().cond, "ref_mel": voice().ref_mel} | changes
    torch_file.write(path, {"Ethan": {key: value for key, value in entry.items() if value is not None}})
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats_become_float32(tmp_path: Path, dtype: Any) -> None:
    found = voices.read_spk_dict(raw(tmp_path / "x.pt", cond=np.array([[0.5, -2]], dtype)))["Ethan"]
    assert found.cond.dtype == np.float32
    np.testing.assert_array_equal(found.cond, [[0.5, -2]])


@pytest.mark.parametrize("token", [np.array(611), np.array([611], np.int32), np.array([[611]], np.int16)])
def test_a_token_may_be_a_tensor_of_one(tmp_path: Path, token: np.ndarray) -> None:
    assert voices.read_spk_dict(raw(tmp_path / "x.pt", bos_token=token))["Ethan"].bos_token == 611


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cond": None}, "must have bos_token, cond, ref_mel; it has bos_token, ref_mel"),
        ({"speed": 2}, "it has bos_token, cond, ref_mel, speed"),
        ({"cond": "loud"}, "cond that is no tensor of floats but a str"),
        ({"ref_mel": {}}, "ref_mel that is no tensor of floats but a dict"),
        ({"ref_mel": np.ones((1, 9, 80), np.int64)}, "no tensor of floats but a tensor int64[1, 9, 80]"),
        ({"cond": np.ones(12, np.float32)}, "cond of shape [12]; it must be [1, width]"),
        (
            {"ref_mel": np.ones((2, 9, 80), np.float32)},
            "ref_mel of shape [2, 9, 80]; it must be [1, frames, mel bands]",
        ),
        ({"cond": np.full((1, 12), np.nan, np.float32)}, "not finite"),
        ({"cond": np.full((1, 12), 1e300)}, "not finite"),
        ({"bos_token": -1}, "no token id but the number -1"),
        ({"bos_token": True}, "no token id but a bool"),
        ({"bos_token": np.ones(1, np.float32)}, "no token id but a tensor float32[1]"),
        ({"bos_token": np.array([1, 2])}, "no token id but a tensor int64[2]"),
    ],
)
def test_what_is_no_voice_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError) as e:
        voices.read_spk_dict(raw(tmp_path / "x.pt", **changes))
    assert told in str(e.value) and "voice 'Ethan'" in str(e.value) and str(tmp_path / "x.pt") in str(e.value)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({}, "holds no voices"),
        ({"Ethan": 3}, "it has the number 3"),
        ({"": {}}, "''"),
        ({"a\nb": {}}, r"'a\nb'"),
        ({"x" * 101: {}}, f"'{'x' * 100}'...; a name has 1 to 100 printable characters"),
    ],
)
def test_what_is_no_dictionary_of_voices_is_told(tmp_path: Path, value: Any, told: str) -> None:
    torch_file.write(tmp_path / "x.pt", value)
    with pytest.raises(CheckpointError) as e:
        voices.read_spk_dict(tmp_path / "x.pt")
    assert told in str(e.value)


def test_a_voice_that_does_not_fit_the_model_is_told(tmp_path: Path) -> None:
    voices.check(VOICES, TINY, tmp_path)
    for wrong, told in [
        (voice(bos_token=640), "bos_token 640, but the vocabulary has 640 ids"),
        (voice(width=192), r"cond \[1, 192\], but config.json makes it \[1, 12\]"),
        (voice(bands=128), r"ref_mel \[1, 9, 128\], but config.json makes it \[1, 5 or more, 80\]"),
        (voice(frames=4), r"ref_mel \[1, 4, 80\], but config.json makes it \[1, 5 or more, 80\]"),
    ]:
        with pytest.raises(CheckpointError, match=told):
            voices.check({"Ethan": wrong}, TINY, tmp_path)


def test_a_checkpoint_without_voices_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no voices[\s\S]*to-jax makes it of the published spk_dict.pt"):
        voices.load_voices(tmp_path)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "voices.npz"
    voices.save_voices(tmp_path, VOICES)
    whole = path.read_bytes()
    for damaged in (b"", b"nothing", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            voices.load_voices(tmp_path)
    np.savez(path, names=np.array(["Ethan"]))
    with pytest.raises(CheckpointError, match="damaged"):
        voices.load_voices(tmp_path)
    np.savez(path, names=np.array([voice()], object), bos_tokens=np.array([1]))
    with pytest.raises(CheckpointError, match="damaged"):
        voices.load_voices(tmp_path)
    voices.save_voices(tmp_path, {})
    with pytest.raises(CheckpointError, match="holds no voice"):
        voices.load_voices(tmp_path)
