"""Speaker vectors: those of an ONNX file, and what is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omni_jax.errors import CheckpointError
from omni_jax.processing.fbank import log_fbank
from omni_jax.processing.speaker_vectors import OnnxSpeakerModel, normalize_vector
from omni_jax.processing.voice_clip import read_clip
from tests.speaker_model import WIDTH, write_speaker_model

SPEECH = Path(__file__).parents[1] / "media" / "speech.wav"


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    return write_speaker_model(tmp_path / "speaker.onnx")


def test_an_onnx_file_gets_log_energies_without_their_mean(onnx_file: Path) -> None:
    model = OnnxSpeakerModel(onnx_file, WIDTH)
    samples = read_clip(SPEECH).samples
    features = log_fbank(samples)
    expected = (features - features.mean(axis=0)).max(axis=0)[:WIDTH]
    vector = model(samples)
    assert vector.dtype == np.float32 and model.width == WIDTH
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)


def test_an_onnx_file_of_another_network(onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"speaker.onnx gives float32\[12\]; a speaker vector is \[192\]"):
        OnnxSpeakerModel(onnx_file, 192)(read_clip(SPEECH).samples)
    (tmp_path / "damaged.onnx").write_bytes(onnx_file.read_bytes()[:100])
    for name in ("damaged.onnx", "missing.onnx"):
        with pytest.raises(CheckpointError, match=f"cannot load .*{name}"):
            OnnxSpeakerModel(tmp_path / name, WIDTH)


def test_vectors_have_length_one() -> None:
    vector = normalize_vector(np.array([3.0, 0.0, 4.0]), 3, "it")
    np.testing.assert_allclose(vector, [0.6, 0, 0.8])
    for wrong, message in [
        (np.ones(4), r"it gives float64\[4\]; a speaker vector is \[3\]"),
        (np.ones((1, 3)), r"it gives float64\[1, 3\]"),
        (np.zeros(3), "it gives a speaker vector of the length 0; it must be finite and not zero"),
        (np.array([1, np.nan, 1]), "of the length nan"),
        (np.array(["a", "b", "c"]), "it gives <U1"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            normalize_vector(wrong, 3, "it")
