"""The same over many machines: Ray Data hands blocks of lines to actors, each of which holds the model and a scheduler.

Ray starts the actors, balances the blocks between them, and gives the block of an actor that died to another. The
driver writes the results, so that there is one file of them, continued in the same way as without Ray.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from omni_jax.distributed import join_processes
from omni_jax.serving.batch_lines import Line, Result, read_lines
from omni_jax.serving.batch_worker import Worker, WorkerSpec
from omni_jax.serving.commands import RayOptions
from omni_jax.serving.ray_cluster import Slice, connect, parse_resources, parse_slice, reserve_slice

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
    connect(options)
    # not at the top: Ray is an optional dependency, and slow to import
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one already
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # the driver holds places of lines and not lines: a file of many gigabytes fits
    blocks = list(_make_blocks(lines, block_lines))
    if not blocks:
        return
    resources = parse_resources(options.resources)
    wanted = parse_slice(options.slice)
    # a block of Ray's for each block of lines: it is what Ray hands out, and repeats where an actor died
    dataset = ray.data.from_items(blocks, override_num_blocks=len(blocks))
    answered = dataset.map_batches(
        _Actor if wanted is None else _SliceActor,
        fn_constructor_args=(spec, input_name) if wanted is None else (spec, input_name, wanted),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        # an actor that takes a TPU, or whose hosts do, does not compete for CPUs
        num_cpus=1 if wanted is None and not resources else 0,
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


class _SliceActor:
    """An actor whose model lies over all hosts of a slice: it hands each block to a process on each of them.

    All of these make the same calls, as with ``--distributed``; the first one writes. If one dies, none can go on: the
    actor ends, and Ray gives its block to another, or to a new one.
    """

    def __init__(self, spec: WorkerSpec, input_name: str, wanted: Slice):
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        # kept, because the slice is given back with it
        self._slice = reserve_slice(wanted)
        resources = dict(self._slice.bundle_resources)
        host_class = ray.remote(num_cpus=resources.pop("CPU", 0), resources=resources)(_Host)
        self._hosts = []
        for index in range(self._slice.num_bundles):
            place = PlacementGroupSchedulingStrategy(self._slice.placement_group, index)
            self._hosts.append(host_class.options(scheduling_strategy=place).remote())
        coordinator = ray.get(self._hosts[0].find_address.remote())
        count = len(self._hosts)
        self._wait([host.join.remote(coordinator, count, index) for index, host in enumerate(self._hosts)])
        self._wait([host.load.remote(spec, input_name) for host in self._hosts])

    def __call__(self, blocks: dict[str, Any]) -> dict[str, Sequence[Any]]:
        return self._wait([host.answer.remote(blocks) for host in self._hosts])[0]

    def _wait(self, results: list[Any]) -> list[Any]:
        import ray
        from ray.exceptions import RayActorError

        try:
            return ray.get(results)
        except RayActorError:
            # an exception would end the whole run; an actor that ends is replaced
            os._exit(1)


class _Host:
    """One process of several that hold a model together."""

    def find_address(self) -> str:
        """Where the others find this one: host:port."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.create_server((address, 0)) as free:
            return f"{address}:{free.getsockname()[1]}"

    def join(self, coordinator: str, count: int, index: int) -> None:
        join_processes(coordinator, count, index)

    def load(self, spec: WorkerSpec, input_name: str) -> None:
        self._actor = _Actor(spec, input_name)

    def answer(self, blocks: dict[str, Any]) -> dict[str, Sequence[Any]]:
        return self._actor(blocks)
