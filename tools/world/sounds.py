"""Synthetic sound effects, and tracks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.world.pictures import SOUND_RATE

EFFECT_SECONDS = 0.6


def make_effect(name: str, pitch: float, seed: int) -> np.ndarray:
    """A sound effect.

    Args:
      name: bell, drum, whistle or buzzer.
      pitch: factor of its frequencies.
      seed: of its noise.

    Returns:
      [samples], float32, at most 0.5 in size, EFFECT_SECONDS long, SOUND_RATE a second.
    """
    time = np.arange(int(EFFECT_SECONDS * SOUND_RATE)) / SOUND_RATE  # [samples]
    rng = np.random.default_rng(seed)
    if name == "bell":
        # partials of a bell are no multiples of one frequency
        wave = np.zeros_like(time)
        for ratio, size, decay in ((1.0, 1.0, 5), (2.0, 0.6, 7), (2.76, 0.5, 9), (5.4, 0.3, 14)):
            wave += size * np.exp(-decay * time) * np.sin(2 * np.pi * 700 * pitch * ratio * time)
    elif name == "drum":
        sweep = 2 * np.pi * np.cumsum(60 * pitch + 120 * np.exp(-25 * time)) / SOUND_RATE
        wave = np.exp(-9 * time) * np.sin(sweep) + 0.3 * np.exp(-60 * time) * rng.normal(size=time.shape)
    elif name == "whistle":
        vibrato = 2 * np.pi * np.cumsum(pitch * (1900 + 90 * np.sin(2 * np.pi * 22 * time))) / SOUND_RATE
        wave = np.sin(vibrato) * np.minimum(1, np.minimum(time, EFFECT_SECONDS - time) / 0.04)
    elif name == "buzzer":
        wave = np.sign(np.sin(2 * np.pi * 120 * pitch * time)) + 0.1 * rng.normal(size=time.shape)
        wave *= np.minimum(1, np.minimum(time, EFFECT_SECONDS - time) / 0.02)
    else:
        raise ValueError(f"no such effect: {name}")
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


@dataclass(frozen=True)
class Placed:
    """A sound at its time."""

    start: float
    """Seconds."""
    samples: np.ndarray
    """[samples], float32, SOUND_RATE a second."""


def mix_track(seconds: float, sounds: Sequence[Placed], noise: float, seed: int) -> np.ndarray:
    """Sounds at their times, over noise.

    Args:
      seconds: length.
      sounds: they end before it does.
      noise: its standard deviation.
      seed: of the noise.

    Returns:
      [samples], float32 from -1 to 1, SOUND_RATE a second.
    """
    track = np.random.default_rng(seed).normal(0, noise, round(seconds * SOUND_RATE))
    for sound in sounds:
        start = round(sound.start * SOUND_RATE)
        track[start : start + len(sound.samples)] += sound.samples
    return np.clip(track, -1, 1).astype(np.float32)
