"""The contract of every part that streams: what it declares, and its two forms.

A part takes a sequence of input units (frames, codes, tokens) and makes some output units of each. ``apply_sequence``
takes all of it; ``step`` takes the next block and the state that ``init_state`` or the step before returned. Both give
the same outputs, however the sequence is cut. Letters: B rows, T input units, U output units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool

from omni_jax.batch import Array

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Streaming:
    """What a part needs of its input before it can give an output.

    Attributes:
      seconds: length of one input unit.
      block: input units that a step takes; it may take any multiple of them.
      look_ahead: input units beyond a block's end that the block's output needs, so also how late a step's output is.
      look_back: input units before a block's beginning that it needs; None if it needs everything before.
      outputs: output units of one input unit.
    """

    seconds: float
    block: int
    look_ahead: int
    look_back: int | None
    outputs: int = 1

    @property
    def latency(self) -> float:
        """Seconds of input between a block's beginning and its output, computing left aside."""
        return self.seconds * (self.block + self.look_ahead)

    @property
    def receptive_field(self) -> int | None:
        """Input units that a block's output depends on; None if there is no bound."""
        return None if self.look_back is None else self.look_back + self.block + self.look_ahead


@struct.dataclass
class Block:
    """A piece of the input or output of each row.

    Units that are not valid may hold anything, NaN included, and change nothing. Input units before a row's first valid
    one are skipped; those after its last valid one say that the row has ended.
    """

    values: Any  # a tree of arrays [B, T, ...]
    valid: Bool[Array, "B T"]
    row: Any = ()  # what belongs to a row and not to a unit, such as its voice: a tree of arrays [B, ...]


class StreamingPart(Protocol):
    """One part in its two forms. It holds sizes and modules, never parameters or state."""

    @property
    def streaming(self) -> Streaming: ...

    def apply_sequence(self, params: Any, x: Block) -> Block:
        """The output of complete sequences, each of which begins with its row."""
        ...

    def init_state(self, batch: int) -> Any:
        """The state before the first block: a tree of arrays of fixed shape, batch first."""
        ...

    def step(self, params: Any, state: Any, block: Block, active: Bool[Array, " B"] | None = None) -> tuple[Block, Any]:
        """As many output units as the block has inputs, times ``outputs``, ``look_ahead`` input units late.

        Units without an input, before a row's beginning and after its end, are not valid. A row whose ``active`` is
        False takes no step: its state is kept and no output is valid. The state may be donated.
        """
        ...


def keep_rows(active: Bool[Array, " B"] | None, new: Tree, old: Tree) -> Tree:
    """``new`` in the rows that are active and ``old`` in the others, for trees of arrays with the batch first."""
    if active is None:
        # a select over all leaves would copy the state for nothing
        return new

    def select_rows(new: Array, old: Array) -> jax.Array:
        # a flag a row, for rows with any number of further axes
        return jnp.where(jnp.reshape(active, (-1, *[1] * (jnp.ndim(new) - 1))), new, old)  # [B, ...]

    return jax.tree.map(select_rows, new, old)
