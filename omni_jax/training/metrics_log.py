"""What a person sees of a run: a line of progress, a file of metrics, TensorBoard, in the end a plot of the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from omni_jax.checks import printable
from omni_jax.plain_files import open_own_file, replace_file
from omni_jax.training.objective import Sample

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "eval.jsonl"
SAMPLES_FILE = "samples.jsonl"
PLOT_FILE = "loss.png"
_SMOOTHED_STEPS = 100  # of a run, from where its loss is drawn smoothed too


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The metrics of each step in a file, up to ``last_step``; a line that a kill cut short is passed over."""
    metrics: list[dict[str, Any]] = []
    if not path.exists():
        return metrics
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if last_step is None or values["step"] <= last_step:
            metrics.append(values)
    return metrics


class _Step(NamedTuple):
    """What the line of progress is made of."""

    loss: float | None  # None: the step was skipped
    tokens: int
    seconds: float
    data_wait: float  # seconds
    flops: float  # of a device in a second


class MetricsLog:
    """Writes the metrics of each step; of several processes the main one does."""

    def __init__(self, workdir: Path, first_step: int, num_steps: int, log_every: int) -> None:
        """Opens the files of a run.

        Args:
          workdir: the run's folder.
          first_step: the one that the run goes on from; later steps in the files are dropped, they come again.
          num_steps: of the whole run.
          log_every: steps from one printed line to the next where there is no terminal.
        """
        self._path = workdir / METRICS_FILE
        self._log_every = log_every
        self._num_steps = num_steps
        self._steps: list[_Step] = []  # since the last line
        self._peak: float | None = None
        # lines of steps that the run makes again are dropped from the file, and hidden in TensorBoard
        self._file = _reopen(self._path, first_step)
        self._evaluations = _reopen(workdir / EVALUATIONS_FILE, first_step)
        self._samples = _reopen(workdir / SAMPLES_FILE, first_step)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1, write_to_disk=True)

        # a line that is rewritten in place where there is a terminal; elsewhere ``log_step`` prints some of the steps
        self._console = Console(markup=False)
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(20),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=num_steps, completed=first_step)
        self._bar.start()

    def log_step(self, metrics: Mapping[str, Any], flops_per_device: float, peak: float | None) -> None:
        """Writes the metrics of a step.

        Args:
          metrics: its line in the file: step, loss, grad_norm, tokens, seconds, data_wait and more.
          flops_per_device: model FLOPs a second of each device.
          peak: FLOPs a second that a device can do; None if it is not known.
        """
        # flushed, so that a kill costs no step that was reported
        self._file.write(json.dumps(metrics).encode() + b"\n")
        self._file.flush()

        step = metrics["step"]
        seconds = max(metrics["seconds"], 1e-9)
        # counts, which are integers, are in the file alone
        for name, value in metrics.items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, step)
        self._board.add_scalar("tokens_per_second", metrics["tokens"] / seconds, step)
        if peak is not None:
            self._board.add_scalar("mfu", flops_per_device / peak, step)
        self._peak = peak
        self._steps.append(_Step(metrics["loss"], metrics["tokens"], seconds, metrics["data_wait"], flops_per_device))
        self._bar.update(self._task, completed=step, description=self._describe())
        if step % self._log_every == 0 or step == self._num_steps:
            if not self._console.is_terminal:
                self.print(f"step {step}/{self._num_steps}: {self._describe()}")
            self._steps.clear()

    def _describe(self) -> str:
        """Means over the steps since the last line."""
        seconds = sum(step.seconds for step in self._steps)
        losses = [step.loss for step in self._steps if step.loss is not None]
        loss = f"loss {sum(losses) / len(losses):.4f}" if losses else "skipped"
        tokens_per_second = sum(step.tokens for step in self._steps) / seconds
        flops = sum(step.flops * step.seconds for step in self._steps) / seconds
        utilization = f"{flops / 1e12:.3f} TFLOP/s a device"
        if self._peak is not None:
            utilization = f"MFU {flops / self._peak:.1%}"
        wait = sum(step.data_wait for step in self._steps) / seconds
        return f"{loss}, {tokens_per_second:,.0f} tokens/s, {wait:.0%} waiting for data, {utilization}"

    def log_evaluation(self, found: Mapping[str, Any]) -> None:
        """Writes the loss of held-out rows: step, loss, and maybe the loss of each file of rows."""
        self._evaluations.write(json.dumps(found).encode() + b"\n")
        self._evaluations.flush()
        self._board.add_scalar("held-out/loss", found["loss"], found["step"])
        for name, loss in found.get("sources", {}).items():
            self._board.add_scalar(f"held-out/{Path(name).name}", loss, found["step"])

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Writes what the model answers to held-out rows."""
        for sample in samples:
            self._samples.write(json.dumps({"step": step, **sample._asdict()}).encode() + b"\n")
            self._board.add_text(
                f"samples/{Path(sample.row).name}", f"{sample.answer}\n\n(expected: {sample.expected})", step
            )
        self._samples.flush()

    def print(self, text: str) -> None:
        """Prints a line above the progress."""
        self._console.print(printable(text), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the line of progress and all files."""
        self._bar.stop()
        self._file.close()
        self._evaluations.close()
        self._samples.close()
        self._board.close()


def _reopen(path: Path, last_step: int) -> BinaryIO:
    """Opens a file of lines to append to, without those of later steps."""
    kept = read_metrics(path, last_step)
    # all at once, so that a kill loses no line that was kept
    replace_file(path, "".join(f"{json.dumps(values)}\n" for values in kept).encode())
    return open_own_file(path, append=True)


def plot_loss(workdir: Path) -> Path | None:
    """Draws the loss of a run over its steps, and that of held-out rows.

    Returns:
      the picture's path; None without matplotlib (``pip install omni_jax[plots]``).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    # of the whole run, through all its restarts, each step once
    metrics = read_metrics(workdir / METRICS_FILE)
    finite = [values for values in metrics if values["loss"] is not None]
    steps = [values["step"] for values in finite]
    losses = [values["loss"] for values in finite]
    # not pyplot, which would look for a display
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    marker = "." if len(steps) < _SMOOTHED_STEPS else None
    axes.plot(steps, losses, linewidth=1, marker=marker, alpha=1.0 if marker else 0.3, label="training")
    if marker is None:
        axes.plot(steps, _smooth(losses), color="C0", label="training, smoothed")
    evaluations = read_metrics(workdir / EVALUATIONS_FILE)
    if evaluations:
        held_out = ([values["step"] for values in evaluations], [values["loss"] for values in evaluations])
        axes.plot(*held_out, marker="o", markersize=3, label="held-out")
        axes.legend()
    axes.set(xlabel="step", ylabel="loss per target token (nats)", title=workdir.name)
    axes.grid(alpha=0.3)
    figure.savefig(workdir / PLOT_FILE, dpi=120)
    return workdir / PLOT_FILE


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value with those before it, whose weight falls to a half in a fiftieth of the run."""
    decay = 0.5 ** (50 / len(values))
    smoothed = []
    mean = 0.0
    weight = 0.0
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + 1 - decay
        smoothed.append(mean / weight)
    return smoothed
