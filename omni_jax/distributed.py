"""Several processes as one, such as the hosts of a slice: how they find each other, and what they tell each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from omni_jax.errors import ConfigError


def join_processes(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Makes this process one of several; to be called before anything else of jax.

    Args:
      coordinator: host:port of process 0. On a pod of TPUs, under Slurm and on Kubernetes it can be left out, and so
        can the others.
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


def gather(value: Any) -> list[Any]:
    """The values of all processes, of JSON's types, in the order of the processes; the same on all of them."""
    if jax.process_count() == 1:
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)  # [bytes]
    # arrays that are gathered must be of one length
    lengths = np.ravel(multihost_utils.process_allgather(np.array([len(encoded)])))  # [processes]
    padded = np.zeros(int(np.max(lengths)), np.uint8)
    padded[: len(encoded)] = encoded
    values = []
    for row, length in zip(multihost_utils.process_allgather(padded), lengths, strict=True):
        values.append(json.loads(bytes(row[: int(length)])))
    return values


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def is_main_process() -> bool:
    """Whether this process is the one that writes for all."""
    return jax.process_index() == 0


def allreduce_min(values: Sequence[int], max_values: int) -> list[int]:
    """The minimum over all processes of each value; every process has as many values.

    Args:
      values: from 0 to 255.
      max_values: how many there can ever be; they are padded to it, so that their number compiles no new program.
    """
    if not values or jax.process_count() == 1:
        return list(values)
    padded = np.zeros(max_values, np.uint8)
    padded[: len(values)] = values
    # [processes, max_values], of which the padding is cut off
    return multihost_utils.process_allgather(padded).min(axis=0)[: len(values)].tolist()
