"""The flow of Token2Wav: from noise to mel along the velocity of the DiT (docs/reference.md, 8.5 and 8.8).

Letters: N blocks, F frames of a block, M mel bins, R streams with a cache, E evaluations; T steps of the solver with S
stages each and K slopes that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, UInt32

from omni_jax.batch import Array
from omni_jax.models.dit import Conditions, DiT, DiTCache, Modulations
from omni_jax.models.dit_blocks import Blocks
from omni_jax.models.ode_solver import Solver, SolverTable

Carry = TypeVar("Carry")
Moment = TypeVar("Moment")


GUIDANCE_SCALE = 0.5  # the reference's; no file holds it


def guided_velocity(cond: jax.Array, uncond: jax.Array | None) -> jax.Array:
    """Classifier-free guidance, added on top of the conditional velocity, which it is without guidance."""
    return cond if uncond is None else cond + (cond - uncond) * GUIDANCE_SCALE


def integrate(
    velocity: Callable[[jax.Array, Moment, Carry], tuple[jax.Array, Carry]],
    start: Float[Array, "*shape"],
    table: SolverTable,
    moments: Moment,
    carry: Carry,
) -> tuple[Float[jax.Array, "*shape"], Carry]:
    """Integrates ``velocity`` from ``start`` through all steps of a rule.

    Args:
      velocity: (value, moment, carry) to the derivative of the value, and the carry for the next evaluation.
      start: the value at time 0.
      table: the rule.
      moments: what ``velocity`` needs to know of the time: a tree of arrays [T, S, ...], in the order of
        ``table.times``.
      carry: a tree of arrays that goes from each evaluation to the next.
    """

    def take_step(state: Any, inputs: Any) -> tuple[Any, None]:
        value, slopes, carry = state
        size, stages, weights = inputs

        def evaluate_stage(state: Any, stage: Any) -> tuple[Any, None]:
            slopes, carry = state
            slot, coefficients, moment = stage
            # slopes of the stages to come have coefficients of 0
            slope, carry = velocity(value + size * _combine_slopes(coefficients, slopes), moment, carry)
            return (slopes.at[slot].set(slope), carry), None

        # scans within scans: the network is compiled once, and not for each evaluation
        (slopes, carry), _ = jax.lax.scan(evaluate_stage, (slopes, carry), stages)
        return (value + size * _combine_slopes(weights, slopes), slopes, carry), None

    start = jnp.asarray(start)
    slopes = jnp.zeros((table.weights.shape[1], *start.shape), start.dtype)  # [K, *shape]
    stages = (jnp.asarray(table.slots), jnp.asarray(table.coefficients), moments)
    inputs = (jnp.asarray(table.sizes), stages, jnp.asarray(table.weights))
    (end, _, carry), _ = jax.lax.scan(take_step, (start, slopes, carry), inputs)
    return end, carry


def _combine_slopes(weights: Float[jax.Array, " K"], slopes: jax.Array) -> jax.Array:
    """The weighted sum of slopes [K, *shape]. [*shape]"""
    # a sum and no matrix product, which a TPU would compute in bfloat16 passes
    total = weights[0] * slopes[0]
    for number in range(1, len(slopes)):
        total += weights[number] * slopes[number]
    return total


def solve(
    dit: DiT,
    params: Any,
    noise: Float[Array, "N F M"],
    conditions: Conditions,
    blocks: Blocks,
    cache: DiTCache | None = None,
    solver: Solver = Solver(),  # noqa: B008, frozen
) -> tuple[Float[jax.Array, "N F M"], DiTCache | None]:
    """The mel of a list of blocks.

    Args:
      dit: the network.
      params: its parameters.
      noise: standard normal; the mel at time 0.
      conditions: of each block; without those of guidance where the solver has none.
      blocks: which of them are neighbours.
      cache: of the call before, if ``blocks`` has cached ones: keys and values of every evaluation,
        [R, E, layers, halves, F, heads, H].
      solver: how the flow is integrated; its number of evaluations is E.

    Returns:
      Log-mel, anything finite where there is padding, and the cache for the next call.
    """
    times = solver.table.times
    # for all times at once, so that each layer's weights are read once
    modulations: Any = dit.apply({"params": params}, times.reshape(-1), method="modulations")
    modulations = jax.tree.map(lambda a: a.reshape(*times.shape, *a.shape[1:]), modulations)  # [T, S, ...]
    # the number of each evaluation, which selects its part of the cache
    numbers = jnp.arange(times.size).reshape(times.shape)

    def evaluate(
        mel: jax.Array, moment: tuple[jax.Array, Modulations], cache: DiTCache | None
    ) -> tuple[jax.Array, DiTCache | None]:
        number, modulation = moment
        evaluation = jax.tree.map(lambda a: a[:, number], cache)  # [R, layers, halves, F, heads, H]
        arguments = (mel, conditions, modulation, blocks, evaluation)
        outputs: Any = dit.apply({"params": params}, *arguments, method="velocity")
        cond, uncond, new = outputs
        # written in place: the cache of all evaluations is large, and there is never a second one
        cache = jax.tree.map(lambda a, b: a.at[:, number].set(b), cache, new)
        return guided_velocity(cond, uncond), cache

    with jax.named_scope("flow_matching"):
        noise = jnp.where(blocks.valid[..., None], noise, 0)  # [N, F, M]
        return integrate(evaluate, noise, solver.table, (numbers, modulations), cache)


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
