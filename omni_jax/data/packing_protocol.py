"""What the pipeline asks of a packing, whatever model its batches are for; ``packing`` has the Thinker's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from omni_jax.data.examples import Reject
from omni_jax.data.sources import Row


class ExampleLike(Protocol):
    """What a row becomes."""

    @property
    def name(self) -> str:
        """Of the row."""
        ...

    @property
    def num_tokens(self) -> int:
        """What a mixture by tokens counts."""
        ...


class PartLike(Protocol):
    """A stream's part of a batch in the making."""

    @property
    def full(self) -> bool:
        """Whether no example can be placed any more."""
        ...

    @property
    def names(self) -> list[str]:
        """Of the rows whose examples were placed."""
        ...

    def place(self, example: Any) -> bool:
        """Puts an example into it; False if it has no place there. In an empty part each example has a place."""
        ...


class Packing(Protocol):
    """How rows become batches of fixed shapes."""

    @property
    def prepare(self) -> Callable[[Row], Sequence[ExampleLike] | Reject]:
        """From a row to its examples, of which there is at least one. It can be pickled: worker processes call it."""
        ...

    def new_part(self) -> PartLike:
        """An empty part of one stream."""
        ...

    def assemble(self, parts: Sequence[Any], *, first: int, streams: int) -> Any:
        """The batch of a process.

        Args:
          parts: of its streams, in order.
          first: number of the first of its streams.
          streams: of all processes.
        """
        ...

    def measure_fill(self, batch: Any) -> dict[str, float]:
        """How full a batch is, by what it has: numbers of examples, and shares of what there is room for."""
        ...
