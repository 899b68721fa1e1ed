"""The flow solved plainly: what the streamed one is compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from omni_jax.models.dit import DiT
from omni_jax.models.dit_blocks import NO_BLOCK, Blocks
from omni_jax.models.ode_solver import Solver, sway_grid


def cut(frames: np.ndarray, count: int, size: int) -> np.ndarray:
    """So many blocks, zeros after the end."""
    out = np.zeros((count * size, *frames.shape[1:]), frames.dtype)
    out[: len(frames)] = frames
    return out.reshape(count, size, *frames.shape[1:])


def plainly_carried(
    dit: DiT,
    params: Any,
    codes: np.ndarray,
    noise: np.ndarray,
    speaker: Any,
    solver: Solver = Solver(),  # noqa: B008, frozen
) -> np.ndarray:
    """All blocks at once: each looks back at the one before and ahead at a copy, which looks back at it alone."""
    size = dit.config.block_size
    count = -(-len(codes) // size)
    shown = [*range(count), *range(1, count)]
    before = [NO_BLOCK, *range(count - 1), *range(count - 1)]
    after = [*range(count, 2 * count - 1), NO_BLOCK, *[NO_BLOCK] * (count - 1)]
    valid = cut(np.ones(len(codes), bool), count, size)[shown]
    blocks = Blocks(np.array(shown), valid, np.array(before), np.array(after))
    codes_in_blocks = cut(codes, count, size)[shown]
    noise_in_blocks = cut(noise, count, size)[shown]
    mel = _solve(dit, params, codes_in_blocks, noise_in_blocks, speaker, blocks, solver)[:count]
    return mel.reshape(-1, noise.shape[1])[: len(codes)]


@functools.cache
def _velocity(dit: DiT, guidance: bool) -> Callable[..., Any]:
    """The offline evaluation at one time; without guidance what is given alone counts."""

    def one(params: Any, mel: Any, conditions: Any, time: Any, blocks: Blocks) -> jax.Array:
        moments: Any = dit.apply({"params": params}, time[None], method="modulations")
        moment = jax.tree.map(lambda a: a[0], moments)
        velocities: Any = dit.apply({"params": params}, mel, conditions, moment, blocks, method="velocity")
        cond, uncond, _ = velocities
        return cond + 0.5 * (cond - uncond) if guidance else cond

    return jax.jit(one)


@functools.cache
def _conditions(dit: DiT) -> Callable[..., Any]:
    return jax.jit(lambda params, *inputs: dit.apply({"params": params}, *inputs, method="conditions"))


def _solve(dit: DiT, params: Any, codes: Any, noise: Any, speaker: Any, blocks: Blocks, solver: Solver) -> np.ndarray:
    """Runge and Kutta's 3/8 rule, or Euler's, written out. Codes [N, F], noise [N, F, M]"""
    rows, cond = (np.repeat(a[None], len(codes), axis=0) for a in speaker)  # each block has the same voice
    conditions = _conditions(dit)(params, codes, rows, cond)
    y = np.where(blocks.valid[..., None], noise, 0).astype(np.float32)
    grid = sway_grid(solver.steps)
    # the reference's times to the last bit, for the network reads them in thousandths
    for begin, end, times in zip(grid[:-1], grid[1:], solver.table.times, strict=True):
        h = end - begin

        def slope(value: np.ndarray, time: np.float32) -> np.ndarray:
            return np.asarray(_velocity(dit, solver.guidance)(params, value, conditions, time, blocks))

        if solver.method == "euler":
            y = y + h * slope(y, begin)
            continue
        k1 = slope(y, times[0])
        k2 = slope(y + h * k1 / 3, times[1])
        k3 = slope(y + h * (k2 - k1 / 3), times[2])
        k4 = slope(y + h * (k1 - k2 + k3), times[3])
        y = y + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8
    return y
