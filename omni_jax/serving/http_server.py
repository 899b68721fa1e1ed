"""The server: a model behind OpenAI's API."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from rich.console import Console
from rich.text import Text
from sse_starlette.sse import AppStatus
from starlette.applications import Starlette

from omni_jax.checks import check_float, check_int, printable
from omni_jax.errors import InputError
from omni_jax.serving.commands import HttpCommand
from omni_jax.serving.http_app import make_app
from omni_jax.serving.http_ray import serve_over_ray
from omni_jax.serving.media_roots import MediaRoots
from omni_jax.serving.model_spec import check_model_options, make_model_spec
from omni_jax.serving.ray_cluster import check_ray_options
from omni_jax.serving.service import Service, ServiceSpec

KEY_VARIABLE = "OMNI_API_KEY"
_MAX_QUEUE = 100_000
_MAX_MEGABYTES = 4096.0
_MAX_GIGABYTES = 1e6


def run_http(command: HttpCommand) -> None:
    """Serves until it is told to stop; then finishes what was asked.

    Raises:
      InputError, CheckpointError, ConfigError: where it cannot begin.
    """
    # what is wrong shows before minutes of loading
    check_command(command)
    api_keys = read_keys(command)
    spec = make_service_spec(command)
    with contextlib.closing(_bind(command.host, command.port)) as listener:
        port = listener.getsockname()[1]
        if command.engine == "local":
            _serve_alone(command, spec, api_keys, listener)
            return
    # Ray's proxy listens there itself
    serve_over_ray(
        spec,
        command.ray,
        command.host,
        port,
        api_keys=api_keys,
        cors_origins=command.cors_origins,
        drain_seconds=command.drain_seconds,
    )


def _serve_alone(command: HttpCommand, spec: ServiceSpec, api_keys: Sequence[str], listener: socket.socket) -> None:
    """Serves in this process."""
    terminal = Console(stderr=True, markup=False)
    with terminal.status("") as status:
        service = Service(spec, lambda phase: status.update(Text(printable(phase))))
    with service:
        app = make_app(service, api_keys=api_keys, cors_origins=command.cors_origins)
        address = f"http://{command.host}:{listener.getsockname()[1]}"
        _Server(service, app, address, command.drain_seconds).run(sockets=[listener])


class _Server(uvicorn.Server):
    """A server that refuses new requests as soon as it is told to stop, and finishes those that it has."""

    def __init__(self, service: Service, app: Starlette, address: str, drain_seconds: int):
        super().__init__(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=drain_seconds)
        )
        self._service = service
        self._address = address
        # it would cut streams as soon as the server is told to stop; they end by themselves, or after ``drain_seconds``
        AppStatus.disable_automatic_graceful_drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # now it listens; before that a client that was told of it would be refused
        print(f"{self._service.spec.model_name} answers at {self._address}; Ctrl-C stops it", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        super().handle_exit(sig, frame)


def _bind(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to yet.

    Raises:
      InputError: if the address is taken, or is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as e:
        raise InputError(f"--host {host}: {e.strerror or e}") from e
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as e:
        listener.close()
        raise InputError(f"--host {host} --port {port}: cannot listen there: {e.strerror or e}") from e
    return listener


def check_command(command: HttpCommand) -> None:
    """Finds what is wrong with the options before anything is loaded.

    Raises:
      InputError: naming the option.
    """
    check_model_options(command)
    check_ray_options(command.ray)
    check_int("--port", command.port, 0, 65_535)
    check_int("--sessions", command.sessions, 0, _MAX_QUEUE)
    check_int("--queue", command.queue, 0, _MAX_QUEUE)
    check_int("--drain-seconds", command.drain_seconds, 0)
    check_float("--max-body-megabytes", command.max_body_megabytes, 0, _MAX_MEGABYTES, above=True)
    check_float("--prefix-gigabytes", command.prefix_gigabytes, 0, _MAX_GIGABYTES)
    check_float("--files-gigabytes", command.files_gigabytes, 0, _MAX_GIGABYTES)
    for folder in command.media_root:
        if not Path(folder).is_dir():
            raise InputError(f"--media-root {folder}: there is no such folder")


def make_service_spec(command: HttpCommand) -> ServiceSpec:
    """What the options say of the service."""
    return ServiceSpec(
        model=make_model_spec(command, int(command.prefix_gigabytes * 1e9)),
        name=command.name,
        media_roots=MediaRoots(command.media_root),
        queue=command.queue,
        max_body_bytes=int(command.max_body_megabytes * 1e6),
        max_file_bytes=int(command.files_gigabytes * 1e9),
        voices_dir=command.voices_dir,
        transcription_prompt=command.transcription_prompt,
        max_sessions=command.sessions,
        voice_detector=command.voice_detector,
        replicas=command.ray.actors if command.engine == "ray" else 1,
    )


def read_keys(command: HttpCommand) -> list[str]:
    """The keys of a file, one a line, and that of the environment.

    Raises:
      InputError: if the file cannot be read or has none.
    """
    keys = [os.environ[KEY_VARIABLE]] if os.environ.get(KEY_VARIABLE) else []
    if command.api_keys is not None:
        try:
            lines = command.api_keys.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"--api-keys {command.api_keys}: cannot be read: {e}") from e
        if not lines:
            raise InputError(f"--api-keys {command.api_keys}: it has no key; write one a line")
        keys += lines
    return keys
