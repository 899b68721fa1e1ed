"""``bench.py batch``: many requests through PyTorch one by one, in text batches, and through the scheduler."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import batch_ours, batch_theirs
from benchmarks.batch_requests import Dialogue, make_dialogues
from benchmarks.bench_sizes import middle_config
from benchmarks.bench_timing import Side, duration, write
from omni_jax.config import OmniConfig


def batch(
    json_out: Path | None = None,
    picture: Path | None = None,
    requests: int = 64,
    seconds: tuple[int, ...] = (1, 2, 3),
    slots: tuple[int, ...] = (1, 2, 4, 8, 16),
    text_batch: int = 16,
) -> None:
    """Throughput of spoken and of written replies, at the middle size with random weights in float32.

    The questions are texts of 2 to 40 words; replies have 4 tokens and 50 codes a second, the ends being made
    impossible. PyTorch speaks them one by one, and writes them in batches; omni_jax speaks them with each number of
    slots, after a warm-up, and writes them with the last. Memory is the most that the process held, weights included.

    On two cores: half an hour.

    Example: python tools/bench.py batch --json-out out/batch.json --picture out/batch.png

    Example, in a few minutes: python tools/bench.py batch --requests 16 --seconds 1 --slots 1 4

    Args:
      json_out: write the figures here as well.
      picture: draw throughput over slots here (.png, .svg or .pdf).
      requests: how many.
      seconds: of their replies, in turn.
      slots: of the scheduler, fewest first.
      text_batch: rows of PyTorch's batches.
    """
    if requests < 1 or text_batch < 1 or not seconds or not slots or min(*seconds, *slots) < 1:
        sys.exit("--requests, --seconds, --slots and --text-batch must all be at least 1")
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--picture needs matplotlib: pip install -e '.[plots]'")
    with tempfile.TemporaryDirectory() as folder:
        dialogues = make_dialogues(requests, seconds)
        results = report(middle_config(), Path(folder), dialogues, slots, text_batch, json_out=json_out)
    show(results)
    if picture is not None:
        draw(results, picture)


def report(
    config: OmniConfig,
    folder: Path,
    dialogues: tuple[Dialogue, ...],
    slots: Sequence[int],
    text_batch: int,
    *,
    side: Callable[[], Side] = Side,
    json_out: Path | None = None,
) -> dict[str, Any]:
    """All figures.

    Args:
      config: of the model, which is made in ``folder``.
      folder: that is empty.
      dialogues: what is asked.
      slots: of the scheduler, fewest first.
      text_batch: rows of PyTorch's batches.
      side: makes a process of its own for each side's work.
      json_out: where the figures are written, each as it is there.
    """
    published, converted = folder / "published", folder / "converted"
    results: dict[str, Any] = dict(
        requests=len(dialogues),
        tokens=sum(d.tokens for d in dialogues),
        speech_seconds=sum(d.codes for d in dialogues) / 50,
        runs=[],
    )
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("writing a model", total=3 + len(slots) + 1)

        def add(name: str, made: dict[str, Any], spoken: bool, memory: int) -> None:
            took = made["seconds"]
            rates = dict(requests=len(dialogues) / took, tokens=results["tokens"] / took)
            rates |= dict(speech=results["speech_seconds"] / took) if spoken else {}
            results["runs"].append(dict(name=name, rates=rates, gigabytes=memory / 1e9, **made))
            write(json_out, results)
            progress.update(bar, advance=1, description=name)

        maker = side()
        maker(batch_ours.make, published, converted, config)
        prompts = maker(batch_ours.prompts, converted, dialogues)
        maker.close()
        progress.update(bar, advance=1, description="PyTorch")
        theirs = side()
        took = theirs(batch_theirs.speak, str(published), prompts, dialogues)
        add("PyTorch, spoken one by one", dict(seconds=took), True, theirs.memory)
        took = theirs(batch_theirs.write, str(published), prompts, dialogues, text_batch)
        add(f"PyTorch, written in batches of {text_batch}", dict(seconds=took), False, theirs.memory)
        theirs.close()
        for count in slots:
            ours = side()
            made = ours(batch_ours.answer, converted, dialogues, count, True)
            add(f"omni_jax, spoken, slots: {count}", dict(slots=count, **made), True, ours.memory)
            ours.close()
        ours = side()
        made = ours(batch_ours.answer, converted, dialogues, slots[-1], False)
        add(f"omni_jax, written, slots: {slots[-1]}", made, False, ours.memory)
        ours.close()
    return results


def show(results: dict[str, Any]) -> None:
    """Prints what ``report`` gave."""
    runs = {run["name"]: run for run in results["runs"]}
    theirs = next(run for name, run in runs.items() if name.startswith("PyTorch, spoken"))
    written = next(run for name, run in runs.items() if name.startswith("PyTorch, written"))
    first = next(run for run in runs.values() if "slots" in run)
    heads = ("seconds", "requests/s", "tokens/s", "speech s/s", "over PyTorch", "over the fewest slots", "memory, GB")
    table = Table("", *heads, "padding")
    for name, run in runs.items():
        rates, base = run["rates"], theirs if "speech" in run["rates"] else written
        growth = f"{rates['requests'] / first['rates']['requests']:.2f}" if "slots" in run else ""
        padding = ", ".join(f"{part} {share:.0%}" for part, share in run.get("padding", {}).items())
        table.add_row(
            name,
            duration(run["seconds"]),
            *(f"{rates[key]:.2f}" if key in rates else "" for key in ("requests", "tokens", "speech")),
            f"{rates['requests'] / base['rates']['requests']:.2f}",
            growth,
            f"{run['gigabytes']:.1f}",
            padding,
        )
    Console(width=170).print(table)


def draw(results: dict[str, Any], picture: Path) -> None:
    """Draws throughput over slots, beside PyTorch's, and where the time of a request goes."""
    from matplotlib import pyplot

    runs = [run for run in results["runs"] if "slots" in run]
    theirs = results["runs"][0]["rates"]["speech"]
    figure, (rates, stages) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    slots, speech = [run["slots"] for run in runs], [run["rates"]["speech"] for run in runs]
    rates.plot(slots, speech, "o-", label="omni_jax")
    rates.plot(slots, [speech[0] * s / slots[0] for s in slots], ":", color="grey", label="as many times as slots")
    rates.axhline(theirs, color="tab:red", label="PyTorch, one by one")
    rates.set(xscale="log", yscale="log", xlabel="slots", ylabel="seconds of speech a second", xticks=slots)
    rates.set_xticks(slots, [str(s) for s in slots])
    rates.legend()
    ends = [0.0] * len(runs)
    for part in ("prompts", "text", "speech", "sound"):
        heights = [run["stages"][part] / results["requests"] for run in runs]
        stages.bar([str(s) for s in slots], heights, bottom=ends, label=part)
        ends = [end + height for end, height in zip(ends, heights, strict=True)]
    stages.set(xlabel="slots", ylabel="seconds a request")
    stages.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{results['requests']} spoken requests at the middle size, two cores")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
