"""Levels of sound: how loud each frame is, and which frames are silent beside loud speech."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

WINDOW_SECONDS = 0.025  # of a frame
HOP_SECONDS = 0.01  # from one frame to the next
LEAST_POWER = 1e-10  # -100 dB of full scale
_LOUD_PERCENTILE = 95.0  # of the frames' levels: that of loud vowels
_SILENCE = 30.0  # dB below it a frame is silent


def measure_levels(samples: Float[np.ndarray, " n"], rate: int) -> Float[np.ndarray, " frames"]:
    """The level of each frame of 25 ms, 10 ms apart, in dB of full scale; none of a sound shorter than one."""
    window = round(WINDOW_SECONDS * rate)
    hop = round(HOP_SECONDS * rate)
    if len(samples) < window:
        return np.zeros(0)
    power = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    starts = np.arange(0, len(samples) - window + 1, hop)
    mean = (power[starts + window] - power[starts]) / window
    return 10 * np.log10(np.maximum(mean, LEAST_POWER))


def loud_level(levels: Float[np.ndarray, " frames"]) -> float:
    """The level of loud vowels, in dB."""
    return float(np.percentile(levels, _LOUD_PERCENTILE))


def is_silent(levels: Float[np.ndarray, " frames"]) -> Bool[np.ndarray, " frames"]:
    """Which frames are 30 dB below loud speech; of silence alone, all."""
    loud = max(loud_level(levels), 10 * np.log10(LEAST_POWER) + _SILENCE + 1)
    return levels < loud - _SILENCE
