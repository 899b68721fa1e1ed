"""``bench.py batch``: many requests through PyTorch one by one, in text batches, and through the scheduler."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.budget import ReplyLength
from benchmarks.models import make_middle_config, write_model
from benchmarks.ours import OmniJaxSide
from benchmarks.pytorch_side import PyTorchSide
from benchmarks.report import (
    check_at_least_one,
    check_picture,
    format_seconds,
    print_tables,
    save_figure,
    write_json,
)
from benchmarks.side import CODES_PER_SECOND, CONVERTED, ReplyRequest, Side, SideProcess, Throughput
from omni_jax.checkpoint.model_files import TOKEN2WAV_FILE
from omni_jax.models.ode_solver import Solver

WORDS = "what do you hear and see when the rain falls over a town".split()


@dataclass(frozen=True)
class BatchRun:
    """One way to answer all of the requests.

    Attributes:
      name: in the table.
      spoken: whether the replies are spoken.
      slots: of omni_jax's scheduler, or None.
      rates: requests, tokens, and where spoken seconds of speech, a second.
      gigabytes: that the process held at most, parameters included.
    """

    name: str
    spoken: bool
    slots: int | None
    rates: dict[str, float]
    gigabytes: float
    throughput: Throughput


@dataclass(frozen=True)
class BatchResults:
    """All figures."""

    requests: int
    tokens: int
    speech_seconds: float
    runs: list[BatchRun]


def batch(
    json_out: Path | None = None,
    picture: Path | None = None,
    requests: int = 64,
    seconds: tuple[int, ...] = (1, 2, 3),
    slots: tuple[int, ...] = (1, 2, 4, 8, 16),
    text_batch: int = 16,
    distilled_steps: int | None = None,
) -> None:
    """Throughput of spoken and of written replies, at the middle size with random parameters in float32.

    The questions are texts of 2 to 40 words; replies have 4 tokens and 50 codes a second, the ends being made
    impossible. PyTorch speaks them one by one, and writes them in batches; omni_jax speaks them with each number of
    slots, after a warm-up, and writes them with the last. Memory is the most that the process held.

    On two cores: half an hour.

    Example: python tools/bench.py batch --json-out out/batch.json --picture out/batch.png

    Example, in a few minutes: python tools/bench.py batch --requests 16 --seconds 1 --slots 1 4

    Args:
      json_out: write the figures here as well.
      picture: draw throughput over slots here (.png, .svg or .pdf).
      requests: how many.
      seconds: of their replies, in turn.
      slots: of the scheduler, fewest first.
      text_batch: requests in each of PyTorch's batches.
      distilled_steps: have omni_jax make the mel as a distilled DiT does, in so many steps of Euler's rule of one
        evaluation each; PyTorch has the published 36 of two each. Parameters are random, so that it is the work of
        such a DiT that is measured, and not its sound.
    """
    # before half an hour of work
    check_at_least_one(
        requests=requests,
        seconds=seconds,
        slots=slots,
        text_batch=text_batch,
        distilled_steps=1 if distilled_steps is None else distilled_steps,
    )
    check_picture(picture)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, make_middle_config())
        if distilled_steps is not None:
            solver = Solver("euler", distilled_steps, guidance=False)
            (folder / CONVERTED / TOKEN2WAV_FILE).write_text(solver.to_json(), encoding="utf-8")
        results = run_all(folder, make_requests(requests, seconds), slots, text_batch, json_out)
    print_results(results)
    if picture is not None:
        draw_results(results, picture)


def make_requests(count: int, seconds: Sequence[int], seed: int = 0) -> list[ReplyRequest]:
    """Questions of 2 to 40 words, with replies of these lengths in turn."""
    rng = random.Random(seed)
    # lengths in turns, so that slots are free at different times
    requests = []
    for i in range(count):
        question = " ".join(rng.choices(WORDS, k=rng.randint(2, 40)))
        length = ReplyLength(seconds[i % len(seconds)])
        requests.append(ReplyRequest(question, length.num_tokens, length.num_codes))
    return requests


def run_all(
    folder: Path,
    requests: Sequence[ReplyRequest],
    slots: Sequence[int],
    text_batch: int,
    json_out: Path | None = None,
    process: type[SideProcess] = SideProcess,
) -> BatchResults:
    """All ways to answer.

    Args:
      folder: of the model.
      requests: what is asked.
      slots: of the scheduler, fewest first.
      text_batch: requests in each of PyTorch's batches.
      json_out: where the figures are written, each as it is there.
      process: in which a side works.
    """
    speech_seconds = sum(request.num_codes for request in requests) / CODES_PER_SECOND
    results = BatchResults(len(requests), sum(request.num_tokens for request in requests), speech_seconds, [])
    # a process of its own makes the inputs of both sides, and its memory is nobody's figure
    with process(OmniJaxSide, folder) as ours:
        prepared = ours.run(OmniJaxSide.make_inputs, requests)
    # name, side, requests at once, whether spoken
    ways: list[tuple[str, type[Side], int, bool]] = [
        ("PyTorch, spoken one by one", PyTorchSide, 1, True),
        (f"PyTorch, written in batches of {text_batch}", PyTorchSide, text_batch, False),
    ]
    for count in slots:
        ways.append((f"omni_jax, spoken, slots: {count}", OmniJaxSide, count, True))
    ways.append((f"omni_jax, written, slots: {slots[-1]}", OmniJaxSide, slots[-1], False))
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("answering", total=len(ways))
        for name, side, count, spoken in ways:
            progress.update(bar, description=name)
            # a process for each way: its memory is that of this way alone
            with process(side, folder) as work:
                throughput = work.run(Side.answer_all, prepared, count, spoken=spoken)
                memory = work.memory
            # by what was asked for: a reply of another length is an error
            rates = {
                "requests": results.requests / throughput.seconds,
                "tokens": results.tokens / throughput.seconds,
            }
            if spoken:
                rates["speech"] = speech_seconds / throughput.seconds
            our_slots = count if side is OmniJaxSide else None
            # each way is written as it is done: a long run may be broken off
            results.runs.append(BatchRun(name, spoken, our_slots, rates, memory / 1e9, throughput))
            write_json(json_out, asdict(results))
            progress.advance(bar)
    return results


def print_results(results: BatchResults) -> None:
    """A row for each way, beside PyTorch's of the same kind."""
    # PyTorch's way of each kind, spoken or written; the first of ours has the fewest slots
    pytorch = {run.spoken: run for run in results.runs if run.slots is None}
    first = next(run for run in results.runs if run.slots is not None)
    heads = ("seconds", "requests/s", "tokens/s", "speech s/s", "over PyTorch", "over the fewest slots", "memory, GB")
    table = Table("", *heads, "padding")
    for run in results.runs:
        # how throughput grows with slots: of spoken replies alone, as only these have several numbers of slots
        rate = run.rates["requests"]
        growth = ""
        if run.slots is not None and run.spoken:
            growth = f"{rate / first.rates['requests']:.2f}"
        padding = [f"{stage} {share:.0%}" for stage, share in run.throughput.padding.items()]
        rates = []
        for key in ("requests", "tokens", "speech"):
            rates.append(f"{run.rates[key]:.2f}" if key in run.rates else "")
        table.add_row(
            run.name,
            format_seconds(run.throughput.seconds),
            *rates,
            f"{rate / pytorch[run.spoken].rates['requests']:.2f}",
            growth,
            f"{run.gigabytes:.1f}",
            ", ".join(padding),
        )
    print_tables(table)


def draw_results(results: BatchResults, picture: Path) -> None:
    """Draws throughput over slots, beside PyTorch's, and where the time of a request goes."""
    from matplotlib import pyplot  # an extra, which only pictures need

    # ours, one for each number of slots
    runs = [run for run in results.runs if run.slots is not None and run.spoken]
    slots = [run.slots for run in runs]
    names = [str(count) for count in slots]
    figure, (rates, stages) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    _draw_rates(rates, runs, results.runs[0].rates["speech"])
    rates.set_xticks(slots, names)
    # a bar for each number of slots, in which the stages stand upon each other
    bottoms = [0.0] * len(runs)
    for stage in runs[0].throughput.stages:
        heights = [run.throughput.stages[stage] / results.requests for run in runs]
        stages.bar(names, heights, bottom=bottoms, label=stage)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    stages.set(xlabel="slots", ylabel="seconds a request")
    stages.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{results.requests} spoken requests at the middle size, two cores")
    save_figure(figure, picture)


def _draw_rates(axes: Any, runs: Sequence[BatchRun], pytorch: float) -> None:
    slots = [run.slots or 0 for run in runs]
    speech = [run.rates["speech"] for run in runs]
    # what it would be if a step took the same time, however many slots it serves
    proportional = [speech[0] * count / slots[0] for count in slots]
    axes.plot(slots, speech, "o-", label="omni_jax")
    axes.plot(slots, proportional, ":", color="grey", label="as many times as slots")
    axes.axhline(pytorch, color="tab:red", label="PyTorch, one by one")
    # on two logarithmic axes what grows in proportion is a straight line
    axes.set(xscale="log", yscale="log", xlabel="slots", ylabel="seconds of speech a second")
    axes.legend()
