"""Sounds in which each word is a tone, and rows of them with what is said."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np

RATE = 16_000
WORDS = {"low": 200.0, "high": 1500.0, "top": 4000.0}  # Hz
TEXTS = ("low high", "top", "high low top", "top top", "low", "high top")


def write_sound(path: Path, words: str) -> Path:
    pieces = [np.zeros(RATE // 20)]
    for word in words.split():
        times = np.arange(RATE // 5) / RATE
        pieces += [0.4 * np.sin(2 * np.pi * WORDS[word] * times), np.zeros(RATE // 20)]
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((32767 * np.concatenate(pieces)).astype("<i2").tobytes())
    return path


def write_rows(folder: Path) -> Path:
    lines = []
    for number, text in enumerate(TEXTS):
        write_sound(folder / f"{number}.wav", text)
        lines.append(json.dumps({"audio": f"{number}.wav", "text": text, "voice": "tones"}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
