"""Several processes as one: how they find each other, and what each of them feeds to the step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax.batch import TrainBatch
from omni_jax.errors import ConfigError
from omni_jax.sharding import RULES


def join_processes(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Makes this process one of several; to be called before anything else of jax.

    Args:
      coordinator: host:port of process 0. On a pod of TPUs, under Slurm and on Kubernetes nothing need be given.
      count: of processes.
      index: of this one, from 0.

    Raises:
      ConfigError: if the others cannot be found.
    """
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (ValueError, RuntimeError) as e:
        raise ConfigError(
            f"cannot find the other processes: {e}. Give --coordinator HOST:PORT --processes N --process I, or leave "
            "--distributed out for a single process"
        ) from e


@dataclass(frozen=True)
class Share:
    """Which rows of every batch this process feeds: the ``index``-th of ``count`` equal parts.

    Processes whose devices hold the same rows, because a row is spread over both, feed the same ones.
    """

    index: int
    count: int


def share_of(mesh: Mesh, rows: int) -> Share:
    """This process's share of a batch of so many rows.

    Raises:
      ConfigError: if the devices of a process do not hold rows that lie beside each other, as many as every other's.
    """
    sharding = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    held: dict[int, set[tuple[int, int]]] = {}
    for device, (where,) in sharding.devices_indices_map((rows,)).items():
        begin, end, _ = where.indices(rows)
        held.setdefault(device.process_index, set()).add((begin, end))
    spans = {process: (min(begins)[0], max(ends)[1]) for process, begins in held.items() for ends in [begins]}
    shares = sorted(set(spans.values()))
    each = rows // len(shares)
    if shares != [(i * each, (i + 1) * each) for i in range(len(shares))]:
        raise ConfigError(
            f"the mesh gives the processes the rows {shares} of {rows}, which are not equal parts; make mesh.sequence "
            "x mesh.tensor a divisor or a multiple of the devices of a process"
        )
    return Share(shares.index(spans[jax.process_index()]), len(shares))


def place(batches: Sequence[TrainBatch], abstract: TrainBatch) -> TrainBatch:
    """Puts this process's part of one batch, or of those to be accumulated, on the devices.

    Args:
      batches: numpy arrays, as the data gives them.
      abstract: of the whole batch (``omni_jax.training.step.abstract_batch``).
    """

    def one(whole: jax.ShapeDtypeStruct, *parts: np.ndarray) -> jax.Array:
        stacked = len(whole.shape) > parts[0].ndim
        local = np.stack(parts) if stacked else parts[0]
        return jax.make_array_from_process_local_data(whole.sharding, local, whole.shape)

    return jax.tree.map(one, abstract, *batches)


def gather(value: Any) -> list[Any]:
    """What every process has, of JSON's types, in their order; the same on all of them."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(text)]))
    padded = np.zeros(int(np.max(lengths)), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(t[: int(n)])) for t, n in zip(texts, np.ravel(lengths), strict=True)]


def meet(where: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
