"""What ``serve.py`` does with its arguments."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from omni_jax.checks import printable
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.serving.batch import run_batch
from omni_jax.serving.chat import run_chat
from omni_jax.serving.commands import BatchCommand, ChatCommand

COMMANDS = {"chat": ChatCommand, "batch": BatchCommand}


def run_command(arguments: Sequence[str] | None) -> int:
    """Runs a command; ``arguments`` are those of the process if None. Returns the exit status."""
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, description="Answers with a converted Qwen2.5-Omni model.", args=arguments
        )
        if isinstance(command, ChatCommand):
            run_chat(command)
        else:
            run_batch(command)
    except (InputError, CheckpointError, ConfigError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
