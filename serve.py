"""Answers questions with a converted model; see --help, and --help of each command."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; ``arguments`` are those of the process unless given. Returns the exit status."""
    # here and not above: processes that decode media import this file when they start, and need no JAX
    from omni_jax.serving.command_line import run_command

    return run_command(arguments)


if __name__ == "__main__":
    sys.exit(main())
