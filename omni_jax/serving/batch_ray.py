"""The same over many machines: Ray Data hands blocks of lines to actors, each of which holds the model and a scheduler.

Ray starts the actors, balances the blocks between them, and gives the block of an actor that died to another. The
driver writes the results, so that there is one file of them, continued in the same way as without Ray.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from omni_jax.errors import InputError
from omni_jax.serving.batch_lines import Line, Result, read_lines
from omni_jax.serving.batch_worker import Worker, WorkerSpec
from omni_jax.serving.commands import RayOptions

_FIELDS = tuple(field.name for field in dataclasses.fields(Result))


def answer_over_ray(
    spec: WorkerSpec, options: RayOptions, input_name: str, lines: Iterable[Line], block_lines: int
) -> Iterator[Result]:
    """The results of lines, in the order in which their blocks are done.

    Args:
      spec: what each actor makes its worker from.
      options: where the actors run.
      input_name: of the file that the lines are of, which every actor reads.
      lines: that are to be answered.
      block_lines: lines that an actor is given at a time.

    Raises:
      InputError: if Ray is not installed, or the cluster is not there.
    """
    # not at the top: Ray is an optional dependency, and slow to import
    try:
        import ray
        import ray.data
    except ImportError as e:
        raise InputError(f"--engine ray needs Ray: pip install omni_jax[ray] ({e})") from e
    try:
        ray.init(address=options.address or None, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError) as e:
        raise InputError(f"cannot reach the Ray cluster {options.address!r}: {e}") from e
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one already
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # the driver holds places of lines and not lines: a file of many gigabytes fits
    blocks = list(_make_blocks(lines, block_lines))
    if not blocks:
        return
    resources = _parse_resources(options.resources)
    # a block of Ray's for each block of lines: it is what Ray hands out, and repeats where an actor died
    dataset = ray.data.from_items(blocks, override_num_blocks=len(blocks))
    answered = dataset.map_batches(
        _Actor,
        fn_constructor_args=(spec, input_name),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_cpus=0 if resources else 1,  # an actor that takes a TPU does not compete for CPUs
        resources=resources or None,
    )
    for row in answered.iter_rows():
        yield Result(**{name: row[name] for name in _FIELDS})


def _make_blocks(lines: Iterable[Line], size: int) -> Iterator[dict[str, Any]]:
    """Where lines are, a block at a time: a few numbers for each line, for the actors read the lines themselves."""
    line_numbers: list[int] = []
    first_offset = 0
    for line in lines:
        if not line_numbers:
            first_offset = line.offset
        line_numbers.append(line.number)
        if len(line_numbers) == size:
            yield {"line_numbers": line_numbers, "offset": first_offset}
            line_numbers = []
    if line_numbers:
        yield {"line_numbers": line_numbers, "offset": first_offset}


def _parse_resources(text: str) -> dict[str, float]:
    # "TPU=4,memory=1e9"; an empty text has no parts
    resources = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        try:
            resources[name.strip()] = float(number)
        except ValueError as e:
            raise InputError(f"--ray.resources {text!r}: {part!r} is not NAME=NUMBER, for instance TPU=4") from e
    return resources


class _Actor:
    """A worker that answers blocks of lines. Ray calls it with columns of rows, and takes such."""

    def __init__(self, spec: WorkerSpec, input_name: str):
        self._input_name = input_name
        # made here, in the actor's own process: a model cannot be sent there, its description can
        self._worker = Worker(spec)

    def __call__(self, blocks: dict[str, Any]) -> dict[str, Sequence[Any]]:
        results: list[Result] = []
        for line_numbers, offset in zip(blocks["line_numbers"], blocks["offset"], strict=True):
            results += self._answer_block([int(number) for number in line_numbers], int(offset))
        # Ray wants a column for each field, and not a row for each result
        columns: dict[str, Sequence[Any]] = {}
        for name in _FIELDS:
            columns[name] = [getattr(result, name) for result in results]
        return columns

    def _answer_block(self, line_numbers: Sequence[int], offset: int) -> list[Result]:
        wanted = set(line_numbers)
        last = max(line_numbers)
        # from the block's first line on: lines between those that are wanted have their results already
        following = read_lines(self._input_name, min(line_numbers), offset)
        until_last = itertools.takewhile(lambda line: line.number <= last, following)
        return list(self._worker.answer(line for line in until_last if line.number in wanted))
