"""The vocoder's activation: SnakeBeta at twice the rate, between two fixed low-pass filters (docs/reference.md, 8.9).

The filters, of 12 taps, are shifted sums over the two phases (even and odd samples) and never convolutions of single
channels, for those become slow loops on CPUs and TPUs alike. The gradient is written out for the same reason: what
derives it makes a sum of six padded arrays of each filter, and keeps all of them; a step of training then takes twice
the time on a CPU.

Letters: B rows, T samples, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from omni_jax.batch import Array
from omni_jax.models.row_ends import RowEnds, pad_edges, zero_outside

# of the low-pass filter before and after each activation
_TAPS = 12
_REACH = _TAPS // 4  # samples on either side that a filter's phase reads
ACTIVATION_REACH = 2 * _REACH - 1  # samples on either side that an activation between two filters depends on

_LEAST_HEIGHT = 1e-9  # as in the reference, where it keeps the quotient finite
# 1/5!, 1/3! and so on with their signs: the Taylor series of sine and cosine in the square, for Horner's rule
_SINE = (-1 / 39916800, 1 / 362880, -1 / 5040, 1 / 120, -1 / 6)
_COSINE = (1 / 479001600, -1 / 3628800, 1 / 40320, -1 / 720, 1 / 24, -1 / 2)


class SnakeBetaWeights(NamedTuple):
    """The logarithms of each channel's frequency, and of the inverse of its height."""

    alpha: Float[jax.Array, "... C"]
    beta: Float[jax.Array, "... C"]


def filtered_snake_beta(x: Float[Array, "B T C"], ends: RowEnds | None, weights: SnakeBetaWeights) -> jax.Array:
    """SnakeBeta at twice the rate, between the two filters; zeros after a row's end. [B, T, C]

    Args:
      x: the rows.
      ends: of the rows; None, as in training: all samples are real.
      weights: of the activation.
    """
    with jax.named_scope("snake_beta"):
        if ends is None:
            return _whole_rows(jnp.asarray(x), weights)
        return zero_outside(_apply(x, ends, weights), ends)


def _apply(x: Array, ends: RowEnds | None, weights: SnakeBetaWeights) -> Float[jax.Array, "B T C"]:
    # a row's first and last sample are repeated
    even, odd = upsample_phases(pad_edges(x, x, x, ends, _REACH))  # two of [B, T, C]
    even = snake_beta(even, *weights)
    odd = snake_beta(odd, *weights)
    # or the compiler computes the activations again where it only needs their ends
    even, odd = jax.lax.optimization_barrier((even, odd))
    # at twice the rate a row begins with an even sample and ends with an odd one
    even_padded = pad_edges(even, even, odd, ends, _REACH)
    odd_padded = pad_edges(odd, even, odd, ends, _REACH)
    return downsample_phases(even_padded, odd_padded)


@jax.custom_vjp
def _whole_rows(x: jax.Array, weights: SnakeBetaWeights) -> jax.Array:
    return _apply(x, None, weights)


def _forward(x: jax.Array, weights: SnakeBetaWeights) -> tuple[jax.Array, tuple[jax.Array, SnakeBetaWeights]]:
    # what lies between the filters is twice as much as ``x``, and is computed again
    return _apply(x, None, weights), (x, weights)


def _backward(
    residuals: tuple[jax.Array, SnakeBetaWeights], gradient: Float[jax.Array, "B T C"]
) -> tuple[jax.Array, SnakeBetaWeights]:
    x, weights = residuals
    even_taps, odd_taps = _downsample_taps()
    by_even = _transposed_sum(gradient, even_taps)  # [B, T + 6, C]
    by_odd = _transposed_sum(gradient, odd_taps)
    # what stands before a row is its first even sample in both phases, and what stands after it its last odd one
    by_first = jnp.sum(by_even[:, :_REACH] + by_odd[:, :_REACH], axis=1)  # [B, C]
    by_last = jnp.sum(by_even[:, -_REACH:] + by_odd[:, -_REACH:], axis=1)
    by_even = by_even[:, _REACH:-_REACH].at[:, 0].add(by_first)  # [B, T, C]
    by_odd = by_odd[:, _REACH:-_REACH].at[:, -1].add(by_last)

    phases = upsample_phases(pad_edges(x, x, x, None, _REACH))
    frequency = jnp.exp(weights.alpha)  # [C]
    height = 1 / (jnp.exp(weights.beta) + _LEAST_HEIGHT)  # [C]
    by_alpha = jnp.zeros_like(frequency)
    by_beta = jnp.zeros_like(height)
    by_phases = []
    for phase, by_phase in zip(phases, (by_even, by_odd), strict=True):
        sine, cosine = _sine_and_cosine(phase * frequency)  # [B, T, C]
        slope = 2 * sine * cosine  # of the squared sine
        by_alpha += jnp.sum(by_phase * slope * phase, axis=(0, 1))
        by_beta += jnp.sum(by_phase * sine * sine, axis=(0, 1))
        by_phases.append(by_phase * (1 + height * frequency * slope))
    by_alpha *= height * frequency
    by_beta *= -height * height * jnp.exp(weights.beta)

    # or the compiler computes them again for each tap
    even, odd = jax.lax.optimization_barrier(tuple(by_phases))
    even_taps, odd_taps = _upsample_taps()
    by_padded = _transposed_sum(even, even_taps) + _transposed_sum(odd, odd_taps)  # [B, T + 6, C]
    by_x = by_padded[:, _REACH:-_REACH]  # [B, T, C]
    by_x = by_x.at[:, 0].add(jnp.sum(by_padded[:, :_REACH], axis=1))
    by_x = by_x.at[:, -1].add(jnp.sum(by_padded[:, -_REACH:], axis=1))
    return by_x, SnakeBetaWeights(by_alpha, by_beta)


_whole_rows.defvjp(_forward, _backward)


def snake_beta(x: jax.Array, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """x + sin(x e^alpha)^2 / e^beta."""
    return x + (1 / (jnp.exp(beta) + _LEAST_HEIGHT)) * sine_squared(x * jnp.exp(alpha))


def sine_squared(x: jax.Array) -> jax.Array:
    """sin(x)^2, within a few float32 roundings of the argument.

    The square repeats every pi, so the rest of a division by pi and a polynomial of degree 11 are enough, and every
    instruction is one that vector units have; XLA's sine on a CPU is a call for each element.
    """
    rest = _rest_of_pi(x)
    sine = _sine_of_rest(rest)
    return sine * sine


def _sine_and_cosine(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, or both with the other sign."""
    rest = _rest_of_pi(x)
    square = rest * rest
    return _sine_of_rest(rest), 1 + square * _polynomial(square, _COSINE)


def _rest_of_pi(x: jax.Array) -> jax.Array:
    """What is left of ``x`` after whole multiples of pi, from -pi / 2 to pi / 2."""
    periods = jnp.round(x * np.float32(1 / np.pi))
    # pi as two numbers, the first short enough that its products are exact
    return (x - periods * np.float32(3.140625)) - periods * np.float32(np.pi - 3.140625)


def _sine_of_rest(rest: jax.Array) -> jax.Array:
    square = rest * rest
    return rest + rest * (square * _polynomial(square, _SINE))


def _polynomial(x: jax.Array, coefficients: tuple[float, ...]) -> jax.Array:
    """By Horner's rule, the highest power first."""
    total: jax.Array | np.float32 = np.float32(0)
    for coefficient in coefficients:
        total = total * x + np.float32(coefficient)
    return jnp.asarray(total)


def low_pass() -> np.ndarray:
    """The filter around every activation: a sinc cut off at half the band, under a Kaiser window. float32 [12]"""
    cutoff = 0.25
    half_width = 0.3
    # Kaiser's design formulas: from the width of the transition to the attenuation, then to beta
    attenuation = 2.285 * (_TAPS // 2 - 1) * math.pi * 4 * half_width + 7.95
    window = np.kaiser(_TAPS, 0.1102 * (attenuation - 8.7))
    # an even number of taps: the centre lies between the two middle ones
    taps = window * np.sinc(2 * cutoff * (np.arange(_TAPS) - (_TAPS - 1) / 2))
    # unit gain for a constant
    return (taps / taps.sum()).astype(np.float32)


def upsample_phases(x: Float[Array, "B T+6 C"]) -> tuple[jax.Array, jax.Array]:
    """The even and the odd samples at twice the rate, of padded rows. Two of [B, T, C]"""
    even_taps, odd_taps = _upsample_taps()
    return _shifted_sum(x, even_taps), _shifted_sum(x, odd_taps)


def downsample_phases(even: Float[Array, "B T+6 C"], odd: Float[Array, "B T+6 C"]) -> jax.Array:
    """Every other sample after the filter, of padded phases. [B, T, C]"""
    even_taps, odd_taps = _downsample_taps()
    return _shifted_sum(even, even_taps) + _shifted_sum(odd, odd_taps)


def _upsample_taps() -> tuple[dict[int, np.float32], dict[int, np.float32]]:
    """Of the filter that makes twice the rate, by offset: those of the even samples and those of the odd ones."""
    # the filter reads a sequence in which every other sample is zero, hence the gain of 2
    # each phase meets half of the taps
    taps = 2 * low_pass()
    even_taps = {offset: taps[5 - 2 * offset] for offset in range(-_REACH, _REACH)}
    odd_taps = {offset: taps[6 - 2 * offset] for offset in range(1 - _REACH, _REACH + 1)}
    return even_taps, odd_taps


def _downsample_taps() -> tuple[dict[int, np.float32], dict[int, np.float32]]:
    """Of the filter that halves the rate, by offset: those that read even samples and those that read odd ones."""
    # the filter at sample 2 t of the higher rate; what lies between would be dropped, so it is not computed
    taps = low_pass()
    even_taps = {offset: taps[5 + 2 * offset] for offset in range(1 - _REACH, _REACH + 1)}
    odd_taps = {offset: taps[6 + 2 * offset] for offset in range(-_REACH, _REACH)}
    return even_taps, odd_taps


def _shifted_sum(x: Array, taps: Mapping[int, np.float32]) -> jax.Array:
    """The sum of ``tap * x[t + offset]`` over ``taps``, offset to tap, for a padded ``x``. [B, T, C]"""
    x = jnp.asarray(x)
    length = x.shape[1] - 2 * _REACH
    parts = []
    for offset, tap in taps.items():
        # sample 0 stands at index ``_REACH`` of the padded row
        begin = _REACH + offset
        parts.append(tap * x[:, begin : begin + length])
    return sum(parts[1:], start=parts[0])


def _transposed_sum(gradient: Float[jax.Array, "B T C"], taps: Mapping[int, np.float32]) -> jax.Array:
    """The gradient by a padded row of the ``_shifted_sum`` of it. [B, T + 6, C]"""
    # what each sample of the padded row has been multiplied with lies on the other side of it
    padded = jnp.pad(gradient, ((0, 0), (2 * _REACH, 2 * _REACH), (0, 0)))
    return _shifted_sum(padded, {-offset: tap for offset, tap in taps.items()})
