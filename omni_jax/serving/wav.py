"""Sound to a file."""

from __future__ import annotations

import contextlib
import wave
from pathlib import Path

import numpy as np


def pcm16(samples: np.ndarray) -> bytes:
    """Float32 [n] from -1 to 1 as 16-bit numbers, the lower byte first."""
    return np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


class GrowingWav:
    """A 16-bit WAV of one channel that is a whole file after every piece, so that a player may follow it."""

    def __init__(self, path: Path, rate: int):
        """Makes the file, without sound as yet; ``rate`` is in samples a second."""
        self._close = contextlib.ExitStack()
        self._file = self._close.enter_context(path.open("wb"))
        self._wave = self._close.enter_context(wave.Wave_write(self._file))
        self._wave.setnchannels(1)
        self._wave.setsampwidth(2)
        self._wave.setframerate(rate)
        self.write(np.zeros(0, np.float32))

    def write(self, samples: np.ndarray) -> None:
        """Adds float32 [n] from -1 to 1."""
        self._wave.writeframes(pcm16(samples))
        self._file.flush()

    def __enter__(self) -> GrowingWav:
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()
