"""The server over a Ray cluster: replicas of it, each with a model, behind one address (Ray Serve).

Ray hands requests to replicas that are free, a realtime session to one of them, starts another for one that died, and
drains those that are to end.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from starlette.applications import Starlette

from omni_jax.errors import InputError
from omni_jax.serving.commands import RayOptions
from omni_jax.serving.http_app import make_app
from omni_jax.serving.ray_cluster import connect, parse_resources, parse_slice
from omni_jax.serving.service import Service, ServiceSpec

_NAME = "omni_jax"  # of the application in the cluster


class Replica:
    """What Ray Serve asks of a replica: the application, and whether it is well."""

    def __init__(self, spec: ServiceSpec, api_keys: Sequence[str], cors_origins: Sequence[str]):
        self._service = Service(spec)
        self._app = make_app(self._service, api_keys=api_keys, cors_origins=cors_origins)

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._app

    def check_health(self) -> None:
        """Raises RuntimeError if the replica must be replaced."""
        if not self._service.engine.is_alive:
            raise RuntimeError("the engine has ended")

    def __del__(self) -> None:
        # a replica that could not be made has none
        if hasattr(self, "_service"):
            self._service.close()


def serve_over_ray(
    spec: ServiceSpec,
    options: RayOptions,
    host: str,
    port: int,
    *,
    api_keys: Sequence[str],
    cors_origins: Sequence[str],
    drain_seconds: int,
) -> None:
    """Serves until the process is told to stop; then replicas finish what was asked.

    Args:
      spec: of each replica.
      options: how many there are, and where they run.
      host: that the machines of the cluster listen at.
      port: likewise.
      api_keys, cors_origins: as ``make_app`` takes them.
      drain_seconds: that a replica has to finish.

    Raises:
      InputError: if Ray is not installed, the cluster is not there, or a replica cannot be made.
    """
    told_to_stop = threading.Event()

    def stop(sig: int, frame: FrameType | None) -> None:
        told_to_stop.set()

    connect(options)
    # not at the top: Ray is an optional dependency, and slow to import
    from ray import serve
    from ray.serve.schema import LoggingConfig

    serve.start(http_options={"host": host, "port": port}, logging_config=LoggingConfig(enable_access_log=False))
    try:
        replica = serve.deployment(
            name=_NAME,
            num_replicas=options.actors,
            max_ongoing_requests=spec.max_open,
            max_queued_requests=spec.queue,
            graceful_shutdown_timeout_s=drain_seconds,
            ray_actor_options=_make_actor_options(options),
        )(serve.ingress()(Replica))
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, stop)
        try:
            serve.run(replica.bind(spec, api_keys, cors_origins), name=_NAME, route_prefix="/")
        except RuntimeError as e:
            raise InputError(f"--engine ray: no replica could be made: {e}") from e
        print(f"{spec.model_name} answers at http://{host}:{port}; Ctrl-C stops it", flush=True)
        told_to_stop.wait()
    finally:
        # the cluster may be gone before
        with contextlib.suppress(Exception):
            serve.shutdown()


def _make_actor_options(options: RayOptions) -> dict[str, Any]:
    """What a replica takes of the cluster.

    Raises:
      InputError: if a slice has several hosts.
    """
    wanted = parse_slice(options.slice)
    if wanted is None:
        resources = parse_resources(options.resources)
        return {"num_cpus": 0, "resources": resources} if resources else {"num_cpus": 1}
    from ray.util.tpu import get_tpu_worker_resources

    count, resources = get_tpu_worker_resources(wanted.topology, wanted.generation)
    if count != 1:
        raise InputError(
            f"--ray.slice {options.slice} has {count} hosts, and a replica of the server is one process: take a slice "
            "of one host, such as v6e:2x4"
        )
    num_cpus = resources.pop("CPU", 0)
    labels = {"ray.io/accelerator-type": f"TPU-{wanted.generation.upper()}", "ray.io/tpu-topology": wanted.topology}
    return {"num_cpus": num_cpus, "resources": resources, "label_selector": labels}
