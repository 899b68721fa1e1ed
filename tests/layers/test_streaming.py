"""The contract's arithmetic, and that its harness finds what is wrong."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.layers.streaming import Block, Streaming, keep_rows
from tests.streaming import Case, check_contract

RIGHT = Streaming(seconds=0.02, block=2, look_ahead=2, look_back=4)


@dataclass(frozen=True)
class Smoothing:
    """Of every two units, the sum of the two before last, of themselves and of the next two; times a parameter."""

    streaming: Streaming = RIGHT
    forgets: bool = False  # where a row stood still
    leaks: bool = False  # what is not valid

    def _clean(self, x: Block) -> jnp.ndarray:
        return jnp.asarray(x.values) if self.leaks else jnp.where(x.valid, x.values, 0)

    def apply_sequence(self, params: Any, x: Block) -> Block:
        pairs = jnp.pad(self._clean(x), ((0, 0), (4, 2)))
        pairs = pairs.reshape(len(x.valid), -1, 2).sum(axis=2)
        sums = pairs[:, :-3] + pairs[:, 2:-1] + pairs[:, 3:]
        return Block(jnp.repeat(params * sums, 2, axis=1), x.valid)

    def init_state(self, batch: int) -> Any:
        return jnp.zeros((batch, 6)), jnp.zeros((batch, 2), bool)

    def step(self, params: Any, state: Any, block: Block, active: Any = None) -> tuple[Block, Any]:
        values = jnp.concatenate([state[0], self._clean(block)], axis=1)
        valid = jnp.concatenate([state[1], block.valid], axis=1)
        output = self.apply_sequence(params, Block(values, jnp.ones(values.shape, bool))).values[:, 4:-2]
        new = values[:, -6:], valid[:, -2:]
        real = valid[:, :-2] if active is None else valid[:, :-2] & active[:, None]
        return Block(output, real), new if self.forgets else keep_rows(active, new, state)


def case(part: Smoothing) -> Case:
    rng = np.random.default_rng(0)
    lengths = np.array([16, 1, 11])
    valid = np.arange(16) < lengths[:, None]
    return Case(part, np.float32(3), Block(rng.standard_normal((3, 16), np.float32), valid), 1e-6, trains=True)


def test_declared_numbers() -> None:
    assert RIGHT.latency == pytest.approx(0.08)
    assert RIGHT.receptive_field == 8
    assert dataclasses.replace(RIGHT, look_back=None).receptive_field is None


def test_rows_that_stand_still_are_kept() -> None:
    new, old = {"a": jnp.ones((3, 2)), "b": jnp.ones(3)}, {"a": jnp.zeros((3, 2)), "b": jnp.zeros(3)}
    kept = keep_rows(np.array([True, False, True]), new, old)
    assert np.asarray(kept["a"]).tolist() == [[1, 1], [0, 0], [1, 1]]
    assert np.asarray(kept["b"]).tolist() == [1, 0, 1]
    assert keep_rows(None, new, old) is new


def test_a_sound_part_passes() -> None:
    check_contract(case(Smoothing()))


@pytest.mark.parametrize(
    "part",
    [
        Smoothing(dataclasses.replace(RIGHT, look_ahead=4)),
        Smoothing(dataclasses.replace(RIGHT, look_ahead=0)),
        Smoothing(dataclasses.replace(RIGHT, look_back=2)),
        Smoothing(dataclasses.replace(RIGHT, look_back=6)),
        Smoothing(dataclasses.replace(RIGHT, outputs=2)),
        Smoothing(forgets=True),
        Smoothing(leaks=True),
    ],
    ids=["too_late", "too_early", "looks_further_back", "looks_less_far_back", "fewer_outputs", "forgets", "leaks"],
)
def test_the_harness_finds(part: Smoothing) -> None:
    with pytest.raises(AssertionError):
        check_contract(case(part))
