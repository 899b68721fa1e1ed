"""Sound to log-mel frames, as the Whisper feature extractor of the reference makes them (docs/reference.md,
2.3).

The reference pads every clip to five minutes first. Two hops of silence after the clip give the same frames, so that is
all the padding there is here. ``MelStream`` and ``Resampler`` take a sound in pieces, while it goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soxr

from omni_jax.errors import InputError
from omni_jax.processing.layout import AudioInput

# frames whose spectra are taken at a time: a block of the encoder's, since products of matrices of other heights may
# round otherwise, and a sound that comes block by block is to have the very same features
_FRAMES_PER_FFT = 200
_MIN_LOG_POWER = -10.0  # decades; the least that is told apart
_DYNAMIC_RANGE = 8.0  # decades that are kept under the loudest bin


@dataclass(frozen=True)
class MelSettings:
    """How sound becomes frames; the numbers are those of the published ``preprocessor_config.json``."""

    feature_size: int = 128  # mel bins
    sampling_rate: int = 16_000  # Hz
    n_fft: int = 400  # samples that a frame sees, 25 ms
    hop_length: int = 160  # samples from one frame to the next, 10 ms
    chunk_length: int = 300  # seconds that the reference pads to, and cuts at
    max_seconds: float = 300.0  # longest sound that is taken


def log_mel(samples: np.ndarray, settings: MelSettings) -> np.ndarray:
    """The log-mel spectrogram of a clip.

    The floor lies eight decades under the loudest bin of the whole clip, so a prefix of a clip has other features than
    the clip.

    Args:
      samples: float [n], mono, at ``settings.sampling_rate``.
      settings: sizes of the frames.

    Returns:
      float32 [ceil(n / hop), mel bins].
    """
    hop = settings.hop_length
    frames = -(-len(samples) // hop)
    # zeros behind the clip: what is reflected at the end must never be sound, unless the clip fills the five minutes
    computed = _num_computed(frames, settings)
    padded = np.zeros(computed * hop, np.float64)
    padded[: len(samples)] = samples
    # a frame is centred on its first sample, so half a window is reflected at either end
    logs = _log_power(_mel_power(np.pad(padded, settings.n_fft // 2, mode="reflect"), computed, settings))
    # frames behind the clip count for the maximum, as they do in the reference, and are cut off after that
    return _scale_logs(logs, logs.max(initial=_MIN_LOG_POWER))[:frames]


class MelStream:
    """``log_mel`` of a sound that goes on, a block of frames as soon as the sound has all that they see.

    A frame sees half a window (200 samples) on both sides of its first sample; so a block is there 40 samples, 2.5 ms,
    after its end. The beginning is reflected and the end padded as ``log_mel`` does it.

    The floor of a block lies eight decades under the loudest bin of all that has come up to the block's end; of the
    last frames, under the loudest of the whole. So the frames do not depend on the pieces that the sound comes in. From
    the block with the loudest bin on they are those of ``log_mel``; before it, only bins that lie under the clip's own
    floor differ, and they are lower.

    Attributes:
      samples: how many have come.
    """

    def __init__(self, settings: MelSettings, block: int):
        """``block`` is how many frames come out at a time."""
        self.samples = 0
        self._settings = settings
        self._block = block
        self._buffer = np.zeros(0, np.float32)  # from the first sample that the next frame sees
        self._num_frames = 0  # frames
        self._loudest = _MIN_LOG_POWER

    def push(self, samples: np.ndarray) -> list[np.ndarray]:
        """Takes more of the sound, float [n]; returns the blocks that are complete, each float32 [block, mel bins]."""
        hop = self._settings.hop_length
        n_fft = self._settings.n_fft
        self.samples += len(samples)
        self._buffer = np.concatenate([self._buffer, samples])
        out = []
        # a block is complete when the sound has all that its last frame sees
        while len(self._buffer) + self._num_reflected >= (self._block - 1) * hop + n_fft:
            seen = np.pad(self._buffer, (self._num_reflected, 0), mode="reflect")
            out.append(self._floored_frames(seen, self._block))
            # frames overlap: of the block's samples the next frame sees the last ones again
            self._buffer = seen[self._block * hop :]
            self._num_frames += self._block
        return out

    def finish(self) -> np.ndarray:
        """Says that the sound has ended; returns the frames that are left, float32 [frames, mel bins]."""
        hop = self._settings.hop_length
        half = self._settings.n_fft // 2
        frames = -(-self.samples // hop)
        computed = _num_computed(frames, self._settings) - self._num_frames
        # the buffer begins half a window before the next frame; of the very first frame that half is reflected
        rest = np.zeros(computed * hop + half - self._num_reflected)
        rest[: len(self._buffer)] = self._buffer
        seen = np.pad(rest, (self._num_reflected, half), mode="reflect")
        return self._floored_frames(seen, computed)[: frames - self._num_frames]

    @property
    def _num_reflected(self) -> int:
        """Samples that the next frame sees before the beginning of the sound."""
        return 0 if self._num_frames else self._settings.n_fft // 2

    def _floored_frames(self, seen: np.ndarray, frames: int) -> np.ndarray:
        logs = _log_power(_mel_power(seen, frames, self._settings))
        self._loudest = max(self._loudest, logs.max(initial=_MIN_LOG_POWER))
        return _scale_logs(logs, self._loudest)


def _num_computed(frames: int, settings: MelSettings) -> int:
    """How many frames are computed of a clip of so many.

    Those that begin after the clip still reach into it and count for the maximum; at the end of the reference's five
    minutes there is no room for them, and the clip is reflected instead.
    """
    room = max(settings.chunk_length * settings.sampling_rate // settings.hop_length, frames)
    return min(frames + math.ceil(settings.n_fft / 2 / settings.hop_length), room)


def _log_power(power: np.ndarray) -> np.ndarray:
    """Decades. [frames, mel bins]"""
    return np.log10(np.maximum(power, 10**_MIN_LOG_POWER))


def _scale_logs(logs: np.ndarray, loudest: float) -> np.ndarray:
    """What the encoder takes: the floor applied, and about -1 to 1. [frames, mel bins]"""
    return ((np.maximum(logs, loudest - _DYNAMIC_RANGE) + 4.0) / 4.0).astype(np.float32)


def _mel_power(padded: np.ndarray, frames: int, settings: MelSettings) -> np.ndarray:
    """Power in each mel bin. [frames, mel bins]"""
    n_fft = settings.n_fft
    hop = settings.hop_length
    # Hann, periodic as in the reference
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    filters = mel_filters(settings.feature_size, n_fft, settings.sampling_rate)
    # [frames, n_fft], without copies; the frame that is centred on the end is left out, as in the reference
    views = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop][:frames]
    out = np.empty((frames, settings.feature_size))
    for begin in range(0, frames, _FRAMES_PER_FFT):
        spectrum = np.fft.rfft(views[begin : begin + _FRAMES_PER_FFT] * window)  # [frames, n_fft // 2 + 1]
        out[begin : begin + _FRAMES_PER_FFT] = (spectrum.real**2 + spectrum.imag**2) @ filters
    return out


@lru_cache(maxsize=4)
def mel_filters(bins: int, n_fft: int, sampling_rate: int) -> np.ndarray:
    """Triangular filters from 0 Hz to half the sampling rate, evenly spaced in Slaney's mel and of equal area.

    Slaney's mel is linear up to 1 kHz (15 mel) and logarithmic above, 27 mel to a factor of 6.4.

    Returns:
      float64 [n_fft // 2 + 1, bins].
    """
    step = math.log(6.4) / 27
    top = 15 + math.log(sampling_rate / 2 / 1000) / step
    # each filter rises from the centre of the one before and falls to that of the one after
    mels = np.linspace(0, top, bins + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    frequencies = np.linspace(0, sampling_rate / 2, n_fft // 2 + 1)[:, None]
    # of each filter [bins]
    left = edges[:-2]
    centre = edges[1:-1]
    right = edges[2:]
    # [n_fft // 2 + 1, bins]
    rising = (frequencies - left) / (centre - left)
    falling = (right - frequencies) / (right - centre)
    # a triangle of height 1 has half its width as area: Slaney's norm divides by that
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Resamples mono float [n] to ``ceil(n * target / rate)`` samples, as ``librosa.load`` does (soxr_hq)."""
    if rate == target:
        return samples.astype(np.float32)
    length = -(-len(samples) * target // rate)
    # soxr decides by itself where it ends; librosa cuts or pads to the exact length
    out = soxr.resample(samples.astype(np.float32), rate, target, quality="HQ")[:length]
    return np.pad(out, (0, length - len(out)))


class Resampler:
    """``resample`` of a sound that goes on; the pieces add up to the same samples. At 48 kHz they come 34 ms late."""

    def __init__(self, rate: int, target: int):
        self._rate = rate
        self._target = target
        self._stream = None if rate == target else soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ")
        self._num_in = 0
        self._num_out = 0

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Takes more of the sound, float [n]; returns what is certain now, float32 [m]."""
        samples = samples.astype(np.float32)
        self._num_in += len(samples)
        if self._stream is not None:
            samples = self._stream.resample_chunk(samples)
        self._num_out += len(samples)
        return samples

    def finish(self) -> np.ndarray:
        """Says that the sound has ended; returns the rest of it."""
        if self._stream is None:
            return np.zeros(0, np.float32)
        # the pieces together must be as long as ``resample`` makes the whole
        num_remaining = -(-self._num_in * self._target // self._rate) - self._num_out
        rest = self._stream.resample_chunk(np.zeros(0, np.float32), last=True)[:num_remaining]
        return np.pad(rest, (0, num_remaining - len(rest)))


def audio_input(samples: np.ndarray, settings: MelSettings, num_bad_packets: int = 0) -> AudioInput:
    """A clip as the model takes it.

    Args:
      samples: float32 [n], mono, at ``settings.sampling_rate``.
      settings: gives the longest clip that is taken.
      num_bad_packets: of its file, that do not decode and are left out.

    Raises:
      InputError: if the clip is too short for a single token, or too long.
    """
    seconds = len(samples) / settings.sampling_rate
    if seconds > settings.max_seconds:
        raise too_long(seconds, settings)
    if len(samples) < min_samples(settings):
        raise InputError(f"the sound lasts {seconds:.4f} s; the model takes nothing under 0.025 s")
    return AudioInput(log_mel(samples, settings), num_bad_packets)


def min_samples(settings: MelSettings) -> int:
    """The shortest clip that gives a token: one sample of its third frame."""
    return 2 * settings.hop_length + 1


def too_long(seconds: float, settings: MelSettings) -> InputError:
    """The error for a clip over the limit; it is never cut without being asked to."""
    return InputError(
        f"the sound lasts {seconds:.2f} s, over the limit of {settings.max_seconds:g} s; cut it into pieces, or name a "
        "range (audio_start and audio_end, or video_start and video_end)"
    )
