"""How long a checkpoint's spoken answers take, stage by stage, on rows of ``tools/make_world.py``.

    python tools/measure_latency.py checkpoints/omni-tiny out/world/test.jsonl --out latency.json

Each row is asked by itself and its answer is streamed, as a user alone with the model would ask it: when the first text
and the first sound came, and how long each stage had the host wait until the reply was complete. All of them are
answered once before, untimed, so that nothing compiles on the way. The seconds belong to the machine.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import omni_jax
from omni_jax.checks import check_int
from omni_jax.data.replies import LastReply
from omni_jax.errors import InputError
from omni_jax.generation.model import OmniModel
from omni_jax.plain_files import replace_file
from tools.command_errors import exit_on_error
from tools.run_commands import count_cores, find_devices
from tools.task_rows import read_by_task, with_speech_prompt

_TASKS = ("opposite-voice", "colour", "colour-voice", "order", "narrate", "video-dialogue")


@dataclass(frozen=True)
class Options:
    """What is asked."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A checkpoint, or the folder of a training run."""
    rows: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Rows with a task."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.json")]
    """What was found."""
    tasks: tuple[str, ...] = _TASKS
    """Of the rows."""
    items: int = 20
    """Of each task, at most."""
    max_tokens: int = 48
    """Of an answer."""
    max_codes: int = 400
    """Of its speech."""


def time_reply(model: OmniModel, reply: LastReply, options: Options) -> dict[str, float]:
    """Seconds until the first text and the first sound of an answer, until its end, and of each stage."""
    talker = dict(seed=0, max_tokens=options.max_codes)
    events = model.stream(
        with_speech_prompt(reply.prompt), modalities=("text", "audio"), max_tokens=options.max_tokens, talker=talker
    )
    begin = time.perf_counter()
    found: dict[str, float] = {}
    for event in events:
        now = time.perf_counter() - begin
        if event.text:
            found.setdefault("first text", now)
        if event.audio is not None:
            found.setdefault("first sound", now)
        if event.reply is not None:
            found["whole reply"] = now
            found |= dataclasses.asdict(event.reply.timings)
            found["sound"] = 0.0 if event.reply.audio is None else len(event.reply.audio) / event.reply.sample_rate
    return found


def summarize(timed: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median and 95th percentile of each figure, over the replies that have it."""
    columns: dict[str, list[float]] = {}
    for found in timed:
        for name, seconds in found.items():
            columns.setdefault(name, []).append(seconds)
    return {
        name: {"median": float(np.median(column)), "p95": float(np.percentile(column, 95))}
        for name, column in columns.items()
    }


def measure(options: Options) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by task.

    Raises:
      CheckpointError, ConfigError, InputError: where there are none.
    """
    check_int("--items", options.items, 1)
    by_task = read_by_task(options.rows)
    missing = [task for task in options.tasks if not by_task.get(task)]
    if missing:
        raise InputError(f"{options.rows} has no rows of {', '.join(missing)}; it has {', '.join(by_task)}")
    model = omni_jax.load(options.model)
    found = {}
    for task in options.tasks:
        timed = []
        for reply in track(by_task[task][: options.items], task, console=Console(stderr=True)):
            time_reply(model, reply, options)  # compiles for its lengths
            timed.append(time_reply(model, reply, options))
        found[task] = summarize(timed)
    return found


def show(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Prints the medians."""
    names = list(next(iter(found.values())))
    table = Table("seconds, medians", *found)
    for name in names:
        table.add_row(name, *(f"{own[name]['median']:.3f}" if name in own else "" for own in found.values()))
    Console().print(table)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with exit_on_error():
        found = measure(options)
    backend, _, kind = find_devices()
    device = f"{count_cores()} cores, {kind}" if backend == "cpu" else kind
    values = {"device": device, "items": options.items, "tasks": found}
    replace_file(options.out, (json.dumps(values, indent=2) + "\n").encode())
    show(found)


if __name__ == "__main__":
    main()
