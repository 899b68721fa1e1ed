"""Answers questions with a converted model; see --help, and --help of each command."""

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; ``arguments`` are those of the process unless given. Returns the exit status."""
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


if __name__ == "__main__":
    sys.exit(main())
