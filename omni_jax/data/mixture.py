"""Which row a stream reads next: each source in an endless order of its own, and sources as their weights say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import grain
import numpy as np

from omni_jax.data.sources import Files, Row

MixBy: TypeAlias = Literal["rows", "tokens"]

_GOLDEN = 0.6180339887  # multiples of it, without their whole part, are spread evenly


class NumberedRows:
    """Rows that know which source they are of."""

    def __init__(self, rows: Files, source: int) -> None:
        self._rows = rows
        self._source = source

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]._replace(source=self._source)


def order_rows(sources: Sequence[Files], weights: Sequence[float], seed: int) -> list[grain.MapDataset]:
    """The sources that are mixed, each with its rows without end, in another order each epoch.

    Args:
      sources: of rows.
      weights: of each; without any, all are one source, so that an epoch is every row of all of them.
      seed: of the orders.
    """
    numbered = [NumberedRows(rows, i) for i, rows in enumerate(sources)]
    if not weights:
        return [grain.MapDataset.source(Files(numbered)).shuffle(seed=seed).repeat()]
    # with one seed for all, files of equal length would be shuffled alike
    seeds = np.random.SeedSequence(seed).generate_state(len(sources))
    ordered = []
    for rows, own_seed in zip(numbered, seeds, strict=True):
        # repeated after the shuffle, because grain then shuffles each epoch with another seed
        ordered.append(grain.MapDataset.source(rows).shuffle(seed=int(own_seed)).repeat())
    return ordered


def deal_rows(ordered: grain.MapDataset, stream: int, num_streams: int) -> grain.MapDataset:
    """The rows of a source that one of several streams reads, without end; every row goes to one stream."""
    return ordered.slice(slice(stream, None, num_streams))


class Mixer:
    """Decides from which source a stream reads next, so that what it has read is as the weights say.

    The source comes next whose amount, divided by its weight, is least. Each stream begins within a turn of each
    source at a place of its own, so that the streams of a batch do not all read the rarest source at once.
    """

    def __init__(self, weights: Sequence[float], mix_by: MixBy, stream: int, num_streams: int) -> None:
        """Begins with nothing read.

        Args:
          weights: of the sources.
          mix_by: what the weights count.
          stream: number of this stream.
          num_streams: of all streams.
        """
        self._weights = np.asarray(weights, np.float64)  # [N]
        self._mix_by = mix_by
        # from 0 to 1, spread evenly over the streams, and for each source in another order
        place = (stream + 0.5) / num_streams
        self._offset = (place + _GOLDEN * np.arange(len(weights))) % 1.0  # [N]
        self._rows = np.zeros(len(weights), np.int64)
        self._tokens = np.zeros(len(weights), np.int64)

    def choose(self) -> int:
        """The source of the next row."""
        amounts = self._rows if self._mix_by == "rows" else self._tokens
        # the offset is a part of a row, as long as the source's rows are on average; of all sources before its first
        mean = np.where(self._rows > 0, amounts / np.maximum(self._rows, 1), amounts.sum() / max(1, self._rows.sum()))
        return int(np.argmin((amounts + self._offset * np.maximum(mean, 1.0)) / self._weights))

    def add(self, source: int, num_tokens: int) -> None:
        """Counts a row that was read; of one that cannot be used there are no tokens."""
        self._rows[source] += 1
        self._tokens[source] += num_tokens

    @property
    def num_rows(self) -> int:
        """That were read, of all sources."""
        return int(self._rows.sum())

    def next_row(self, source: int) -> int:
        """How many rows of a source were read, which is the number of the next one."""
        return int(self._rows[source])

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._rows.tolist(), "tokens": self._tokens.tolist()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._rows = np.asarray(state["rows"], np.int64)
        self._tokens = np.asarray(state["tokens"], np.int64)
