"""What a person sees of a run: a line of progress, a file of metrics, TensorBoard, and in the end a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"


def read_metrics(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """The steps that a file tells of, up to ``last``; a line that a kill cut short is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if last is None or values["step"] <= last:
            found.append(values)
    return found


class Reporter:
    """Writes what each step says; of several processes the first does."""

    def __init__(self, workdir: Path, begin: int, steps: int, log_every: int) -> None:
        """Steps after ``begin``, the one that the run goes on from, are forgotten; they come again."""
        self._path, self._every, self._steps = workdir / METRICS_FILE, log_every, steps
        kept = read_metrics(self._path, begin)
        self._path.write_text("".join(f"{json.dumps(values)}\n" for values in kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=begin + 1, write_to_disk=True)
        self._console = Console()
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(20),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=steps, completed=begin)
        self._bar.start()

    def step(self, values: Mapping[str, Any], mfu: float | None, flops: float) -> None:
        """Tells of a step.

        Args:
          values: what its line in the file says: step, loss, grad_norm, tokens, seconds, data_wait and more.
          mfu: share of the devices' peak that its model FLOPs are; None if the peak is not known.
          flops: model FLOPs a second and device.
        """
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        number, seconds = values["step"], max(values["seconds"], 1e-9)
        rate, wait = values["tokens"] / seconds, values["data_wait"] / seconds
        shown = {**{k: v for k, v in values.items() if isinstance(v, float)}, "tokens_per_second": rate}
        for name, value in shown.items() if mfu is None else {**shown, "mfu": mfu}.items():
            self._board.add_scalar(name, value, number)
        used = f"{flops / 1e12:.3f} TFLOP/s a device" if mfu is None else f"MFU {mfu:.1%}"
        text = f"loss {values['loss']:.4f}, {rate:,.0f} tokens/s, {wait:.0%} waiting for data, {used}"
        self._bar.update(self._task, completed=number, description=text)
        if not self._console.is_terminal and (number % self._every == 0 or number == self._steps):
            self.say(f"step {number}/{self._steps}: {text}")

    def say(self, text: str) -> None:
        """Prints a line above the progress."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the line of progress and both files."""
        self._bar.stop()
        self._file.close()
        self._board.close()


def plot(workdir: Path) -> Path | None:
    """Draws the loss of a run over its steps; None without matplotlib (``pip install omni_jax[plots]``)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    metrics = read_metrics(workdir / METRICS_FILE)
    steps, losses = [m["step"] for m in metrics], [m["loss"] for m in metrics]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, linewidth=1, marker="." if len(steps) < 100 else None)
    axes.set(xlabel="step", ylabel="loss a learnt token (nats)", title=workdir.name)
    axes.grid(alpha=0.3)
    figure.savefig(workdir / PLOT_FILE, dpi=120)
    return workdir / PLOT_FILE
