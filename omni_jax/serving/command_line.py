"""What ``serve.py`` does with its arguments."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from omni_jax.checks import printable
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.serving.batch import run_batch
from omni_jax.serving.chat import run_chat
from omni_jax.serving.commands import BatchCommand, ChatCommand, HttpCommand

COMMANDS = {"chat": ChatCommand, "batch": BatchCommand, "http": HttpCommand}


def run_command(arguments: Sequence[str] | None) -> int:
    """Runs a command; ``arguments`` are those of the process if None. Returns the exit status."""
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, description="Answers with a converted Qwen2.5-Omni model.", args=arguments
        )
        if isinstance(command, ChatCommand):
            run_chat(command)
        elif isinstance(command, BatchCommand):
            run_batch(command)
        else:
            _run_http(command)
    except (InputError, CheckpointError, ConfigError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run_http(command: HttpCommand) -> None:
    # what it needs is an extra, which the other commands do without
    try:
        from omni_jax.serving.http_server import run_http
    except ImportError as e:
        raise InputError(f"serve.py http needs more: pip install 'omni_jax[serve]' ({e})") from e
    run_http(command)
