"""One harness for the contract of every part that streams (omni_jax/layers/streaming.py)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.layers.streaming import Block, StreamingPart

Rows = list[list[np.ndarray]]  # of each row, the valid units of every leaf of the output


@dataclass(frozen=True)
class Case:
    """A part and what it is tried with.

    Attributes:
      x: rows of several lengths, each valid from its beginning; the first row fills all units. To be perturbed, floats
        become NaN and whole numbers one more, so these must be able to.
      tolerance: of the largest output.
      trains: whether gradients have to agree.
      size: of the larger steps, in blocks, that are mixed with steps of one block.
    """

    part: StreamingPart
    params: Any
    x: Block
    tolerance: float
    trains: bool = False
    size: int = 2

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self.x.valid).sum(axis=1)

    # kept, so that each shape is compiled once a case
    @functools.cached_property
    def apply_sequence(self) -> Callable[..., Any]:
        return jax.jit(self.part.apply_sequence)

    @functools.cached_property
    def step(self) -> Callable[..., Any]:
        return jax.jit(self.part.step)


def check_contract(case: Case) -> None:
    """All of the contract."""
    expected = _apply(case, case.x)
    check_chunking(case, expected)
    check_padding(case, expected)
    check_rows(case, expected)
    check_reach(case, expected)
    if case.trains:
        check_gradients(case)


def check_chunking(case: Case, expected: Rows) -> None:
    """Steps give what ``apply_sequence`` gives, however it is cut, and not later than declared."""
    assert [len(row[0]) for row in expected] == (case.lengths * case.part.streaming.outputs).tolist()
    all_at_once = _padded(case).valid.shape[1] // case.part.streaming.block
    for sizes in ([1], [1, case.size, case.size], [all_at_once]):
        _same(case, _streamed(case, _padded(case), sizes), expected)


def check_padding(case: Case, expected: Rows) -> None:
    """What stands behind a row's end changes nothing, be it NaN."""
    _same(case, _apply(case, _spoilt(case.x)), expected)
    _same(case, _streamed(case, _spoilt(_padded(case)), [1]), expected)


def check_rows(case: Case, expected: Rows) -> None:
    """A row is the same where it goes on while others stand still."""
    x = _padded(case)
    size = case.part.streaming.block
    batch, units = x.valid.shape
    rng = np.random.default_rng(0)
    fed = np.zeros(batch, int)
    state = case.part.init_state(batch)
    pieces = []
    while (fed < units).any():
        active = (rng.random(batch) < 0.6) & (fed < units)
        places = np.minimum(fed[:, None] + np.arange(size), units - 1)
        block = jax.tree.map(lambda a, p=places: a[np.arange(batch)[:, None], p], Block(x.values, x.valid, None))
        block = Block(block.values, block.valid & active[:, None], x.row)
        output, state = case.step(case.params, state, _spoilt(block), active)
        assert not np.asarray(output.valid)[~active].any()
        pieces.append(output)
        fed += size * active
    _same(case, _rows(pieces), expected)


def check_reach(case: Case, expected: Rows) -> None:
    """A block depends on what it is declared to depend on, to the unit and in both directions, and on no other row."""
    about = case.part.streaming
    units = case.x.valid.shape[1]
    begin = ((units - about.look_ahead - 1) // about.block - 1) * about.block
    first = 0 if about.look_back is None else begin - about.look_back
    last = begin + about.block + about.look_ahead - 1
    assert (first > 0 or about.look_back is None) and last + 1 < units, "the first row is too short"
    kept = slice(begin * about.outputs, (begin + about.block) * about.outputs)
    for unit, matters in ((first - 1, False), (first, True), (last, True), (last + 1, False)):
        if unit < 0:  # the part looks back to the beginning
            continue
        other = _apply(case, _perturbed(case.x, unit))
        same = [np.array_equal(a[kept], b[kept]) for a, b in zip(other[0], expected[0], strict=True)]
        assert all(same) is not matters, f"unit {unit} {'does not matter' if matters else 'matters'}"
        _same(case, other[1:], expected[1:])


def check_gradients(case: Case) -> None:
    """The gradients of the parameters, through ``apply_sequence`` and through steps."""
    x = _padded(case)
    half = x.valid.shape[1] // case.part.streaming.block // 2 * case.part.streaming.block

    def weighted_sum(blocks: Sequence[Block]) -> jax.Array:
        total = jnp.float32(0)
        for leaf in range(len(jax.tree.leaves(blocks[0].values))):
            output = jnp.concatenate([jax.tree.leaves(b.values)[leaf] for b in blocks], axis=1)
            valid = jnp.concatenate([b.valid for b in blocks], axis=1)
            place = jnp.cumsum(valid, axis=1).reshape(*valid.shape, *[1] * (output.ndim - 2))
            total += jnp.sum(jnp.where(valid.reshape(place.shape), output * jnp.sin(place), 0))
        return total

    def sum_of_steps(params: Any) -> jax.Array:
        state = case.part.init_state(len(x.valid))
        pieces = []
        for piece in (_piece(x, 0, half), _piece(x, half, x.valid.shape[1])):
            output, state = case.part.step(params, state, piece)
            pieces.append(output)
        return weighted_sum(pieces)

    ours = jax.jit(jax.grad(sum_of_steps))(case.params)
    expected = jax.jit(jax.grad(lambda params: weighted_sum([case.part.apply_sequence(params, case.x)])))(case.params)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert largest > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=case.tolerance * largest), ours, expected)


def _apply(case: Case, x: Block) -> Rows:
    return _rows([case.apply_sequence(case.params, x)])


def _streamed(case: Case, x: Block, sizes: Iterable[int]) -> Rows:
    """What steps of these sizes give; each output comes as late as declared, and no later."""
    about = case.part.streaming
    units = x.valid.shape[1]
    lengths = np.asarray(x.valid).sum(axis=1)
    sizes = itertools.cycle(sizes)
    state = case.part.init_state(len(x.valid))
    shapes = _shapes(state)
    fed = 0
    pieces = []
    while fed < units:
        count = about.block * next(sizes)
        block = _piece(x, fed, fed + (count if fed + count <= units else about.block))
        output, state = case.step(case.params, state, block, np.ones(len(x.valid), bool))
        assert _shapes(state) == shapes, "the state changes its shape"
        fed += block.valid.shape[1]
        pieces.append(output)
        counts = sum(np.asarray(p.valid).sum(axis=1) for p in pieces)
        assert (counts == np.clip(fed - about.look_ahead, 0, lengths) * about.outputs).all()
    return _rows(pieces)


def _shapes(tree: Any) -> list[Any]:
    return [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]


def _rows(pieces: Sequence[Block]) -> Rows:
    valid = np.concatenate([np.asarray(p.valid) for p in pieces], axis=1)
    leaves = zip(*(jax.tree.leaves(p.values) for p in pieces), strict=True)
    joined = [np.concatenate([np.asarray(a) for a in leaf], axis=1) for leaf in leaves]
    return [[leaf[i, valid[i]] for leaf in joined] for i in range(len(valid))]


def _same(case: Case, ours: Rows, expected: Rows) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.shape == b.shape and np.isfinite(b).all()
            np.testing.assert_allclose(a, b, rtol=0, atol=case.tolerance * np.abs(b).max())


def _padded(case: Case) -> Block:
    """The rows with enough units after their end for all outputs to come, whole blocks of them."""
    about = case.part.streaming
    units = case.x.valid.shape[1]
    padding = -(-(units + about.look_ahead) // about.block) * about.block - units

    def pad(a: Any) -> np.ndarray:
        return np.pad(np.asarray(a), ((0, 0), (0, padding), *[(0, 0)] * (a.ndim - 2)))

    return Block(jax.tree.map(pad, case.x.values), pad(case.x.valid), case.x.row)


def _piece(x: Block, begin: int, end: int) -> Block:
    return Block(jax.tree.map(lambda a: a[:, begin:end], x.values), x.valid[:, begin:end], x.row)


def _spoilt(x: Block) -> Block:
    """With NaN, or a number out of any range, wherever nothing is valid."""
    hidden = ~np.asarray(x.valid)

    def one(a: Any) -> np.ndarray:
        a = np.array(a)
        a[hidden] = np.nan if a.dtype.kind == "f" else 12345
        return a

    return Block(jax.tree.map(one, x.values), x.valid, x.row)


def _perturbed(x: Block, unit: int) -> Block:
    def one(a: Any) -> np.ndarray:
        a = np.array(a)
        a[0, unit] = np.nan if a.dtype.kind == "f" else a[0, unit] + 1
        return a

    return Block(jax.tree.map(one, x.values), x.valid, x.row)
