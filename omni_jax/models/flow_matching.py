"""The flow of Token2Wav: from noise to mel along the velocity of the DiT (docs/reference.md, 8.5 and 8.8).

The time grid, the guidance scale and the rule of the solver are the reference's constants; no file holds them.

Letters: N blocks, F frames of a block, M mel bins, R streams with a cache, S layers that look back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt32

from omni_jax.batch import Array
from omni_jax.models.dit import Blocks, Conditions, DiT, DiTCache, Modulations

Carry = TypeVar("Carry")
Moment = TypeVar("Moment")

POINTS = 10  # of the grid: nine steps between them
EVALUATIONS = 4 * (POINTS - 1)
GUIDANCE_SCALE = 0.5

# Runge and Kutta's fourth order, the 3/8 rule: the time of each stage within its step, its coefficients of the slopes
# before it, and its weight in the sum
# float32, so that numpy computes the times of evaluations in float32 too
_STAGE_TIMES = np.array([0, 1 / 3, 2 / 3, 1], np.float32)
_STAGE_COEFFICIENTS = np.array([[0, 0, 0, 0], [1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0]], np.float32)
_STAGE_WEIGHTS = np.array([1, 3, 3, 1], np.float32) / np.float32(8)
_STAGES = len(_STAGE_TIMES)


def sway_grid(points: int = POINTS) -> np.ndarray:
    """Times from 0 to 1, close together at the beginning: 1 - cos(pi u / 2) of even ones. float32 [points]"""
    u = np.linspace(0, 1, points, dtype=np.float32)
    # in the reference's order of operations, so that the times are its times to the last bit
    return u - (np.cos(np.float32(np.pi / 2) * u) - 1 + u)


def evaluation_times(grid: np.ndarray) -> np.ndarray:
    """The times at which the velocity is evaluated: four in each step. float32 [steps, 4]"""
    times = grid[:-1, None] + np.diff(grid)[:, None] * _STAGE_TIMES
    # exactly the grid's, and not a rounding beside it
    times[:, -1] = grid[1:]
    return times.astype(np.float32)


def guided_velocity(cond: jax.Array, uncond: jax.Array) -> jax.Array:
    """Classifier-free guidance, added on top of the conditional velocity."""
    return cond + (cond - uncond) * GUIDANCE_SCALE


def integrate(
    velocity: Callable[[jax.Array, Moment, Carry], tuple[jax.Array, Carry]],
    start: Float[Array, "*shape"],
    grid: np.ndarray,
    moments: Moment,
    carry: Carry,
) -> tuple[Float[jax.Array, "*shape"], Carry]:
    """Integrates ``velocity`` from ``start`` through ``grid``.

    Args:
      velocity: (value, moment, carry) to the derivative of the value, and the carry for the next evaluation.
      start: the value at the grid's first time.
      grid: times, float32 [steps + 1].
      moments: what ``velocity`` needs to know of the time: a tree of arrays [steps, 4, ...], in the order of
        ``evaluation_times``.
      carry: a tree of arrays that goes from each evaluation to the next.
    """

    def evaluate_stage(state: Any, inputs: Any) -> tuple[Any, None]:
        value, size, slopes, carry = state
        number, coefficients, moment = inputs
        # slopes of the stages to come are zeros, and so are their coefficients
        slope, carry = velocity(value + size * _combine_slopes(coefficients, slopes), moment, carry)
        return (value, size, slopes.at[number].set(slope), carry), None

    def take_step(state: tuple[jax.Array, Carry], inputs: Any) -> tuple[tuple[jax.Array, Carry], None]:
        value, carry = state
        size, moments = inputs
        slopes = jnp.zeros((_STAGES, *value.shape), value.dtype)  # [4, *shape]
        # scans within scans: the network is compiled once, and not for each of 36 evaluations
        stages = (jnp.arange(_STAGES), jnp.asarray(_STAGE_COEFFICIENTS), moments)
        (_, _, slopes, carry), _ = jax.lax.scan(evaluate_stage, (value, size, slopes, carry), stages)
        return (value + size * _combine_slopes(jnp.asarray(_STAGE_WEIGHTS), slopes), carry), None

    sizes = jnp.asarray(np.diff(grid))
    return jax.lax.scan(take_step, (jnp.asarray(start), carry), (sizes, moments))[0]


def _combine_slopes(weights: jax.Array, slopes: jax.Array) -> jax.Array:
    # a sum and no matrix product, which a TPU would compute in bfloat16 passes
    total = weights[0] * slopes[0]
    for stage in range(1, _STAGES):
        total += weights[stage] * slopes[stage]
    return total


def solve(
    dit: DiT,
    params: Any,
    noise: Float[Array, "N F M"],
    conditions: Conditions,
    blocks: Blocks,
    cache: DiTCache | None = None,
) -> tuple[Float[jax.Array, "N F M"], DiTCache | None]:
    """The mel of a list of blocks.

    Args:
      dit: the network.
      params: its parameters.
      noise: standard normal; the mel at time 0.
      conditions: of each block.
      blocks: which of them are neighbours.
      cache: of the call before, if ``blocks`` has cached ones: keys and values of every evaluation,
        [R, ``EVALUATIONS``, S, 2, F, heads, H].

    Returns:
      Log-mel, anything finite where there is padding, and the cache for the next call.
    """
    grid = sway_grid()
    times = evaluation_times(grid)
    # for all times at once, so that each layer's weights are read once
    modulations: Any = dit.apply({"params": params}, times.reshape(-1), method="modulations")
    modulations = jax.tree.map(lambda a: a.reshape(*times.shape, *a.shape[1:]), modulations)  # [steps, 4, ...]
    # the number of each evaluation, which selects its part of the cache
    numbers = jnp.arange(times.size).reshape(times.shape)

    def guided_evaluation(
        mel: jax.Array, moment: tuple[jax.Array, Modulations], cache: DiTCache | None
    ) -> tuple[jax.Array, DiTCache | None]:
        number, modulation = moment
        evaluation = jax.tree.map(lambda a: a[:, number], cache)  # [R, S, 2, F, heads, H]
        arguments = (mel, conditions, modulation, blocks, evaluation)
        outputs: Any = dit.apply({"params": params}, *arguments, method="velocity")
        cond, uncond, new = outputs
        # written in place: the cache of all evaluations is large, and there is never a second one
        cache = jax.tree.map(lambda a, b: a.at[:, number].set(b), cache, new)
        return guided_velocity(cond, uncond), cache

    with jax.named_scope("flow_matching"):
        noise = jnp.where(blocks.valid[..., None], noise, 0)  # [N, F, M]
        return integrate(guided_evaluation, noise, grid, (numbers, modulations), cache)


def draw_noise(seed: UInt32[Array, " N"], index: Int[Array, " N"], shape: tuple[int, ...]) -> Float[jax.Array, "N F M"]:
    """Standard normal noise of each block, from its request's seed and its index there alone.

    Args:
      seed: of each block's request.
      index: of each block in its request.
      shape: of a block.
    """

    def draw_block(seed: jax.Array, index: jax.Array) -> jax.Array:
        # by request and place: so a block has one noise, whatever is computed beside it
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), shape)

    return jax.vmap(draw_block)(jnp.asarray(seed), jnp.asarray(index))
