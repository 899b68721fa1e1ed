"""Speaker vectors: a clip of a voice to the numbers that Token2Wav is given of it (``cond`` of a voice).

The published voices' vectors come from a network that was not published with them; the 25 Hz codec of the same family
takes those of CAM++ (https://arxiv.org/abs/2303.00332). Whoever has its ONNX file can use it here. It is a program of
its user's, loaded from a path that the user names and never from one that a request names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from omni_jax.errors import CheckpointError
from omni_jax.processing.fbank import NUM_BINS, log_fbank

_LEAST_NORM = 1e-6
_NORM_TOLERANCE = 1e-6  # of a length of 1, which is then left as it is


class SpeakerModel(Protocol):
    """Makes speaker vectors.

    Attributes:
      width: numbers of a vector.
    """

    @property
    def width(self) -> int: ...

    def __call__(self, samples: Float[np.ndarray, " n"]) -> Float[np.ndarray, " width"]:
        """The vector of a clip, float32 of length 1; ``samples`` are those of a ``VoiceClip``."""
        ...


class OnnxSpeakerModel:
    """A speaker model in an ONNX file: log-energies ``[1, frames, 80]``, mean over time removed, to a vector.

    Attributes:
      width: numbers of a vector.
    """

    def __init__(self, path: Path, width: int):
        """Loads the file.

        Args:
          path: of the ONNX file.
          width: numbers that a vector must have (``enc_emb_dim`` of Token2Wav).

        Raises:
          CheckpointError: if onnxruntime is not installed, the file cannot be loaded, or its network is another.
        """
        self.width = width
        self._path = path
        try:
            import onnxruntime  # pyright: ignore[reportMissingImports], an extra
        except ImportError as e:
            raise CheckpointError(f"{path} needs onnxruntime: pip install -e '.[onnx]'") from e
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, and need not be logged too
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            inputs = self._session.get_inputs()
            num_outputs = len(self._session.get_outputs())
        except Exception as e:  # of types of its own
            raise CheckpointError(f"cannot load {path}: {_first_line(e)}") from e
        if len(inputs) != 1 or num_outputs != 1 or len(inputs[0].shape) != 3:
            raise CheckpointError(
                f"{path} has {len(inputs)} inputs and {num_outputs} outputs; a speaker model has one input "
                f"[1, frames, {NUM_BINS}] and one output"
            )
        self._input_name = inputs[0].name

    def __call__(self, samples: Float[np.ndarray, " n"]) -> Float[np.ndarray, " width"]:
        """The vector of a clip.

        Raises:
          CheckpointError: if the network fails, or gives no vector of this width.
        """
        features = log_fbank(samples)  # [frames, 80]
        features = features - features.mean(axis=0)
        try:
            (found,) = self._session.run(None, {self._input_name: features[None]})
        except Exception as e:  # of types of its own
            raise CheckpointError(
                f"{self._path} fails on log-energies [1, frames, {NUM_BINS}]: {_first_line(e)}"
            ) from e
        return normalize_vector(np.asarray(found).reshape(-1), self.width, str(self._path))


def normalize_vector(vector: Any, width: int, where: str) -> Float[np.ndarray, " width"]:
    """A speaker vector of length 1; one that has it already keeps its bits.

    Args:
      vector: numbers.
      width: how many they must be.
      where: what gave them, for the error.

    Raises:
      CheckpointError: if they are others than ``width`` finite numbers, or all zero.
    """
    numbers = np.asarray(vector)
    if numbers.shape != (width,) or numbers.dtype.kind not in "fiu":
        raise CheckpointError(f"{where} gives {numbers.dtype}{list(numbers.shape)}; a speaker vector is [{width}]")
    numbers = numbers.astype(np.float64)
    norm = np.linalg.norm(numbers)
    if not np.isfinite(norm) or norm < _LEAST_NORM:
        raise CheckpointError(f"{where} gives a speaker vector of the length {norm:g}; it must be finite and not zero")
    if abs(norm - 1) > _NORM_TOLERANCE:
        numbers = numbers / norm
    return numbers.astype(np.float32)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
