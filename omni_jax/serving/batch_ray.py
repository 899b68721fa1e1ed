"""The same over many machines: Ray Data hands blocks of lines to actors, each of which holds the model and a scheduler.

Ray starts the actors, balances the blocks between them, and gives the block of an actor that died to another. The
driver writes the results, so that there is one file of them, continued in the same way as without Ray.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omni_jax.errors import InputError
from omni_jax.serving.batch_lines import Line, read_lines
from omni_jax.serving.batch_run import Result, Runner, State

if TYPE_CHECKING:
    from omni_jax.serving.batch import Batch

BLOCK = 8  # lines in a block, for each slot


@dataclass(frozen=True)
class RayOptions:
    """Where the actors run.

    Attributes:
      actors: that hold the model, one a slice.
      address: of the cluster; a local one is started if it is empty.
      resources: that an actor takes, for instance TPU=4; without it, a CPU.
    """

    actors: int = 1
    address: str = ""
    resources: str = ""


def answer(batch: Batch, lines: Iterable[Line]) -> Iterator[Result]:
    """The results of lines of ``batch.input``, in the order in which their blocks are done.

    Raises:
      InputError: if Ray is not installed, or the cluster is not there.
    """
    try:
        import ray
        import ray.data
    except ImportError as e:
        raise InputError(f"--engine ray needs Ray: pip install omni_jax[ray] ({e})") from e
    options = batch.ray
    try:
        ray.init(address=options.address or None, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError) as e:
        raise InputError(f"cannot reach the Ray cluster {options.address!r}: {e}") from e
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one already
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    blocks = list(_blocks(lines, BLOCK * batch.slots))  # of a few numbers for each line
    if not blocks:
        return
    taken = _resources(options.resources)
    dataset = ray.data.from_items(blocks, override_num_blocks=len(blocks))
    done = dataset.map_batches(
        _Actor,
        fn_constructor_args=(batch,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_cpus=0 if taken else 1,
        resources=taken or None,
    )
    for row in done.iter_rows():
        yield Result(row["text"], row["failed"], row["tokens"], row["seconds"])


def _blocks(lines: Iterable[Line], size: int) -> Iterator[dict[str, Any]]:
    """Where lines are, a block at a time; the actors read the lines themselves."""
    rest = ((line.number, line.offset) for line in lines)
    while block := list(itertools.islice(rest, size)):
        yield {"numbers": [number for number, _ in block], "offset": block[0][1]}


def _resources(text: str) -> dict[str, float]:
    taken = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        try:
            taken[name.strip()] = float(number)
        except ValueError as e:
            raise InputError(f"--ray.resources {text!r}: {part!r} is not NAME=NUMBER, for instance TPU=4") from e
    return taken


class _Actor:
    """A model that answers blocks of lines. Ray calls it with columns of rows, and takes such."""

    def __init__(self, batch: Batch):
        self._input = batch.input
        self._workers = batch.workers_of()
        model = batch.load()
        batch.warm_up(model)
        self._runner = Runner(model, batch.model.name, self._workers, batch.sizes, batch.places, State())

    def __call__(self, rows: dict[str, Any]) -> dict[str, Sequence[Any]]:
        made = [
            result for block in zip(rows["numbers"], rows["offset"], strict=True) for result in self._answer(*block)
        ]
        names = ("text", "failed", "tokens", "seconds")
        return {name: [getattr(result, name) for result in made] for name in names}

    def _answer(self, numbers: Sequence[int], offset: int) -> list[Result]:
        wanted, last = set(map(int, numbers)), int(max(numbers))
        behind = read_lines(self._input, int(min(numbers)), int(offset))
        lines = itertools.takewhile(lambda line: line.number <= last, behind)
        return list(self._runner.run(line for line in lines if line.number in wanted))
