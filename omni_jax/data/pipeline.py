"""Rows to batches without end: mixed, shuffled, dealt out to processes, decoded by workers, packed.

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
from typing import Any

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
from omni_jax.processing.processor import Processor

AHEAD = 2  # batches that are ready before they are asked for
_THREADS = 2  # that decode where there are no workers
_EXAMPLES_AHEAD = 4  # of each worker, or of the threads together
_FEWEST_ROWS = 100  # that the share of rejects is a share of; one bad row among the first few is no reason to stop
_REASONS = 5  # that the error names


def batches(config: DataConfig, processor: Processor, *, process_index: int = 0, process_count: int = 1) -> Batches:
    """The batches of a process.

    Args:
      config: what to learn from, and the budgets.
      processor: reads the rows; load it with ``allow_urls=True`` for media in buckets or on the web.
      process_index: of this process, from 0.
      process_count: how many processes make up a batch.

    Raises:
      ConfigError: if the fields of ``config`` do not go together.
      InputError: if a file of rows cannot be read.
    """
    config.check(process_count)
    sources = [open_rows(path) for path in config.train]
    budget = Budget.of(config)
    prepare = Prepare(processor.with_pixels(**config.pixels), config.tokens, budget.check, config.use_audio_in_video)
    rejects = RejectsFile(_of_process(config.rejects, process_index, process_count))
    rows = mixture(sources, config.weights, config.seed)
    each = config.streams // process_count
    first = process_index * each
    streams = [
        _Stream(rows.slice(slice(i, None, config.streams)).map(prepare), budget, config, rejects)
        for i in range(first, first + each)
    ]
    return Batches(_Packing(streams, first, config, processor.config, _identity(config, sources)))


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
    seeds = np.random.SeedSequence(seed).generate_state(len(sources))
    shuffled = [
        grain.MapDataset.source(rows).shuffle(seed=int(s)).repeat() for rows, s in zip(sources, seeds, strict=True)
    ]
    return grain.MapDataset.mix(shuffled, weights)


def _of_process(path: Path | None, index: int, count: int) -> Path | None:
    """Each process writes a file of its own."""
    return path if path is None or count == 1 else path.with_stem(f"{path.stem}-{index}")


def _identity(config: DataConfig, sources: Sequence[Files]) -> dict[str, Any]:
    """What must not change when a run goes on, or its batches would be others. Files may have moved."""
    free = {"train", "workers", "rejects", "max_reject_share"}
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    return {**fields, "weights": list(config.weights), "rows of data.train": [len(rows) for rows in sources]}


class _Stream:
    """Packs its share of the rows. The state is that between two parts."""

    def __init__(self, rows: grain.MapDataset, budget: Budget, config: DataConfig, rejects: RejectsFile) -> None:
        self._rows, self._budget, self._config, self._rejects = rows, budget, config, rejects
        self._next = 0
        self._waiting: list[tuple[int, Example]] = []  # with their numbers
        self._rejected = 0
        self._reasons: list[str] = []  # of the last rejects
        self._elements: Iterator[Example | Reject] | None = None

    def part(self) -> Part:
        """Fills the next part: first with those that wait, the oldest first, then with what comes.

        Raises:
          InputError: if too many rows cannot be used.
        """
        part, waiting = Part(self._budget), []
        for number, example in self._waiting:
            if not part.place(example):
                waiting.append((number, example))
        while len(waiting) < self._config.lookahead and not part.full:
            number, element = self._read()
            if isinstance(element, Reject):
                self._reject(element)
            elif not part.place(element):
                waiting.append((number, element))
        self._waiting = waiting
        return part

    def get_state(self) -> dict[str, Any]:
        waiting = [number for number, _ in self._waiting]
        return {"next": self._next, "waiting": waiting, "rejected": self._rejected, "reasons": list(self._reasons)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.close()
        self._next, self._rejected, self._reasons = state["next"], state["rejected"], list(state["reasons"])
        self._waiting = [(number, self._rows[number]) for number in state["waiting"]]
        lost = [element for _, element in self._waiting if isinstance(element, Reject)]
        if lost:
            raise InputError(f"a row that could be used before cannot be used now: {_line(lost[0])}")

    def close(self) -> None:
        """Stops the workers; they start again when they are needed."""
        if isinstance(self._elements, grain.DatasetIterator):
            self._elements.close()
        self._elements = None

    def _read(self) -> tuple[int, Example | Reject]:
        self._elements = self._elements or self._start()
        number, element = self._next, next(self._elements)
        self._next += 1
        return number, element

    def _start(self) -> Iterator[Example | Reject]:
        workers = self._config.workers
        threads = grain.ReadOptions(
            num_threads=0 if workers else _THREADS, prefetch_buffer_size=0 if workers else _EXAMPLES_AHEAD
        )
        rows = self._rows.slice(slice(self._next, None)).to_iter_dataset(threads)
        if workers:
            if not flags.FLAGS.is_parsed():  # grain 0.2.18 reads one, whoever started the program (google/grain #1355)
                flags.FLAGS.mark_as_parsed()
            rows = rows.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=_EXAMPLES_AHEAD))
        return iter(rows)

    def _reject(self, reject: Reject) -> None:
        self._rejects.add(reject)
        self._rejected += 1
        self._reasons = [*self._reasons, _line(reject)][-_REASONS:]
        limit = self._config.max_reject_share
        if self._rejected <= limit * max(self._next, _FEWEST_ROWS):
            return
        where = "" if self._config.rejects is None else f"; all are in {self._config.rejects}"
        raise InputError(
            f"{self._rejected} of {self._next} rows cannot be used, over the share of {limit:g} that "
            f"data.max_reject_share allows (of at least {_FEWEST_ROWS} rows). The last of them{where}:\n"
            + "\n".join(self._reasons)
        )


def _line(reject: Reject) -> str:
    return f"{reject.file}:{reject.number}: {reject.reason}"


class _Packing:
    """The batches of a process and the names of the rows in them, made when they are asked for."""

    def __init__(
        self, streams: Sequence[_Stream], first: int, config: DataConfig, model: OmniConfig, identity: dict[str, Any]
    ) -> None:
        self._streams, self._first, self._config, self._model = streams, first, config, model
        self._identity = identity

    def __iter__(self) -> Iterator[tuple[TrainBatch, tuple[str, ...]]]:
        return self

    def __next__(self) -> tuple[TrainBatch, tuple[str, ...]]:
        parts = [stream.part() for stream in self._streams]
        budget, streams = Budget.of(self._config), self._config.streams
        batch = assemble(parts, budget, self._model, first=self._first, streams=streams)
        return batch, tuple(placed.example.name for part in parts for placed in part.placed)

    def get_state(self) -> dict[str, Any]:
        states = {str(self._first + i): stream.get_state() for i, stream in enumerate(self._streams)}
        return {"data": self._identity, "streams": states}

    def set_state(self, state: Mapping[str, Any]) -> None:
        changed = [key for key, value in self._identity.items() if state["data"].get(key) != value]
        if changed:
            was = ", ".join(f"{key} was {state['data'].get(key)!r} and is {self._identity[key]!r}" for key in changed)
            raise ConfigError(f"the data cannot go on where the checkpoint left it: {was}; start a new run from it")
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

    def __init__(self, packing: _Packing) -> None:
        super().__init__()
        self._running: list[grain.DatasetIterator] = [grain.experimental.ThreadPrefetchDatasetIterator(packing, AHEAD)]
        # also at the end of the program, before the modules that it takes are gone
        self._stop = weakref.finalize(self, _stop, self._running, packing)
        self.rows: tuple[str, ...] = ()

    def __next__(self) -> TrainBatch:
        """Raises InputError if too many rows cannot be used."""
        batch, self.rows = next(self._running[0])
        return batch

    def get_state(self) -> dict[str, Any]:
        """What the next batch follows from, of JSON's types; a union of ``streams`` of all processes fits them all."""
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


def _stop(running: list[grain.DatasetIterator], packing: _Packing) -> None:
    running.pop().close()
    packing.close()
