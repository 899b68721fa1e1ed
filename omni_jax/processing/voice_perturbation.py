"""Another voice for the same words: pitch and formants of speech are moved, each by a factor of its own.

The speech tokenizer is given sounds that are perturbed so, while the row's voice and the DiT's conditions stay: its
codes then say less of the speaker (Qwen2.5-Omni, section 2.4: timbre disentanglement; that pitch and formants have a
factor each is of NANSY, Choi et al. 2021). Pitch: the sound is stretched in time (WSOLA, Verhelst and Roelands 1993)
and resampled to its old length, which moves the formants too. Formants: the envelope of each frame's spectrum, a
smoothed cepstrum, is warped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr
from jaxtyping import Float

from omni_jax.checks import check_float

MAX_FACTOR = 2.0  # of pitch and formants, and one over it the least
_STRETCH_WINDOW = 0.03  # seconds that are overlapped by half; three periods of a low voice
_STRETCH_SEARCH = 0.01  # seconds either way that the next piece is looked for; a period of a low voice
_WINDOW = 0.032  # seconds of a frame whose envelope is warped
_FRAMES_PER_WINDOW = 4
_SMOOTH = 0.0015  # seconds of cepstrum that are the envelope; the pitch of voices up to 500 Hz lies behind
_MAX_GAIN = 4.0  # natural logarithm; 35 dB
_LEAST = 1e-6  # magnitude; what is below is silence


@dataclass(frozen=True)
class VoicePerturbation:
    """How far voices are moved.

    Attributes:
      max_pitch: factor of the pitch at most; one over it at least.
      max_formant: the same of the formants.
      share: of sounds that are perturbed; the others stay.
    """

    max_pitch: float = 1.5
    max_formant: float = 1.4
    share: float = 1.0

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        check_float("max_pitch", self.max_pitch, 1, MAX_FACTOR)
        check_float("max_formant", self.max_formant, 1, MAX_FACTOR)
        check_float("share", self.share, 0, 1)

    def apply(self, samples: Float[np.ndarray, " n"], rate: int, rng: np.random.Generator) -> Float[np.ndarray, " n"]:
        """The sound in another voice, which the generator draws: factors are as often above 1 as below.

        Args:
          samples: mono.
          rate: samples a second.
          rng: draws three numbers, whatever they are used for.
        """
        is_perturbed, pitch, formant = rng.uniform(size=3)
        if is_perturbed >= self.share:
            return samples.astype(np.float32)
        return perturb_voice(samples, rate, self.max_pitch ** (2 * pitch - 1), self.max_formant ** (2 * formant - 1))


def perturb_voice(samples: Float[np.ndarray, " n"], rate: int, pitch: float, formant: float) -> Float[np.ndarray, " n"]:
    """Moves the pitch and the formants of speech.

    Args:
      samples: mono.
      rate: samples a second.
      pitch: factor of the frequency of the voice.
      formant: factor of the frequencies of the formants.

    Returns:
      float32, as many samples.

    Raises:
      InputError: for a factor that is out of range.
    """
    check_float("pitch", pitch, 1 / MAX_FACTOR, MAX_FACTOR)
    check_float("formant", formant, 1 / MAX_FACTOR, MAX_FACTOR)
    moved = samples.astype(np.float64)
    if not len(moved):
        return moved.astype(np.float32)
    if pitch != 1:
        stretched = stretch_time(moved, rate, pitch)
        # taken for a sound of a higher rate: all frequencies are that much higher, and it is as long as before
        moved = _fit_length(soxr.resample(stretched, pitch * rate, rate, quality="HQ"), len(samples))
    if formant != pitch:
        # by now they are ``pitch`` times as high
        moved = _warp_envelope(moved, rate, formant / pitch)
    return moved.astype(np.float32)


def stretch_time(samples: Float[np.ndarray, " n"], rate: int, factor: float) -> Float[np.ndarray, " m"]:
    """Speech at the same pitch that takes ``factor`` times as long.

    Pieces are overlapped and added up. Each is taken from where the sound goes on most like the piece before, near the
    place that the factor asks for.

    Returns:
      round(factor * n) samples.
    """
    hop = round(_STRETCH_WINDOW * rate / 2)
    search = round(_STRETCH_SEARCH * rate)
    length = round(factor * len(samples))
    num_pieces = -(-length // hop) + 1
    # room for each piece, its neighbours, and what follows the last
    padded = np.concatenate([np.zeros(hop + search), samples, np.zeros(4 * hop + 2 * search)])
    window = 0.5 - 0.5 * np.cos(np.pi * np.arange(2 * hop) / hop)  # two that overlap by half add up to 1
    out = np.zeros((num_pieces + 1) * hop)
    begin = 0  # of the piece before, in ``padded``
    for number in range(num_pieces):
        target = search + min(round(number * hop / factor), len(samples) + hop)
        best = target
        if number > 0:
            best = _find_continuation(padded, begin + hop, target, search, 2 * hop)
        out[number * hop : (number + 2) * hop] += window * padded[best : best + 2 * hop]
        begin = best
    # the first piece begins half a window before the sound
    return out[hop : hop + length]


def _find_continuation(padded: Float[np.ndarray, " n"], natural: int, target: int, search: int, width: int) -> int:
    """The place near ``target`` whose piece is most like the one at ``natural``; of equals that which is nearest."""
    wanted = padded[natural : natural + width]
    around = padded[target - search : target + search + width]
    products = np.correlate(around, wanted, mode="valid")  # [2 * search + 1]
    energy = np.cumsum(np.concatenate([[0.0], around**2]))
    norms = np.sqrt(np.maximum(energy[width:] - energy[:-width], 0)) + _LEAST
    likeness = products / norms
    places = np.flatnonzero(likeness >= likeness.max() - 1e-9)
    return target - search + int(places[np.argmin(np.abs(places - search))])


def _warp_envelope(samples: Float[np.ndarray, " n"], rate: int, factor: float) -> Float[np.ndarray, " n"]:
    """Moves the envelope of the spectrum to frequencies that are ``factor`` times as high; the pitch stays."""
    hop = round(_WINDOW * rate / _FRAMES_PER_WINDOW)
    width = hop * _FRAMES_PER_WINDOW
    num_frames = -(-len(samples) // hop) + _FRAMES_PER_WINDOW
    padded = np.zeros((num_frames + _FRAMES_PER_WINDOW) * hop)
    padded[width : width + len(samples)] = samples
    window = np.sqrt(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width))
    frames = np.lib.stride_tricks.sliding_window_view(padded, width)[::hop][:num_frames]  # [frames, width]
    spectra = np.fft.rfft(frames * window)  # [frames, bins]
    envelope = _log_envelope(np.abs(spectra), width, rate)
    bins = np.arange(spectra.shape[1])
    source = np.minimum(bins / factor, bins[-1])
    low = np.floor(source).astype(int)
    high = np.minimum(low + 1, bins[-1])
    part = source - low
    warped = (1 - part) * envelope[:, low] + part * envelope[:, high]  # [frames, bins]
    spectra = spectra * np.exp(np.clip(warped - envelope, -_MAX_GAIN, _MAX_GAIN))
    out = np.zeros(len(padded))
    for number, frame in enumerate(np.fft.irfft(spectra, width) * window):
        out[number * hop : number * hop + width] += frame
    # squared windows, a quarter of a window apart, add up to 2
    return out[width : width + len(samples)] / (_FRAMES_PER_WINDOW / 2)


def _log_envelope(
    magnitude: Float[np.ndarray, "frames bins"], width: int, rate: int
) -> Float[np.ndarray, "frames bins"]:
    """The logarithm of the spectrum without its fine structure, in which the pitch is."""
    cepstrum = np.fft.irfft(np.log(np.maximum(magnitude, _LEAST)), width)  # [frames, width]
    smooth = round(_SMOOTH * rate)
    kept = np.zeros(width)
    kept[: smooth + 1] = 1
    kept[width - smooth :] = 1  # the cepstrum is symmetric
    return np.fft.rfft(cepstrum * kept).real


def _fit_length(samples: Float[np.ndarray, " m"], length: int) -> Float[np.ndarray, " n"]:
    """Cut, or with zeros behind: resampling rounds."""
    return np.pad(samples[:length], (0, max(0, length - len(samples))))
