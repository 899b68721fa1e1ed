"""The flow solved plainly: what the streamed one is compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from omni_jax.models.dit import NO_BLOCK, Blocks, DiT, pack
from omni_jax.models.flow_matching import evaluation_times, sway_grid


def cut(frames: np.ndarray, count: int, size: int) -> np.ndarray:
    """So many blocks, zeros after the end."""
    out = np.zeros((count * size, *frames.shape[1:]), frames.dtype)
    out[: len(frames)] = frames
    return out.reshape(count, size, *frames.shape[1:])


def plainly_windowed(dit: DiT, params: Any, codes: np.ndarray, noise: np.ndarray, speaker: Any) -> np.ndarray:
    """Block after block, each in [b - 2, b + 1] as if that were all of the request."""
    size, made = dit.config.block_size, []
    for block in range(-(-len(codes) // size)):
        begin = max(block - 2, 0)
        part = slice(begin * size, (block + 2) * size)
        blocks, _ = pack([len(codes[part])], size, 4)
        window = _solve(dit, params, cut(codes[part], 4, size), cut(noise[part], 4, size), speaker, blocks)
        made.append(window[block - begin])
    return np.concatenate(made)[: len(codes)]


def plainly_carried(dit: DiT, params: Any, codes: np.ndarray, noise: np.ndarray, speaker: Any) -> np.ndarray:
    """All blocks at once: each looks back at the one before and ahead at a copy, which looks back at it alone."""
    size = dit.config.block_size
    count = -(-len(codes) // size)
    shown = [*range(count), *range(1, count)]
    valid = cut(np.ones(len(codes), bool), count, size)[shown]
    before = [NO_BLOCK, *range(count - 1), *range(count - 1)]
    after = [*range(count, 2 * count - 1), NO_BLOCK, *[NO_BLOCK] * (count - 1)]
    blocks = Blocks(*(np.array(a) for a in (shown, valid, before, after)))
    every = (cut(a, count, size)[shown] for a in (codes, noise))
    return _solve(dit, params, *every, speaker, blocks)[:count].reshape(-1, noise.shape[1])[: len(codes)]


@functools.cache
def _velocity(dit: DiT) -> Callable[..., Any]:
    """The offline evaluation at one time, with guidance."""

    def one(params: Any, mel: Any, conditions: Any, time: Any, blocks: Blocks) -> jax.Array:
        moments: Any = dit.apply({"params": params}, time[None], method="modulations")
        moment = jax.tree.map(lambda a: a[0], moments)
        made: Any = dit.apply({"params": params}, mel, conditions, moment, blocks, method="velocity")
        return made[0] + 0.5 * (made[0] - made[1])

    return jax.jit(one)


def _solve(dit: DiT, params: Any, codes: Any, noise: Any, speaker: Any, blocks: Blocks) -> np.ndarray:
    """Runge and Kutta's 3/8 rule, written out. Codes [N, F], noise [N, F, M]"""
    rows, cond = (np.repeat(a[None], len(codes), axis=0) for a in speaker)
    conditions = dit.apply({"params": params}, codes, rows, cond, method="conditions")
    y, grid = np.where(blocks.valid[..., None], noise, 0).astype(np.float32), sway_grid()
    for begin, end, times in zip(grid[:-1], grid[1:], evaluation_times(grid), strict=True):
        h = end - begin

        def slope(value: np.ndarray, time: np.float32) -> np.ndarray:
            return np.asarray(_velocity(dit)(params, value, conditions, time, blocks))

        k1 = slope(y, times[0])
        k2 = slope(y + h * k1 / 3, times[1])
        k3 = slope(y + h * (k2 - k1 / 3), times[2])
        k4 = slope(y + h * (k1 - k2 + k3), times[3])
        y = y + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8
    return y
