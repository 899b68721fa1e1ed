"""Pitch and formants are measured on vowels that are made of known ones."""

from __future__ import annotations

import numpy as np
import pytest
from jaxtyping import Float

from omni_jax.errors import InputError
from omni_jax.processing.voice_perturbation import VoicePerturbation, perturb_voice, stretch_time

RATE = 16_000
PITCH = 110.0  # Hz
FORMANTS = (600.0, 1400.0, 2800.0)  # Hz
BANDWIDTH = 80.0  # Hz
PITCH_TOLERANCE = 0.015
FORMANT_TOLERANCE = 0.05  # harmonics are 110 Hz apart, and the envelope is smooth
MIDDLE = slice(RATE // 4, -RATE // 4)  # of a second and a half, without what the ends do


def make_vowel(pitch: float = PITCH, seconds: float = 1.5) -> Float[np.ndarray, " n"]:
    """Pulses of a voice through three resonances."""
    count = round(seconds * RATE)
    samples = np.zeros(count)
    samples[np.round(np.arange(0, count - 1, RATE / pitch)).astype(int)] = 1.0
    for formant in FORMANTS:
        radius = np.exp(-np.pi * BANDWIDTH / RATE)
        times = np.arange(2000)
        response = radius**times * np.sin(2 * np.pi * formant / RATE * (times + 1))
        samples = np.convolve(samples, response)[:count]
    return (0.3 * samples / np.abs(samples).max()).astype(np.float32)


def measure_pitch(samples: Float[np.ndarray, " n"]) -> float:
    """The shortest of the strong periods between 50 and 300 Hz, in Hz; twice a period is one too."""
    centred = samples[MIDDLE] - samples[MIDDLE].mean()
    spectrum = np.abs(np.fft.rfft(centred, 2 * len(centred))) ** 2
    correlation = np.fft.irfft(spectrum)
    peaks = []
    for lag in range(RATE // 300, RATE // 50):
        if correlation[lag] >= max(correlation[lag - 1], correlation[lag + 1]):
            peaks.append(lag)
    strongest = max(correlation[lag] for lag in peaks)
    best = next(lag for lag in peaks if correlation[lag] > 0.9 * strongest)
    # of a parabola through the highest three
    before, at, after = correlation[best - 1 : best + 2]
    return RATE / (best + 0.5 * (before - after) / (before - 2 * at + after))


def measure_formants(samples: Float[np.ndarray, " n"]) -> list[float]:
    """Frequencies of the poles of a linear prediction, those that are narrow."""
    own = samples[MIDDLE].astype(np.float64)
    emphasized = (own[1:] - 0.9 * own[:-1]) * np.hamming(len(own) - 1)
    order = 10
    spectrum = np.abs(np.fft.rfft(emphasized, 2 * len(emphasized))) ** 2
    correlation = np.fft.irfft(spectrum)[: order + 1]
    matrix = correlation[np.abs(np.subtract.outer(np.arange(order), np.arange(order)))]
    coefficients = np.linalg.solve(matrix, correlation[1:])
    roots = np.roots([1, *-coefficients])
    narrow = roots[(roots.imag > 0) & (-np.log(np.abs(roots)) * RATE / np.pi < 500)]
    return sorted((np.angle(narrow) * RATE / (2 * np.pi)).tolist())


def nearest(found: list[float], wanted: float) -> float:
    return min(found, key=lambda frequency: abs(frequency - wanted))


def test_what_is_measured() -> None:
    vowel = make_vowel()
    assert measure_pitch(vowel) == pytest.approx(PITCH, rel=0.005)
    for formant in FORMANTS[1:]:
        assert nearest(measure_formants(vowel), formant) == pytest.approx(formant, rel=FORMANT_TOLERANCE)


@pytest.mark.parametrize(
    ("pitch", "formant"), [(1.3, 1.0), (0.75, 1.0), (1.0, 1.25), (1.0, 0.8), (1.4, 0.85), (0.8, 1.2)]
)
def test_pitch_and_formants_move_by_their_factors(pitch: float, formant: float) -> None:
    vowel = make_vowel()
    moved = perturb_voice(vowel, RATE, pitch, formant)
    assert moved.dtype == np.float32 and moved.shape == vowel.shape
    assert measure_pitch(moved) == pytest.approx(pitch * PITCH, rel=PITCH_TOLERANCE)
    found = measure_formants(moved)
    # the lowest is measured at the harmonic that is nearest to it, wherever it is
    for frequency in FORMANTS[1:]:
        assert nearest(found, formant * frequency) == pytest.approx(formant * frequency, rel=FORMANT_TOLERANCE), found
    # about as loud as before
    assert np.std(moved[MIDDLE]) == pytest.approx(np.std(vowel[MIDDLE]), rel=0.6)


def test_factors_of_one_change_nothing() -> None:
    vowel = make_vowel()
    assert np.array_equal(perturb_voice(vowel, RATE, 1.0, 1.0), vowel)
    # an envelope that goes nowhere: what is taken apart is put together again
    assert np.abs(perturb_voice(vowel, RATE, 1.0, 1.0 + 1e-9) - vowel).max() < 1e-5


def test_time_stays() -> None:
    """Bursts are where they were, to 20 ms: the search goes 10 ms either way, and a window has 30."""
    rng = np.random.default_rng(0)
    samples = np.zeros(2 * RATE, np.float32)
    for begin in (0.2, 0.9, 1.6):
        place = slice(round(begin * RATE), round((begin + 0.15) * RATE))
        samples[place] = 0.3 * rng.standard_normal(place.stop - place.start)
    for pitch in (0.7, 1.5):
        moved = perturb_voice(samples, RATE, pitch, 1.0)
        power = np.convolve(moved**2, np.ones(160) / 160, mode="same") > 1e-3
        changes = np.flatnonzero(np.diff(power.astype(int))) / RATE
        assert np.abs(changes[0] - 0.2) < 0.02 and np.abs(changes[-1] - 1.75) < 0.03
    stretched = stretch_time(make_vowel(), RATE, 1.37)
    assert len(stretched) == round(1.37 * 1.5 * RATE)
    assert measure_pitch(stretched) == pytest.approx(PITCH, rel=PITCH_TOLERANCE)


def test_the_seed_says_which_voice() -> None:
    vowel = make_vowel()
    perturbation = VoicePerturbation()
    moved = perturbation.apply(vowel, RATE, np.random.default_rng(3))
    assert np.array_equal(moved, perturbation.apply(vowel, RATE, np.random.default_rng(3)))
    assert not np.array_equal(moved, perturbation.apply(vowel, RATE, np.random.default_rng(4)))
    pitches = []
    for seed in range(12):
        pitches.append(measure_pitch(perturbation.apply(vowel, RATE, np.random.default_rng(seed))) / PITCH)
    assert min(pitches) < 0.85 and max(pitches) > 1.15
    assert all(1 / 1.53 < pitch < 1.53 for pitch in pitches)
    untouched = VoicePerturbation(share=0.0)
    assert np.array_equal(untouched.apply(vowel, RATE, np.random.default_rng(3)), vowel)


@pytest.mark.parametrize("length", [0, 1, 100, 481, 5000])
def test_any_length(length: int) -> None:
    moved = perturb_voice(make_vowel()[:length], RATE, 1.3, 0.9)
    assert moved.shape == (length,) and np.isfinite(moved).all()


@pytest.mark.parametrize(
    ("pitch", "formant", "name"), [(2.5, 1.0, "pitch"), (1.0, 0.1, "formant"), (np.nan, 1.0, "pitch")]
)
def test_factors_out_of_range(pitch: float, formant: float, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is"):
        perturb_voice(make_vowel(), RATE, pitch, formant)
    with pytest.raises(InputError, match="max_pitch is 3"):
        VoicePerturbation(max_pitch=3.0).check()
