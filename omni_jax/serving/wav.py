"""Sound to a file."""

from __future__ import annotations

import contextlib
import wave
from pathlib import Path

import numpy as np

from omni_jax.errors import InputError
from omni_jax.plain_files import open_own_file


def pcm16(samples: np.ndarray) -> bytes:
    """Float32 [n] from -1 to 1 as 16-bit numbers, the lower byte first."""
    # 32767, and not 32768, for +1 must fit as well as -1
    return np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


class GrowingWav:
    """A 16-bit WAV of one channel that is a whole file after every piece, so that a player may follow it."""

    def __init__(self, path: Path, rate: int):
        """Makes the file, without sound as yet, or takes that of an earlier sound.

        Args:
          path: of the file; one that is there must be a WAV file, or empty.
          rate: samples a second.

        Raises:
          InputError: if something else is there, or the file cannot be written.
        """
        # closes in reverse order: the header is written a last time before the file is closed
        self._close = contextlib.ExitStack()
        try:
            self._file = self._close.enter_context(open_own_file(path))
        except OSError as e:
            raise InputError(f"cannot write {path}: {e.strerror}") from e
        begin = self._file.read(12)
        if begin and (begin[:4], begin[8:]) != (b"RIFF", b"WAVE"):
            self._close.close()
            raise InputError(f"{path} is there and no WAV file; name another file, or remove it")
        self._file.seek(0)
        self._file.truncate()
        self._wave = self._close.enter_context(wave.Wave_write(self._file))
        self._wave.setnchannels(1)
        self._wave.setsampwidth(2)
        self._wave.setframerate(rate)
        # the header is written with the first piece, so that the file is one from the beginning
        self.write(np.zeros(0, np.float32))

    def write(self, samples: np.ndarray) -> None:
        """Adds float32 [n] from -1 to 1."""
        # writeframes goes back to the header and writes the new length; writeframesraw would not
        self._wave.writeframes(pcm16(samples))
        self._file.flush()

    def __enter__(self) -> GrowingWav:
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()
