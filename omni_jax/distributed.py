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


def barrier(where: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def is_main_process() -> bool:
    """Whether this process is the one that writes for all."""
    return jax.process_index() == 0


def allreduce_min(values: Sequence[int], most: int) -> list[int]:
    """Of each of these numbers, of which there are as many everywhere, the lowest that a process has.

    Args:
      values: from 0 to 255.
      most: that there are ever of them, so that their number makes no programs.
    """
    if not values or jax.process_count() == 1:
        return list(values)
    padded = np.zeros(most, np.uint8)
    padded[: len(values)] = values
    return multihost_utils.process_allgather(padded).min(axis=0)[: len(values)].tolist()
