"""``bench.py first-packet``: when the first sound comes, over replies of several lengths, Token2Wav as published."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.budget import LINES, REST, ReplyLength, median_round, summarize_reply
from benchmarks.budget_picture import draw_first_packets
from benchmarks.latency import SOUND, make_request
from benchmarks.models import make_middle_config, with_published_token2wav, write_model
from benchmarks.ours import OmniJaxSide
from benchmarks.report import (
    check_at_least_one,
    check_picture,
    check_seconds,
    check_sound,
    format_seconds,
    print_tables,
    write_json,
)
from benchmarks.side import Side, SideProcess


def first_packet(
    json_out: Path | None = None,
    picture: Path | None = None,
    seconds: tuple[int, ...] = (2, 10, 30),
    repeats: int = 3,
    sound: Path = SOUND,
) -> None:
    """The first packet of a spoken reply, at several lengths, with DiT and vocoder at their published size.

    Thinker and Talker have the middle size, random parameters, float32. The request is that of the latency report, but
    a stream is closed as soon as its first packet is there, so that a reply of 30 seconds costs no more than one of 2.
    Replies are asked for in turns, after model.warmup(); a figure is that of the round with the median audio_ttfp.

    On two cores: about 8 minutes.

    Example: python tools/bench.py first-packet --json-out out/first.json --picture out/first.png

    Args:
      json_out: write the figures here as well.
      picture: draw the budgets here as stacked bars (.png, .svg or .pdf).
      seconds: of the replies, shortest first; each is compared with the first.
      repeats: rounds.
      sound: what the request has before its question.
    """
    check_seconds(seconds)
    check_at_least_one(repeats=repeats)
    check_sound(sound)
    check_picture(picture)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, with_published_token2wav(make_middle_config()))
        results = run_all(folder, sound.resolve(), seconds, repeats)
    write_json(json_out, results)
    print_results(results)
    if picture is not None:
        draw_first_packets(results, picture)


def run_all(
    folder: Path,
    sound: Path,
    seconds: Sequence[int],
    repeats: int,
    process: type[SideProcess] = SideProcess,
) -> dict[str, Any]:
    """All figures, as they are written.

    Args:
      folder: of the model.
      sound: of the request.
      seconds: of the replies.
      repeats: rounds.
      process: in which our side works.
    """
    requests = [make_request(sound, ReplyLength(length)) for length in seconds]
    rounds: list[list[dict[str, Any]]] = [[] for _ in requests]
    with process(OmniJaxSide, folder) as ours, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("warming up", total=1 + repeats * len(requests))
        warmed = ours.run(Side.warm_up, requests)
        # a first reply takes longer than those after it, and counts for nothing
        ours.run(Side.stream_reply, requests[0], first_packet_only=True)
        progress.update(bar, advance=1, description="replies")
        # in turns, so that a slow minute of the machine hits all lengths alike
        for _ in range(repeats):
            for request, figures in zip(requests, rounds, strict=True):
                reply = ours.run(Side.stream_reply, request, first_packet_only=True)
                figures.append(summarize_reply(reply))
                progress.advance(bar)
    # of each length, the round with the median time and the times of all
    replies = []
    for length, figures in zip(seconds, rounds, strict=True):
        times = [one["audio_ttfp"] for one in figures]
        replies.append({**median_round(figures, "audio_ttfp"), "seconds": length, "rounds": times})
    # over the shortest reply: near 1 if the first packet does not wait for the rest
    first = statistics.median(replies[0]["rounds"])
    for reply in replies:
        reply["ratio"] = statistics.median(reply["rounds"]) / first
    return {"warmup": {"programs": warmed.count, "seconds": warmed.seconds}, "replies": replies}


def print_results(results: dict[str, Any]) -> None:
    """The budgets, the times, and how they grow with the length of the reply."""
    replies = results["replies"]
    warmed = results["warmup"]
    # a column for each reply, in the order of ``names`` below
    columns = []
    for reply in replies:
        rounds = reply["rounds"]
        columns.append(
            [
                *map(format_seconds, reply["budget"].values()),
                format_seconds(reply["audio_ttfp"]),
                f"{min(rounds):.2f} to {max(rounds):.2f} s",
                format_seconds(reply["ttft"]),
                f"{reply['ratio']:.3f}",
                str(reply["compilations"]),
            ]
        )
    growth = f"median over that of {replies[0]['seconds']} s"
    names = [*LINES, REST, "audio_ttfp", "rounds", "ttft", growth, "compilations"]
    table = Table("to the first packet", *(f"{reply['seconds']} s" for reply in replies))
    for row in zip(names, *columns, strict=True):
        table.add_row(*row)
    print_tables(table, f"warm-up: {warmed['programs']} programs in {format_seconds(warmed['seconds'])}")
