"""The flow of Token2Wav: from noise to mel along the velocity that the DiT gives (sections 8.5 and 8.8).

The grid of times, the guidance and the rule of the solver are the reference's constants; no file holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt32

from omni_jax.batch import Array
from omni_jax.models.dit import Blocks, Conditions, DiT, KeysValues

Memory = TypeVar("Memory")

POINTS = 10  # of the grid: nine steps between them
EVALUATIONS = 4 * (POINTS - 1)
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
    velocity: Callable[[jax.Array, Any, Memory], tuple[jax.Array, Memory]],
    start: Float[Array, "*shape"],
    grid: np.ndarray,
    moments: Any,
    memory: Memory,
) -> tuple[Float[jax.Array, "*shape"], Memory]:
    """Follows ``velocity`` from ``start`` through ``grid``.

    Args:
      velocity: (value, moment, memory) to the derivative of the value, and the memory for the next evaluation.
      start: the value at the grid's first time.
      grid: times, float32 [steps + 1].
      moments: what ``velocity`` needs to know of the time: a tree of arrays [steps, 4, ...], in the order of
        ``evaluation_times``.
      memory: a tree of arrays that goes from each evaluation to the next.
    """

    def step(loop: tuple[jax.Array, Memory], each: tuple[jax.Array, Any]) -> tuple[tuple[jax.Array, Memory], None]:
        (value, memory), (size, moments) = loop, each

        def stage(loop: tuple[jax.Array, Memory], each: tuple[jax.Array, jax.Array, Any]) -> Any:
            (slopes, memory), (number, weights, moment) = loop, each
            slope, memory = velocity(value + size * _weighed(weights, slopes), moment, memory)
            return (slopes.at[number].set(slope), memory), None

        none = jnp.zeros((len(_PLACES), *value.shape), value.dtype)
        stages = (jnp.arange(len(_PLACES)), jnp.asarray(_STAGES), moments)
        (slopes, memory), _ = jax.lax.scan(stage, (none, memory), stages)
        return (value + size * _weighed(jnp.asarray(_WEIGHTS), slopes), memory), None

    return jax.lax.scan(step, (jnp.asarray(start), memory), (jnp.asarray(np.diff(grid)), moments))[0]


def _weighed(weights: jax.Array, slopes: jax.Array) -> jax.Array:
    return sum(weights[i] * slopes[i] for i in range(len(_PLACES)))  # type: ignore[return-value]


def solve(
    dit: DiT,
    params: Any,
    noise: Float[Array, "N F M"],
    conditions: Conditions,
    blocks: Blocks,
    memory: KeysValues | None = None,
) -> tuple[Float[jax.Array, "N F M"], KeysValues | None]:
    """The mel of a list of blocks, and what the next call may look back to. Padding gives anything finite.

    Args:
      memory: of a call before, if ``blocks`` has a past: keys and values of every evaluation,
        [R, ``EVALUATIONS``, S, 2, F, heads, H].
    """
    grid = sway_grid()
    times = evaluation_times(grid)
    moments: Any = dit.apply({"params": params}, times.reshape(-1), method="modulations")
    moments = jax.tree.map(lambda a: a.reshape(*times.shape, *a.shape[1:]), moments)
    numbers = jnp.arange(times.size).reshape(times.shape)

    def velocity(mel: jax.Array, moment: Any, memory: KeysValues | None) -> tuple[jax.Array, KeysValues | None]:
        number, modulations = moment
        here = jax.tree.map(lambda a: a[:, number], memory)
        made: Any = dit.apply({"params": params}, mel, conditions, modulations, blocks, here, method="velocity")
        given, null, there = made
        return guided(given, null), jax.tree.map(lambda a, b: a.at[:, number].set(b), memory, there)

    noise = jnp.where(blocks.valid[..., None], noise, 0)
    return integrate(velocity, noise, grid, (numbers, moments), memory)


def draw_noise(
    seed: UInt32[Array, " N"], index: Int[Array, " N"], shape: tuple[int, ...]
) -> Float[jax.Array, "N F mel"]:
    """The noise of each block, from its request's seed and its place there alone."""

    def one(seed: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), shape)

    return jax.vmap(one)(jnp.asarray(seed), jnp.asarray(index))
