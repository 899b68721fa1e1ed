"""Sound to a file."""

from __future__ import annotations

import os
import wave
from pathlib import Path

import numpy as np


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    """Writes float32 [n] from -1 to 1 as 16-bit WAV; the file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    whole = np.round(np.clip(samples, -1, 1) * 32767).astype("<i2")
    try:
        with wave.open(str(partial), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(whole.tobytes())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
