"""Reads the examples of one source for one stream, some of them ahead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

_DECODING_THREADS = 2  # where there are no workers
_PREFETCHED_EXAMPLES = 4  # of each worker, or of the threads together


class ExampleReader:
    """The elements of a data set in order, from any place on."""

    def __init__(self, examples: grain.MapDataset, workers: int, *, in_threads: bool) -> None:
        """Starts nothing yet.

        Args:
          examples: without end.
          workers: processes that read ahead; 0: threads of this process do.
          in_threads: whether threads read even where there are workers, because they wait for processes of their own.
        """
        self._examples = examples
        self._workers = workers
        self._in_threads = in_threads or not workers
        # started by the first read, so that a state can be set before a worker runs
        self._iterator: Iterator[Any] | None = None

    def __getitem__(self, number: int) -> Any:
        """The element of a number, read here."""
        return self._examples[number]

    def read(self, number: int) -> Any:
        """The element of a number, which is one more than that of the read before, unless ``close`` came between."""
        if self._iterator is None:
            self._iterator = self._start(number)
        return next(self._iterator)

    def close(self) -> None:
        """Stops the workers; the next read starts them again."""
        if isinstance(self._iterator, grain.DatasetIterator):
            self._iterator.close()
        self._iterator = None

    def _start(self, number: int) -> Iterator[Any]:
        rest = self._examples.slice(slice(number, None))
        if self._in_threads:
            options = grain.ReadOptions(
                num_threads=max(self._workers, _DECODING_THREADS),
                prefetch_buffer_size=max(self._workers, _PREFETCHED_EXAMPLES),
            )
            return iter(rest.to_iter_dataset(options))
        # grain 0.2.18 reads a flag of absl's, whoever started the program (google/grain #1355)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # within a worker one row after the other; it is the workers that run beside each other
        in_worker = rest.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=_PREFETCHED_EXAMPLES)
        return iter(in_worker.mp_prefetch(options))
