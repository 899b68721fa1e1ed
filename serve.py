"""Answers questions with a converted model; see --help, and --help of each command."""

from __future__ import annotations

import sys

import tyro

from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.serving.batch import Batch
from omni_jax.serving.chat import Chat

COMMANDS = {"chat": Chat, "batch": Batch}


def main() -> int:
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, description="Answers with a converted Qwen2.5-Omni model.")
    try:
        command.run()
    except (InputError, CheckpointError, ConfigError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
