"""How commands end that cannot do what they are asked to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from omni_jax.checks import printable
from omni_jax.errors import CheckpointError, ConfigError, InputError, JudgeError, TrainingError


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends the process after an error that its user can act on: with status 1, and the message alone on stderr."""
    try:
        yield
    except (CheckpointError, ConfigError, InputError, JudgeError, TrainingError) as e:
        raise SystemExit(f"error: {printable(str(e))}") from None
