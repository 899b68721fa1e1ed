"""Batches of which each row is one example."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from omni_jax.data.packing_protocol import ExampleLike

Example = TypeVar("Example", bound=ExampleLike)


@dataclass
class SinglePart(Generic[Example]):
    """A stream's part of a batch in the making.

    Attributes:
      rows: that it has.
      examples: of the first of them.
    """

    rows: int
    examples: list[Example] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.examples) == self.rows

    @property
    def names(self) -> list[str]:
        """Of the rows of files whose examples were placed."""
        return [example.name for example in self.examples]

    def place(self, example: Example) -> bool:
        """Puts an example into the next row; False if there is none."""
        if self.full:
            return False
        self.examples.append(example)
        return True
