"""Which rows of a batch each of several processes reads, and how they come to the devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax.data.packing import is_repeated
from omni_jax.errors import ConfigError
from omni_jax.sharding import RULES
from omni_jax.training.objective import Batch


@dataclass(frozen=True)
class BatchShard:
    """The rows of every batch that this process reads: the ``index``-th of ``count`` equal parts.

    Processes whose devices hold the same rows, because a row is spread over both, read the same ones.
    """

    index: int
    count: int


def batch_shard(mesh: Mesh, num_rows: int) -> BatchShard:
    """This process's part of a batch of ``num_rows``.

    Raises:
      ConfigError: if the devices of a process do not hold rows that lie beside each other, as many as every other's.
    """
    # processes that hold the same rows have the same span, which counts once
    spans = _row_spans(mesh, num_rows)
    parts = sorted(set(spans.values()))
    # The data gives every process as many streams, so parts must be equal. A span bridges the rows between the first
    # and the last of a process; where others hold some of these, the spans overlap and are not the parts either.
    rows_per_part = num_rows // len(parts)
    equal_parts: list[tuple[int, int]] = []
    for i in range(len(parts)):
        equal_parts.append((i * rows_per_part, (i + 1) * rows_per_part))
    if parts != equal_parts:
        raise ConfigError(
            f"the mesh gives the processes the rows {parts} of {num_rows}, which are not equal parts; make "
            "mesh.sequence x mesh.tensor a divisor or a multiple of the devices of a process"
        )
    return BatchShard(parts.index(spans[jax.process_index()]), len(parts))


def _row_spans(mesh: Mesh, num_rows: int) -> dict[int, tuple[int, int]]:
    """First and last row, exclusive, that the devices of each process hold."""
    # asked of jax itself, which lays out the arrays of a batch by the same rule
    sharding = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    spans: dict[int, tuple[int, int]] = {}
    for device, (rows,) in sharding.devices_indices_map((num_rows,)).items():
        begin, end, _ = rows.indices(num_rows)
        known = spans.get(device.process_index, (begin, end))
        spans[device.process_index] = (min(known[0], begin), max(known[1], end))
    return spans


def to_devices(batches: Sequence[Batch], abstract: Batch) -> Batch:
    """Copies this process's part of one batch, or of those to be accumulated, to its devices.

    Args:
      batches: numpy arrays, as the data gives them.
      abstract: of the batch over all processes (``omni_jax.training.step.abstract_batch``).
    """

    def copy_leaf(target: jax.ShapeDtypeStruct, *parts: np.ndarray) -> jax.Array:
        # of a batch without pictures nothing but these zeros would be copied, hundreds of megabytes of them
        if all(is_repeated(part) for part in parts):
            return _fill_on_devices(target, parts[0].item(0))
        # batches to be accumulated are stacked on a leading axis, which no mesh axis divides
        accumulated = len(target.shape) > parts[0].ndim
        local = np.stack(parts) if accumulated else parts[0]
        # no values go from process to process: each puts its own rows on its own devices
        return jax.make_array_from_process_local_data(target.sharding, local, target.shape)

    return jax.tree.map(copy_leaf, abstract, *batches)


def _fill_on_devices(target: jax.ShapeDtypeStruct, value: float) -> jax.Array:
    """An array of one number in every place, which each device of this process makes for itself."""
    sharding = target.sharding
    shape = sharding.shard_shape(target.shape)
    # named for each shard: under the mesh of a run, a default device would not be asked
    shards = [jnp.full(shape, value, target.dtype, device=device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(target.shape, sharding, shards)
