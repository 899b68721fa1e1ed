"""What the batch engine and the server have in common over a Ray cluster.

Ray is an optional dependency and slow to import: it is imported where it is asked for.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from omni_jax.checks import check_int
from omni_jax.errors import InputError
from omni_jax.serving.commands import RayOptions

_SLICE = re.compile(r"(v[0-9][a-z0-9]*):([0-9]+(?:x[0-9]+){1,2})")


class Slice(NamedTuple):
    """A slice of TPUs.

    Attributes:
      generation: such as "v6e".
      topology: its chips, such as "4x4".
    """

    generation: str
    topology: str


def check_ray_options(options: RayOptions) -> None:
    """Finds what is wrong with the options before anything is started.

    Raises:
      InputError: naming the option.
    """
    check_int("--ray.actors", options.actors, 1)
    resources = parse_resources(options.resources)
    if parse_slice(options.slice) is not None and resources:
        raise InputError("--ray.slice takes all chips of a slice: leave --ray.resources out")


def parse_resources(text: str) -> dict[str, float]:
    """What "TPU=4,memory=1e9" says that each actor takes.

    Raises:
      InputError: if it is not of this form.
    """
    resources = {}
    # an empty text has no parts
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        try:
            resources[name.strip()] = float(number)
        except ValueError as e:
            raise InputError(f"--ray.resources {text!r}: {part!r} is not NAME=NUMBER, for instance TPU=4") from e
    return resources


def parse_slice(text: str) -> Slice | None:
    """The slice that "v6e:4x4" names; None if the text is empty.

    Raises:
      InputError: if it is not of this form.
    """
    if not text:
        return None
    found = _SLICE.fullmatch(text)
    if found is None:
        raise InputError(f"--ray.slice {text!r} is not GENERATION:TOPOLOGY, for instance v6e:4x4")
    return Slice(*found.groups())


def connect(options: RayOptions) -> None:
    """Joins the cluster, or starts one on this machine.

    Raises:
      InputError: if Ray is not installed, or the cluster is not there.
    """
    try:
        import ray
    except ImportError as e:
        raise InputError(f"--engine ray needs Ray: pip install omni_jax[ray] ({e})") from e
    try:
        ray.init(address=options.address or None, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError) as e:
        raise InputError(f"cannot reach the Ray cluster {options.address!r}: {e}") from e


def reserve_slice(wanted: Slice) -> Any:
    """A placement group of a whole slice, one bundle a host, once it is free; it ends with the process that asked.

    Returns:
      ``ray.util.tpu.SlicePlacementGroup``.

    Raises:
      InputError: if there is no such topology, or none is free.
    """
    import ray
    from ray.util.tpu import slice_placement_group

    try:
        reserved = slice_placement_group(topology=wanted.topology, accelerator_version=wanted.generation)
    except (ValueError, TimeoutError) as e:
        raise InputError(f"--ray.slice {wanted.generation}:{wanted.topology}: {e}") from e
    group = reserved.placement_group
    assert group is not None  # one for all slices, of which there is one
    ray.get(group.ready())
    return reserved
