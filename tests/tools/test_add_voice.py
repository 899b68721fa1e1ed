"""Voices are added with a statement of consent, and removed with it; the others keep every bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import omni_jax
from omni_jax.checkpoint.export import to_hf
from omni_jax.checkpoint.voices import VOICES_FILE, Voice, load_voices, read_spk_dict
from omni_jax.processing.voice_clip import read_clip
from tests.speaker_model import write_speaker_model
from tools.add_voice import main
from tools.check_voices import main as check_voices

MEDIA = Path(__file__).parents[1] / "media"
CONSENT = "Ada Example agreed in writing on 2026-11-02 to a voice for this test, in English, until withdrawn."
CONSENT_FILE = "voices.consent.json"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    np.save(tmp_path / "ada.npy", np.arange(1.0, 13.0))
    return tmp_path / "ada.npy"


def arguments(model: Path, vector: Path, *others: str, name: str = "Ada", consent: str | None = CONSENT) -> list[str]:
    given = [str(model), "--name", name, "--audio", str(MEDIA / "speech.wav"), "--text", "what it says"]
    given += ["--speaker-vector", str(vector), *others]
    return given if consent is None else [*given, "--consent", consent]


def bits(voice: Voice) -> tuple[int, bytes, bytes]:
    return voice.bos_token, voice.cond.tobytes(), voice.ref_mel.tobytes()


def test_a_voice_is_added_beside_the_others(model: Path, vector: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_voices(model)
    main(arguments(model, vector, "--like", "Ethan"))
    assert "Ada added, token 611, a clip of" in capsys.readouterr().out
    after = load_voices(model)
    assert list(after) == [*before, "Ada"]
    for name, voice in before.items():
        assert bits(after[name]) == bits(voice)
    ada = after["Ada"]
    expected = np.arange(1.0, 13.0) / np.linalg.norm(np.arange(1.0, 13.0))
    np.testing.assert_allclose(ada.cond[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(ada.ref_mel[0], read_clip(MEDIA / "speech.wav").mel)
    record = json.loads((model / CONSENT_FILE).read_text())["Ada"]
    assert record["consent"] == CONSENT and record["text"] == "what it says" and record["like"] == "Ethan"
    assert (record["clip"], record["speaker_vector"], record["bos_token"]) == ("speech.wav", "ada.npy", 611)
    # the model speaks in it, and the recipe fits it
    assert omni_jax.load(model).synthesize([1, 2], voice="Ada").shape == (960,)
    assert check_voices([str(model), "--audio", f"Ada={MEDIA / 'speech.wav'}"]) == 1  # of the random voices
    rows = [line for line in capsys.readouterr().out.splitlines() if " Ada " in line]
    assert len(rows) == 8 and not any("does not fit" in row for row in rows)


def test_a_token_of_its_own(model: Path, vector: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(model, vector, "--own-token"))
    main(arguments(model, vector, "--own-token", name="Bea"))
    voices = load_voices(model)
    # behind those of the voices that are there
    assert [voices[name].bos_token for name in ("Chelsie", "Ethan", "Ada", "Bea")] == [613, 611, 614, 615]
    assert "the embedding of this token is untrained" in capsys.readouterr().out
    assert json.loads((model / CONSENT_FILE).read_text())["Bea"]["like"] is None


def test_the_first_voice_of_a_checkpoint(model: Path, vector: Path) -> None:
    """One that was trained from nothing; and its clips, where Token2Wav knows no speaker vectors."""
    (model / VOICES_FILE).unlink()
    given = [argument for argument in arguments(model, vector) if argument not in ("--speaker-vector", str(vector))]
    with pytest.raises(SystemExit, match="no voice yet that this one could begin like; give --own-token"):
        main([*given, "--no-speaker-vector"])
    with pytest.raises(SystemExit, match="one of --speaker-vector, --speaker-model and --no-speaker-vector"):
        main([*given, "--own-token"])
    main([*given, "--no-speaker-vector", "--own-token"])
    (ada,) = load_voices(model).values()
    assert ada.name == "Ada" and ada.bos_token == 603 and not ada.cond.any() and ada.ref_mel.shape[1] > 100
    assert json.loads((model / CONSENT_FILE).read_text())["Ada"]["speaker_vector"] is None
    clip = {"ref_audio": str(MEDIA / "speech.wav")}
    loaded = omni_jax.load(model)
    np.testing.assert_array_equal(loaded.synthesize([1, 2], voice=clip), loaded.synthesize([1, 2], voice="Ada"))


def test_a_new_folder_leaves_the_old_one(model: Path, vector: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    out = tmp_path / "out"
    main(arguments(model, vector, "--out", str(out)))
    assert {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()} == before
    assert "Ada" in load_voices(out) and (out / CONSENT_FILE).is_file()
    assert omni_jax.load(out).synthesize([1], voice="Ada").shape == (480,)
    with pytest.raises(SystemExit, match="exists already"):
        main(arguments(model, vector, "--out", str(out)))


def test_the_statement_goes_to_pytorch_and_is_removed(model: Path, vector: Path, tmp_path: Path) -> None:
    before = load_voices(model)
    main(arguments(model, vector))
    to_hf(model, tmp_path / "published")
    assert list(read_spk_dict(tmp_path / "published" / "spk_dict.pt")) == [*before, "Ada"]
    assert json.loads((tmp_path / "published" / CONSENT_FILE).read_text())["Ada"]["consent"] == CONSENT
    main([str(model), "--name", "Ada", "--remove"])
    assert {name: bits(voice) for name, voice in load_voices(model).items()} == {
        name: bits(voice) for name, voice in before.items()
    }
    assert not (model / CONSENT_FILE).exists()
    with pytest.raises(SystemExit, match="voice 'Ada' is unknown; this checkpoint has Chelsie, Ethan"):
        main([str(model), "--name", "Ada", "--remove"])
    main([str(model), "--name", "Ethan", "--remove"])
    with pytest.raises(SystemExit, match="'Chelsie' is the only voice"):
        main([str(model), "--name", "Chelsie", "--remove"])


def test_a_speaker_model_makes_the_vector(model: Path, vector: Path, tmp_path: Path) -> None:
    onnx = write_speaker_model(tmp_path / "speaker.onnx")
    given = arguments(model, vector)
    index = given.index("--speaker-vector")
    main([*given[:index], "--speaker-model", str(onnx), *given[index + 2 :]])
    assert np.linalg.norm(load_voices(model)["Ada"].cond) == pytest.approx(1)
    assert json.loads((model / CONSENT_FILE).read_text())["Ada"]["speaker_vector"] == "speaker.onnx"


def test_what_is_refused_leaves_no_trace(model: Path, vector: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    np.save(tmp_path / "short.npy", np.ones(3))
    (tmp_path / "no.npy").write_bytes(b"no array")
    for given, told in [
        (arguments(model, vector, consent=None), "no voice is added without the consent of the person"),
        (arguments(model, vector, consent="  "), "no voice is added without the consent of the person"),
        (arguments(model, vector, name="Ethan"), "has a voice 'Ethan' already"),
        (arguments(model, vector, name="a\nb"), r"'a\\nb' is no name of a voice"),
        (arguments(model, vector, "--like", "Eve"), "voice 'Eve' is unknown"),
        (arguments(model, vector, "--like", "Ethan", "--own-token"), "give one of them"),
        (arguments(model, tmp_path / "short.npy"), r"gives float64\[3\]; a speaker vector is \[12\]"),
        (arguments(model, tmp_path / "no.npy"), "is no array of numpy's"),
        (arguments(model, vector, "--speaker-model", "x.onnx"), "give one of --speaker-vector, --speaker-model and"),
        (arguments(model, vector, "--audio", str(MEDIA / "silent.mp4")), "it has no sound"),
        (arguments(model, vector, "--text", ""), "give the clip, --audio CLIP.wav, and what it says"),
        (arguments(tmp_path, vector), "is no checkpoint of omni_jax"),
    ]:
        with pytest.raises(SystemExit, match=told):
            main(given)
    assert {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()} == before


def test_a_checkpoint_of_a_run_is_not_changed_in_place(model: Path, vector: Path, tmp_path: Path) -> None:
    (model / "files.json").write_text("{}")
    (model / "run.json").write_text("{}")
    with pytest.raises(SystemExit, match="is a checkpoint of a training run"):
        main(arguments(model, vector))
    main(arguments(model, vector, "--out", str(tmp_path / "out")))
    assert not (tmp_path / "out" / "files.json").exists() and "Ada" in load_voices(tmp_path / "out")
