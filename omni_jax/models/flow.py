"""The flow of Token2Wav: from noise to mel along the velocity that the DiT gives (sections 8.5 and 8.8).

The grid of times, the guidance and the rule of the solver are the reference's constants; no file holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from omni_jax.batch import Array

POINTS = 10  # of the grid: nine steps between them
GUIDANCE = 0.5  # how far beyond the velocity for the request, away from that for nothing

# Runge and Kutta's fourth order, the 3/8 rule: where each stage stands in its step, what it starts from, what it weighs
_PLACES = np.array([0, 1 / 3, 2 / 3, 1], np.float32)
_STAGES = np.array([[0, 0, 0, 0], [1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0]], np.float32)
_WEIGHTS = np.array([1, 3, 3, 1], np.float32) / np.float32(8)


def sway_grid(points: int = POINTS) -> np.ndarray:
    """Times from 0 to 1, close together at the beginning: 1 - cos(pi u / 2) of even ones. float32 [points]"""
    u = np.linspace(0, 1, points, dtype=np.float32)
    # in the reference's order of operations, so that the times are its times to the last bit
    return u - (np.cos(np.float32(np.pi / 2) * u) - 1 + u)


def evaluation_times(grid: np.ndarray) -> np.ndarray:
    """The times at which the velocity is asked for: four in each step. float32 [steps, 4]"""
    times = grid[:-1, None] + np.diff(grid)[:, None] * _PLACES
    times[:, -1] = grid[1:]
    return times.astype(np.float32)


def guided(given: jax.Array, null: jax.Array) -> jax.Array:
    """Classifier-free guidance, added on top of the velocity for the request."""
    return given + (given - null) * GUIDANCE


def integrate(
    velocity: Callable[[jax.Array, Any], jax.Array], start: Float[Array, "*shape"], grid: np.ndarray, moments: Any
) -> Float[jax.Array, "*shape"]:
    """Follows ``velocity`` from ``start`` through ``grid``.

    Args:
      velocity: (value, moment) to the derivative of the value.
      start: the value at the grid's first time.
      grid: times, float32 [steps + 1].
      moments: what ``velocity`` needs to know of the time: a tree of arrays [steps, 4, ...], in the order of
        ``evaluation_times``.
    """

    def step(value: jax.Array, inputs: tuple[jax.Array, Any]) -> tuple[jax.Array, None]:
        size, moments = inputs

        def stage(slopes: jax.Array, inputs: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, None]:
            number, weights, moment = inputs
            slope = velocity(value + size * _weighed(weights, slopes), moment)
            return slopes.at[number].set(slope), None

        none = jnp.zeros((len(_PLACES), *value.shape), value.dtype)
        slopes, _ = jax.lax.scan(stage, none, (jnp.arange(len(_PLACES)), jnp.asarray(_STAGES), moments))
        return value + size * _weighed(jnp.asarray(_WEIGHTS), slopes), None

    return jax.lax.scan(step, jnp.asarray(start), (jnp.asarray(np.diff(grid)), moments))[0]


def _weighed(weights: jax.Array, slopes: jax.Array) -> jax.Array:
    return sum(weights[i] * slopes[i] for i in range(len(_PLACES)))  # type: ignore[return-value]
