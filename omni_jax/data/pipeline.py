"""Rows to batches without end: mixed, shuffled, divided among processes, decoded by workers, packed.

Everything follows from the configuration and a number: which row comes as the n-th of a stream is a pure function, and
so is what a row becomes. A state is therefore small: of each stream the number of the next row, and those of the few
examples that wait for a place. It does not depend on the number of workers, nor, with the streams fixed, on the number
of processes.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import grain
import numpy as np
from absl import flags

from omni_jax.batch import TrainBatch
from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.examples import Example, Prepare, Reject
from omni_jax.data.packing import Budget, Part, assemble
from omni_jax.data.rejects import RejectsFile
from omni_jax.data.sources import Files, open_rows
from omni_jax.errors import ConfigError, InputError
from omni_jax.processing.media_workers import isolate
from omni_jax.processing.processor import Processor

PREFETCHED_BATCHES = 2
_DECODING_THREADS = 2  # where there are no workers
_PREFETCHED_EXAMPLES = 4  # of each worker, or of the threads together
# The share of rejects is taken of at least so many rows: one bad row among the first few is no reason to stop.
_MIN_ROWS_FOR_SHARE = 100
# of the configuration: they change how rows and media are found, decoded and reported, but no batch
_CHANGEABLE = (
    "train",
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


def batches(config: DataConfig, processor: Processor, *, process_index: int = 0, process_count: int = 1) -> Batches:
    """The batches of a process.

    Args:
      config: which rows, and the budgets.
      processor: reads the rows; from where it may fetch media, ``config`` says.
      process_index: of this process, from 0.
      process_count: how many processes make up a batch.

    Raises:
      ConfigError: if the fields of ``config`` do not go together.
      InputError: if a file of rows cannot be read.
    """
    config.check(process_count)
    sources = [open_rows(path) for path in config.train]
    budget = Budget.of(config)
    streams_per_process = config.streams // process_count
    processor = processor.with_pixels(**config.pixels).with_access(config.access)
    if config.isolate_media:
        processor = isolate(processor, max(config.workers, 1) * streams_per_process)
    prepare = Prepare(processor, config.tokens, budget.check, config.use_audio_in_video, config.media_root)
    rejects = RejectsFile(_rejects_path(config.rejects, process_index, process_count))

    # every process has the same endless order of rows, and takes each ``streams``-th row of it for a stream
    rows = mixture(sources, config.weights, config.seed)
    first = process_index * streams_per_process
    streams = []
    for i in range(first, first + streams_per_process):
        examples = rows.slice(slice(i, None, config.streams)).map(prepare)
        streams.append(_Stream(examples, budget, config, rejects))
    return Batches(_PackedBatches(streams, first, config, processor.config, _identity(config, sources)))


def mixture(sources: Sequence[Files], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Rows without end, each epoch in an order of its own.

    Args:
      sources: of rows.
      weights: how often each source is drawn from; an epoch is then one of each source. Without weights, an epoch is
        every row of all of them, shuffled together.
      seed: of the orders.
    """
    if not weights:
        return grain.MapDataset.source(Files(sources)).shuffle(seed=seed).repeat()
    # with one seed for all, files of equal length would be shuffled alike
    seeds = np.random.SeedSequence(seed).generate_state(len(sources))
    shuffled = []
    for rows, own_seed in zip(sources, seeds, strict=True):
        # repeated after the shuffle, because grain then shuffles each epoch with another seed
        shuffled.append(grain.MapDataset.source(rows).shuffle(seed=int(own_seed)).repeat())
    return grain.MapDataset.mix(shuffled, weights)


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


class _WaitingExample(NamedTuple):
    number: int  # of its row in the stream
    example: Example


class _Stream:
    """Packs the examples of a stream. The state is that between two parts."""

    def __init__(self, examples: grain.MapDataset, budget: Budget, config: DataConfig, rejects: RejectsFile) -> None:
        self._examples = examples
        self._budget = budget
        self._config = config
        self._rejects = rejects
        self._next = 0
        self._waiting: list[_WaitingExample] = []
        self._num_rejected = 0
        self._reasons: list[str] = []  # of the last rejects
        # started by the first read, so that a state can be set before a worker runs
        self._iterator: Iterator[Example | Reject] | None = None

    def fill_part(self) -> Part:
        """Fills the next part: first with those that wait, the oldest first, then with what comes.

        Raises:
          InputError: if too many rows cannot be used.
        """
        part = Part(self._budget)
        # the oldest one is placed for certain, since the part is empty and each example fits alone: none waits forever
        waiting = []
        for waiter in self._waiting:
            if not part.place(waiter.example):
                waiting.append(waiter)

        # then new ones, until the part is full or as many wait as may
        while len(waiting) < self._config.lookahead and not part.full:
            number = self._next
            element = self._read()
            if isinstance(element, Reject):
                self._reject(element)
            elif not part.place(element):
                waiting.append(_WaitingExample(number, element))
        self._waiting = waiting
        return part

    def get_state(self) -> State:
        # numbers instead of the examples that wait: a row becomes the same example again
        return {
            "next": self._next,
            "waiting": [number for number, _ in self._waiting],
            "rejected": self._num_rejected,
            "reasons": list(self._reasons),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        # workers read ahead from the old place
        self.close()
        self._next = state["next"]
        self._num_rejected = state["rejected"]
        self._reasons = list(state["reasons"])
        self._waiting = []
        for number in state["waiting"]:
            # decoded here: there are few, and the iterator begins after them
            element = self._examples[number]
            if isinstance(element, Reject):
                raise InputError(f"a row that could be used before cannot be used now: {_describe_reject(element)}")
            self._waiting.append(_WaitingExample(number, element))

    def close(self) -> None:
        """Stops the workers; they start again when they are needed."""
        if isinstance(self._iterator, grain.DatasetIterator):
            self._iterator.close()
        self._iterator = None

    def _read(self) -> Example | Reject:
        if self._iterator is None:
            self._iterator = self._start()
        element = next(self._iterator)
        self._next += 1
        return element

    def _start(self) -> Iterator[Example | Reject]:
        workers = self._config.workers
        rest = self._examples.slice(slice(self._next, None))
        # the processes that isolate media belong to this one, whose threads wait for them: grain's may start none
        if not workers or self._config.isolate_media:
            num_threads = max(workers, _DECODING_THREADS)
            buffer_size = max(workers, _PREFETCHED_EXAMPLES)
            options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer_size)
            return iter(rest.to_iter_dataset(options))
        # grain 0.2.18 reads a flag of absl's, whoever started the program (google/grain #1355)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # within a worker one row after the other; it is the workers that run beside each other
        in_worker = rest.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=_PREFETCHED_EXAMPLES)
        return iter(in_worker.mp_prefetch(options))

    def _reject(self, reject: Reject) -> None:
        self._rejects.add(reject)
        self._num_rejected += 1
        # no more than the last ones, for they are part of every state
        self._reasons = [*self._reasons, _describe_reject(reject)][-_MAX_REASONS:]
        limit = self._config.max_reject_share
        if self._num_rejected <= limit * max(self._next, _MIN_ROWS_FOR_SHARE):
            return
        where = "" if self._config.rejects is None else f"; all are in {self._config.rejects}"
        raise InputError(
            f"{self._num_rejected} of {self._next} rows cannot be used, over the share of {limit:g} that "
            f"data.max_reject_share allows (of at least {_MIN_ROWS_FOR_SHARE} rows). The last of them{where}:\n"
            + "\n".join(self._reasons)
        )


def _describe_reject(reject: Reject) -> str:
    return f"{reject.file}:{reject.number}: {reject.reason}"


class _NamedBatch(NamedTuple):
    batch: TrainBatch
    rows: tuple[str, ...]  # names of the rows in it


class _PackedBatches:
    """The batches of a process, each made when it is asked for."""

    def __init__(
        self, streams: Sequence[_Stream], first: int, config: DataConfig, model: OmniConfig, identity: dict[str, Any]
    ) -> None:
        self._streams = streams
        self._first = first
        self._config = config
        self._model = model
        self._identity = identity

    def __iter__(self) -> Iterator[_NamedBatch]:
        return self

    def __next__(self) -> _NamedBatch:
        parts = [stream.fill_part() for stream in self._streams]
        budget = Budget.of(self._config)
        batch = assemble(parts, budget, self._model, first=self._first, streams=self._config.streams)
        names: list[str] = []
        for part in parts:
            for placed in part.placed:
                names.append(placed.example.name)
        return _NamedBatch(batch, tuple(names))

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


class Batches(grain.DatasetIterator[TrainBatch]):
    """The batches of a process, without end; a few are made ahead by a thread.

    ``media_index`` counts the features of the whole batch of a step, so the leaves of all processes are to be put one
    after the other on their leading axes.

    Attributes:
      rows: file and number of each row in the batch that came last.
    """

    def __init__(self, packing: _PackedBatches) -> None:
        super().__init__()
        # in a list, so that ``_stop`` can take the iterator out of it without holding this object
        self._running: list[grain.DatasetIterator] = [
            grain.experimental.ThreadPrefetchDatasetIterator(packing, PREFETCHED_BATCHES)
        ]
        # also at the end of the program, before the modules that it takes are gone
        self._stop = weakref.finalize(self, _stop, self._running, packing)
        self.rows: tuple[str, ...] = ()

    def __next__(self) -> TrainBatch:
        """Raises InputError if too many rows cannot be used."""
        batch, self.rows = next(self._running[0])
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
