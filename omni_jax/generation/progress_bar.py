"""A bar on the terminal that says how far compiling is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from omni_jax.engine import warmup


@contextlib.contextmanager
def show_progress(progress: warmup.Progress | None) -> Iterator[warmup.Progress]:
    """``progress`` itself, or a bar that is drawn where there is a terminal."""
    if progress is not None:
        yield progress
        return
    console = Console(stderr=True)
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling")
        yield lambda done, total: bar.update(task, completed=done, total=total)
