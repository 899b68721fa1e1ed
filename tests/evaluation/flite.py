"""Speech of flite's voices, and renderings of it that are wrong in one way each."""

from __future__ import annotations

import functools
import subprocess
import tempfile
import wave
from pathlib import Path

import numpy as np
from jaxtyping import Float

from omni_jax.processing.audio import resample

RATE = 16_000
VOICES = ("slt", "rms", "awb")
PAUSE = 0.4  # seconds, between two sentences
WRONG_PAUSE = 0.6
CUT = 0.25  # seconds of the last word


@functools.cache
def speak(voice: str, text: str) -> Float[np.ndarray, " n"]:
    """Without the silence before and behind."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "speech.wav")
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], check=True)
        with wave.open(str(path)) as file:
            rate = file.getframerate()
            samples = np.frombuffer(file.readframes(-1), "<i2").astype(np.float32) / 32768
    samples = resample(samples, rate, RATE)
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1]


def join(*parts: Float[np.ndarray, " n"] | float) -> Float[np.ndarray, " n"]:
    """Sounds, and silences in seconds, with 0.1 s of silence around."""
    pieces = []
    for part in (0.1, *parts, 0.1):
        pieces.append(np.zeros(round(part * RATE), np.float32) if isinstance(part, float) else part)
    return np.concatenate(pieces)


def make_good(voice: str, first: str, second: str) -> Float[np.ndarray, " n"]:
    return join(speak(voice, first), PAUSE, speak(voice, second))


def make_bad(voice: str, first: str, second: str) -> dict[str, Float[np.ndarray, " n"]]:
    """The same two sentences with one thing wrong: by the word in the middle of the first one."""
    words = first.split()
    middle = len(words) // 2
    one = speak(voice, first)
    two = speak(voice, second)
    without = " ".join([*words[:middle], *words[middle + 1 :]])
    doubled = " ".join([*words[: middle + 1], *words[middle:]])
    begin = " ".join(words[:middle])
    rest = " ".join(words[middle:])
    good = make_good(voice, first, second)
    return {
        "missing word": join(speak(voice, without), PAUSE, two),
        "doubled word": join(speak(voice, doubled), PAUSE, two),
        "pause in the wrong place": join(speak(voice, begin), WRONG_PAUSE, speak(voice, rest), PAUSE, two),
        "none at a full stop": join(one, two),
        "cut end": good[: -round((0.1 + CUT) * RATE)],
    }
