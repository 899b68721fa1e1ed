"""``bench.py first-packet``: when the first sound comes, over replies of several lengths, Token2Wav as published."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import latency_ours
from benchmarks.bench_latency import SOUND, check_picture
from benchmarks.bench_sizes import middle_config
from benchmarks.bench_timing import Side, duration, write
from benchmarks.latency_figures import LINES, REST, Length, middle
from benchmarks.latency_ours import Request
from omni_jax.config import OmniConfig


def first_packet(
    json_out: Path | None = None,
    picture: Path | None = None,
    seconds: tuple[int, ...] = (2, 10, 30),
    repeats: int = 3,
    sound: Path = SOUND,
) -> None:
    """The first packet of a spoken reply, at several lengths, with DiT and vocoder at their published size.

    Thinker and Talker have the middle size, random weights, float32. The request is that of the latency report, but a
    stream is closed as soon as its first packet is there, so that a reply of 30 seconds costs no more than one of 2.
    Replies are asked for in turns, after model.warmup(); a figure is that of the round with the median audio_ttfp.

    On two cores: about 8 minutes.

    Example: python tools/bench.py first-packet --json-out out/first.json --picture out/first.png

    Args:
      json_out: write the figures here as well.
      picture: draw the budgets here as stacked bars (.png, .svg or .pdf).
      seconds: of the replies, shortest first; each is compared with the first.
      repeats: rounds.
      sound: what is heard in the request.
    """
    if not seconds or list(seconds) != sorted(set(seconds)) or seconds[0] < 1:
        sys.exit(f"--seconds {' '.join(map(str, seconds))}: give different lengths from 1 on, shortest first")
    if repeats < 1:
        sys.exit(f"--repeats {repeats}: it must be at least 1")
    if not sound.is_file():
        sys.exit(f"--sound {sound}: there is no such file")
    check_picture(picture)
    published = OmniConfig.qwen2_5_omni_7b().token2wav_config
    config = dataclasses.replace(middle_config(), token2wav_config=published)
    with tempfile.TemporaryDirectory() as folder:
        request = Request(Path(folder) / "converted", sound.resolve())
        results = report(config, request, [Length(s) for s in seconds], repeats, json_out=json_out)
    show(results)
    if picture is not None:
        from benchmarks.latency_picture import draw_first

        draw_first(results, picture)


def report(
    config: OmniConfig,
    request: Request,
    lengths: Sequence[Length],
    repeats: int,
    *,
    side: Callable[[], Side] = Side,
    json_out: Path | None = None,
) -> dict[str, Any]:
    """All figures.

    Args:
      config: of the model, which is made in ``request.folder`` and beside it.
      request: what is asked.
      lengths: of the replies.
      repeats: rounds.
      side: makes the process that does the work.
      json_out: where the figures are written.
    """
    work = side()
    rounds: list[list[dict[str, Any]]] = [[] for _ in lengths]
    try:
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("writing a model", total=2 + repeats * len(lengths))
            work(latency_ours.make_model, request.folder.with_name("published"), request.folder, config)
            progress.update(bar, advance=1, description="warming up")
            warmed = work(latency_ours.compile_all, request, tuple(lengths))
            progress.update(bar, advance=1, description="replies")
            for _ in range(repeats):
                for length, made in zip(lengths, rounds, strict=True):
                    made.append(work(latency_ours.first_packet, request, length))
                    progress.advance(bar)
    finally:
        work.close()
    replies = []
    for length, made in zip(lengths, rounds, strict=True):
        reply = middle(made, "audio_ttfp") | dict(seconds=length.seconds, rounds=[one["audio_ttfp"] for one in made])
        replies.append(reply)
    first = statistics.median(replies[0]["rounds"])
    for reply in replies:
        reply["ratio"] = statistics.median(reply["rounds"]) / first
    results = dict(warmup=warmed, replies=replies)
    write(json_out, results)
    return results


def show(results: dict[str, Any]) -> None:
    """Prints what ``report`` gave."""
    replies = results["replies"]
    table = Table("to the first packet", *(f"{r['seconds']} s" for r in replies))
    for line in (*LINES, REST):
        table.add_row(line, *(duration(r["budget"].get(line, 0.0)) for r in replies))
    table.add_section()
    table.add_row("audio_ttfp", *(duration(r["audio_ttfp"]) for r in replies))
    table.add_row("rounds", *(f"{min(r['rounds']):.2f} to {max(r['rounds']):.2f} s" for r in replies))
    table.add_row("ttft", *(duration(r["ttft"]) for r in replies))
    table.add_row(f"median over that of {replies[0]['seconds']} s", *(f"{r['ratio']:.3f}" for r in replies))
    table.add_row("compilations", *(str(r["compilations"]) for r in replies))
    console = Console(width=120)
    console.print(table)
    console.print(f"warm-up: {results['warmup']['programs']} programs in {duration(results['warmup']['seconds'])}")
