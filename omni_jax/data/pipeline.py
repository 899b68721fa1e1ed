"""Rows to batches without end: mixed, shuffled, divided among processes, decoded by workers, packed.

Everything follows from the configuration and a number: which row comes as the n-th of a source of a stream is a pure
function, and so is what a row becomes. A state is therefore small: of each stream how much it has read of each source,
and the numbers of the few examples that wait for a place. It does not depend on the number of workers, nor, with the
streams fixed, on the number of processes.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import grain
import numpy as np

from omni_jax.data.config import DataConfig
from omni_jax.data.example_reader import ExampleReader
from omni_jax.data.examples import Reject
from omni_jax.data.mixture import Mixer, deal_rows, order_rows
from omni_jax.data.packing_protocol import ExampleLike, Packing, PartLike
from omni_jax.data.rejects import RejectsFile
from omni_jax.data.sources import Files, open_rows
from omni_jax.errors import ConfigError, InputError

PREFETCHED_BATCHES = 2
MIN_ROWS_FOR_SHARE = 1000  # of which the share of rejects is taken at least: a few bad ones at first say nothing
_MAX_REJECTS_IN_A_ROW = 1000  # of a stream; what comes after so many is no better
_MAX_WINDOWS_AHEAD = 64  # of documents that were split; while there are more, no row is read
# of the configuration: they change how rows and media are found, decoded and reported, but no batch
_CHANGEABLE = (
    "train",
    "valid",
    "workers",
    "isolate_media",
    "rejects",
    "max_reject_share",
    "media_root",
    "allow_web",
    "allow_buckets",
)
_MAX_REASONS = 5  # that the error names

State: TypeAlias = dict[str, Any]  # of JSON's types


def batches(config: DataConfig, packing: Packing, *, process_index: int = 0, process_count: int = 1) -> Batches:
    """The batches of a process.

    Args:
      config: which rows, and the budgets.
      packing: from rows to batches.
      process_index: of this process, from 0.
      process_count: how many processes make up a batch.

    Raises:
      ConfigError: if the fields of ``config`` do not go together.
      InputError: if a file of rows cannot be read.
    """
    config.check(process_count)
    sources = [open_rows(path) for path in config.train]
    rejects = Rejects(config, _rejects_path(config.rejects, process_index, process_count), process_count == 1)
    # every process has the same endless orders of rows, and takes each ``streams``-th row of them for a stream
    ordered = order_rows(sources, config.weights, config.seed)
    streams_per_process = config.streams // process_count
    first = process_index * streams_per_process
    streams = []
    for i in range(first, first + streams_per_process):
        examples = [deal_rows(rows, i, config.streams).map(packing.prepare) for rows in ordered]
        mixer = Mixer(config.weights or (1.0,), config.mix_by, i, config.streams)
        streams.append(_Stream(i, examples, mixer, packing, config, rejects))
    # rows that a process reads of each source in an epoch
    sizes = [len(rows) for rows in sources] if config.weights else [sum(map(len, sources))]
    epoch_rows = [size * streams_per_process / config.streams for size in sizes]
    identity = _identity(config, sources)
    return Batches(_PackedBatches(streams, first, config.streams, packing, identity, epoch_rows), rejects)


def _rejects_path(path: Path | None, index: int, count: int) -> Path | None:
    """Each process writes a file of its own."""
    if path is None or count == 1:
        return path
    return path.with_stem(f"{path.stem}-{index}")


def _identity(config: DataConfig, sources: Sequence[Files]) -> dict[str, Any]:
    """What must not change when a run goes on, or its batches would be others. Files may have moved."""
    identity: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if name not in _CHANGEABLE:
            identity[name] = value
    # a list, as it comes back from JSON
    identity["weights"] = list(config.weights)
    identity["rows of data.train"] = [len(rows) for rows in sources]
    return identity


class RowCounts(NamedTuple):
    """How many rows were read, and how many of them cannot be used."""

    read: int
    rejected: int


class Rejects:
    """The rows of all streams of a process that cannot be used, and whether they are too many."""

    def __init__(self, config: DataConfig, path: Path | None, checks_share: bool) -> None:
        """Of no row yet.

        Args:
          config: says how many there may be.
          path: of the file that names them.
          checks_share: whether these are all rows of the run; of several processes the loop adds them up.
        """
        self._config = config
        self._file = RejectsFile(path)
        self._checks_share = checks_share
        self._by_stream: dict[int, RowCounts] = {}
        self._reasons: deque[str] = deque(maxlen=_MAX_REASONS)

    @property
    def counts(self) -> RowCounts:
        """Of all streams of this process."""
        counts = list(self._by_stream.values())
        return RowCounts(sum(count.read for count in counts), sum(count.rejected for count in counts))

    def set_counts(self, stream: int, counts: RowCounts) -> None:
        """Of the stream of this number."""
        self._by_stream[stream] = counts

    def add(self, reject: Reject) -> None:
        """Names a row, which its stream has counted.

        Raises:
          InputError: if it ends the run, or there are too many.
        """
        self._file.add(reject)
        self._reasons.append(str(reject))
        if reject.is_fatal:
            raise InputError(str(reject))
        if self._checks_share:
            self.check(self.counts)

    def check(self, counts: RowCounts) -> None:
        """Raises InputError if of so many rows too many cannot be used."""
        limit = self._config.max_reject_share
        if counts.rejected > limit * max(counts.read, MIN_ROWS_FOR_SHARE):
            raise self.make_error(counts)

    def make_error(self, counts: RowCounts) -> InputError:
        """That of so many rows too many cannot be used."""
        where = "" if self._config.rejects is None else f"; all are in {self._config.rejects}"
        return InputError(
            f"{counts.rejected} of {counts.read} rows cannot be used, over the share of "
            f"{self._config.max_reject_share:g} that data.max_reject_share allows (of at least {MIN_ROWS_FOR_SHARE} "
            f"rows). The last of them{where}:\n" + "\n".join(self._reasons)
        )


class _Place(NamedTuple):
    """Where an example comes from: the number of its row in a source of its stream, and which of the row's it is."""

    source: int
    number: int
    window: int


class _Waiting(NamedTuple):
    place: _Place
    example: ExampleLike


class _Stream:
    """Packs the examples of a stream. The state is that between two parts."""

    def __init__(
        self,
        number: int,
        examples: Sequence[grain.MapDataset],
        mixer: Mixer,
        packing: Packing,
        config: DataConfig,
        rejects: Rejects,
    ) -> None:
        self._number = number  # among all streams
        # at least one worker for each source, where there are any
        workers = -(-config.workers // len(examples))
        # the processes that isolate media belong to this one, whose threads wait for them: grain's may start none
        self._readers = [ExampleReader(rows, workers, in_threads=config.isolate_media) for rows in examples]
        self._mixer = mixer
        self._packing = packing
        self._config = config
        self._rejects = rejects
        self._waiting: list[_Waiting] = []  # that found no place
        self._windows: deque[_Waiting] = deque()  # that follow the first of a document, and were not tried yet
        self._takes_window = False  # whether one of them comes next, and not a row
        self._num_rejected = 0

    @property
    def rows_read(self) -> list[int]:
        """Of each source that is mixed."""
        return self._mixer.get_state()["rows"]

    def fill_part(self) -> PartLike:
        """Fills the next part: first with those that wait, the oldest first, then with what comes.

        Raises:
          InputError: if too many rows cannot be used.
        """
        part = self._packing.new_part()
        # the oldest one is placed for certain, since the part is empty and each example fits alone: none waits forever
        waiting: list[_Waiting] = []
        for waiter in self._waiting:
            self._place(waiter, part, waiting)

        # then new ones, until the part is full or as many wait as may
        while len(waiting) < self._config.lookahead and not part.full:
            self._place(self._next_example(), part, waiting)
        self._waiting = waiting
        return part

    def _place(self, waiter: _Waiting, part: PartLike, waiting: list[_Waiting]) -> None:
        """Puts an example into the part, or into ``waiting``."""
        # a window waits where one before it does, if they are to stay in order
        row = waiter.place[:2]
        comes_too_soon = self._config.windows_in_order and any(other.place[:2] == row for other in waiting)
        if comes_too_soon or not part.place(waiter.example):
            waiting.append(waiter)

    def _next_example(self) -> _Waiting:
        """The next example: in turn one of a document that was split and one of a new row."""
        in_order = self._config.windows_in_order
        if self._windows and (in_order or self._takes_window or len(self._windows) >= _MAX_WINDOWS_AHEAD):
            self._takes_window = False
            return self._windows.popleft()
        self._takes_window = True
        for _ in range(_MAX_REJECTS_IN_A_ROW):
            source = self._mixer.choose()
            number = self._mixer.next_row(source)
            element = self._readers[source].read(number)
            if not isinstance(element, Reject):
                self._mixer.add(source, sum(example.num_tokens for example in element))
                self._count_rows()
                first, *others = [_Waiting(_Place(source, number, i), example) for i, example in enumerate(element)]
                self._windows.extend(others)
                return first
            self._mixer.add(source, 0)
            self._num_rejected += 1
            self._count_rows()
            self._rejects.add(element)
        raise self._rejects.make_error(self._rejects.counts)

    def _count_rows(self) -> None:
        self._rejects.set_counts(self._number, RowCounts(self._mixer.num_rows, self._num_rejected))

    def get_state(self) -> State:
        # numbers instead of examples: a row becomes the same ones again
        return {
            "read": self._mixer.get_state(),
            "rejected": self._num_rejected,
            "waiting": [list(waiter.place) for waiter in self._waiting],
            "windows": [list(waiter.place) for waiter in self._windows],
            "takes_window": self._takes_window,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        # workers read ahead from the old place
        self.close()
        self._mixer.set_state(state["read"])
        self._num_rejected = state["rejected"]
        self._takes_window = state["takes_window"]
        rows: dict[tuple[int, int], Any] = {}  # of a long document several windows may wait
        self._waiting = [self._read_again(place, rows) for place in state["waiting"]]
        self._windows = deque(self._read_again(place, rows) for place in state["windows"])
        self._count_rows()

    def _read_again(self, place: Sequence[int], rows: dict[tuple[int, int], Any]) -> _Waiting:
        source, number, window = place
        if (source, number) not in rows:
            # decoded here: there are few, and the readers begin after them
            rows[source, number] = self._readers[source][number]
        element = rows[source, number]
        if isinstance(element, Reject):
            raise InputError(f"a row that could be used before cannot be used now: {element}")
        return _Waiting(_Place(source, number, window), element[window])

    def close(self) -> None:
        """Stops the workers; they start again when they are needed."""
        for reader in self._readers:
            reader.close()


class _NamedBatch(NamedTuple):
    batch: Any
    rows: tuple[str, ...]  # names of the rows in it
    epochs: tuple[float, ...]  # read of each source that is mixed, when it was made


class _PackedBatches:
    """The batches of a process, each made when it is asked for."""

    def __init__(
        self,
        streams: Sequence[_Stream],
        first: int,
        num_streams: int,
        packing: Packing,
        identity: dict[str, Any],
        epoch_rows: Sequence[float],
    ) -> None:
        self._streams = streams
        self._first = first
        self._num_streams = num_streams  # of all processes
        self._packing = packing
        self._identity = identity
        self._epoch_rows = epoch_rows

    def __iter__(self) -> Iterator[_NamedBatch]:
        return self

    def __next__(self) -> _NamedBatch:
        parts = [stream.fill_part() for stream in self._streams]
        batch = self._packing.assemble(parts, first=self._first, streams=self._num_streams)
        names: list[str] = []
        for part in parts:
            names += part.names
        rows_read = np.sum([stream.rows_read for stream in self._streams], axis=0)  # [sources]
        epochs = tuple(float(rows / of_epoch) for rows, of_epoch in zip(rows_read, self._epoch_rows, strict=True))
        return _NamedBatch(batch, tuple(names), epochs)

    def get_state(self) -> State:
        states = {}
        for i, stream in enumerate(self._streams):
            # by its number among all streams, so that any other number of processes finds its own
            states[str(self._first + i)] = stream.get_state()
        return {"data": self._identity, "streams": states}

    def set_state(self, state: Mapping[str, Any]) -> None:
        # all that would make other batches is named at once
        changes = []
        for key, value in self._identity.items():
            before = state["data"].get(key)
            if before != value:
                changes.append(f"{key} was {before!r} and is {value!r}")
        if changes:
            raise ConfigError(
                f"the data cannot go on where the checkpoint left it: {', '.join(changes)}; start a new run from it"
            )
        for i, stream in enumerate(self._streams):
            stream.set_state(state["streams"][str(self._first + i)])

    def close(self) -> None:
        for stream in self._streams:
            stream.close()


class Batches(grain.DatasetIterator[Any]):
    """The batches of a process, without end; a few are made ahead by a thread.

    The leaves of all processes are to be put one after the other on their leading axes: what counts over a batch, like
    ``media_index``, counts over that of the whole step.

    Attributes:
      rows: file and number of each row in the batch that came last.
      epochs: how often the rows of each file were read until it was made; without weights, those of all files together.
      rejects: the rows that cannot be used.
    """

    def __init__(self, packing: _PackedBatches, rejects: Rejects) -> None:
        super().__init__()
        self.rejects = rejects
        # in a list, so that ``_stop`` can take the iterator out of it without holding this object
        self._running: list[grain.DatasetIterator] = [
            grain.experimental.ThreadPrefetchDatasetIterator(packing, PREFETCHED_BATCHES)
        ]
        # also at the end of the program, before the modules that it takes are gone
        self._stop = weakref.finalize(self, _stop, self._running, packing)
        self.rows: tuple[str, ...] = ()
        self.epochs: tuple[float, ...] = ()

    def __next__(self) -> Any:
        """Raises InputError if too many rows cannot be used."""
        batch, self.rows, self.epochs = next(self._running[0])
        return batch

    def get_state(self) -> State:
        """What the next batch follows from; the union of ``streams`` of all processes fits each of them."""
        # grain keeps the state behind each batch beside it, so those that were made ahead do not count
        return self._running[0].get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was taken.

        Raises:
          ConfigError: if the configuration has changed in what makes the batches.
          InputError: if a row of the state can no longer be used.
        """
        self._running[0].set_state(dict(state))

    def start_prefetch(self) -> None:
        """Begins with the first batch before it is asked for."""
        self._running[0].start_prefetch()

    def close(self) -> None:
        """Stops the thread and the workers, for good."""
        self._stop()


def _stop(running: list[grain.DatasetIterator], packing: _PackedBatches) -> None:
    # the thread first, because it reads from the streams
    running.pop().close()
    packing.close()
