"""What a person sees while a file of requests is answered, and the summary of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from omni_jax.checks import printable
from omni_jax.engine.outputs import Utilization
from omni_jax.serving.batch_lines import Result
from omni_jax.serving.batch_results import Results
from omni_jax.serving.batch_runner import RunStatus


class BatchProgress:
    """A bar and a line of figures on a terminal; a context manager.

    Attributes:
      status: of the worker in this process; nothing is known of actors elsewhere.
    """

    def __init__(self, terminal: Console, total: int, results: Results):
        """``total`` requests, of which those in ``results`` are done."""
        self.status = RunStatus()
        self._start_time = time.perf_counter()
        # by runs before this one: part of the bar, and not of the speed
        self._num_finished_before = len(results.finished)
        self._num_failed_before = results.num_failed
        self._num_finished = 0
        self._num_failed = 0
        self._num_tokens = 0
        self._speech_seconds = 0.0
        self._progress = _BarWithFigures(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=terminal,
        )
        # the count of lines is a rough one
        total = max(total, self._num_finished_before)
        self._bar = self._progress.add_task("requests", total=total, completed=self._num_finished_before)
        if self._num_finished_before:
            count = self._num_finished_before
            terminal.print(f"going on after {count} requests that have their results", highlight=False)

    def __enter__(self) -> BatchProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def set_phase(self, description: str) -> None:
        """Says what is done before the first request."""
        self._progress.update(self._bar, description=printable(description))

    def start_clock(self, status: RunStatus) -> None:
        """From now on time counts, and ``status`` is watched."""
        self.status = status
        self._start_time = time.perf_counter()
        self.set_phase("requests")

    def add(self, result: Result) -> None:
        """Counts a result."""
        self._num_finished += 1
        self._num_failed += result.failed
        self._num_tokens += result.num_tokens
        self._speech_seconds += result.speech_seconds
        seconds = time.perf_counter() - self._start_time
        # means since the first request: text and speech of a request come in bursts
        figures = [
            f"{self._num_failed_before + self._num_failed} failed",
            f"{self._num_tokens / seconds:.1f} tokens/s",
            f"{self._speech_seconds / seconds:.2f} s of speech/s",
        ]
        # nothing is known of the slots of actors in other processes
        padding = padding_of_stages(self.status.utilization)
        if padding:
            average = sum(padding.values()) / len(padding)
            figures += [f"{self.status.num_running} in slots", f"{average:.0%} padding"]
        self._progress.figures = ", ".join(figures)
        self._progress.update(self._bar, advance=1)

    def summarize(self) -> dict[str, Any]:
        """Figures of this run, and of the runs before it that it goes on from; of JSON's types."""
        seconds = time.perf_counter() - self._start_time
        answered_before = self._num_finished_before - self._num_failed_before
        summary = {
            "answered": self._num_finished - self._num_failed,
            "failed": self._num_failed,
            "before": {"answered": answered_before, "failed": self._num_failed_before},
            "seconds": round(seconds, 2),
            "requests_per_second": round(self._num_finished / seconds, 3),
            "tokens": self._num_tokens,
            "tokens_per_second": round(self._num_tokens / seconds, 2),
            "speech_seconds": round(self._speech_seconds, 2),
            "speech_seconds_per_second": round(self._speech_seconds / seconds, 3),
        }
        padding = padding_of_stages(self.status.utilization)
        if padding:
            summary["padding"] = {stage: round(part, 3) for stage, part in padding.items()}
            summary["compilations"] = self.status.compilations.count
        return summary


class _BarWithFigures(Progress):
    """A bar, and under it a line of figures."""

    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.figures)


def padding_of_stages(utilization: Utilization) -> dict[str, float]:
    """Which part of the positions, steps and blocks that each stage computed was padding; only of those that did."""
    stages = {
        "prompts": utilization.prefill,
        "text": utilization.text,
        "speech": utilization.speech,
        "sound": utilization.vocoder,
    }
    padding = {}
    for name, use in stages.items():
        if use.computed:
            padding[name] = 1 - use.used / use.computed
    return padding


def print_summary(terminal: Console, summary: dict[str, Any], status: RunStatus, output: str) -> None:
    """Prints a table of the summary, and a warning of speech under untrained prompts."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), _describe(name, value))
    terminal.print(table)
    if status.num_untrained_prompts:
        terminal.print(
            f"{status.num_untrained_prompts} requests were spoken under another system prompt than the one that "
            "speech was trained with (omni_jax.SPEECH_SYSTEM_PROMPT); the model may have spoken badly",
            highlight=False,
            soft_wrap=True,
        )
    terminal.print(f"results in {printable(output)}", highlight=False, soft_wrap=True)
    # before the summary goes to stdout, so that the two do not mix where both are one terminal
    sys.stderr.flush()


def _describe(name: str, value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    # "text 12.5%" for shares, "3 failed" for counts
    form = "{0} {1:.1%}" if name == "padding" else "{1} {0}"
    return ", ".join(form.format(part, number) for part, number in value.items())
