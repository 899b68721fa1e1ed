"""What each of several processes feeds to the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax.batch import TrainBatch
from omni_jax.errors import ConfigError
from omni_jax.sharding import RULES


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
