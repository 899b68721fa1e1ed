"""``bench.py latency``: when a spoken request's first text and first sound come, and what they had to wait for."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import latency_ours, latency_theirs
from benchmarks.bench_sizes import middle_config
from benchmarks.bench_timing import Side, duration, write
from benchmarks.latency_figures import AUDIBLE, CODES_A_SECOND, LINES, REST, TOKENS_A_SECOND, Length, middle
from benchmarks.latency_ours import VOICE, Request
from omni_jax.config import OmniConfig

SOUND = Path(__file__).resolve().parents[1] / "tests" / "media" / "speech.wav"
PICTURES = (".png", ".svg", ".pdf")


def latency(
    json_out: Path | None = None,
    picture: Path | None = None,
    seconds: tuple[int, ...] = (2, 10, 30),
    reference_seconds: tuple[int, ...] = (2, 10, 30),
    repeats: int = 3,
    sound: Path = SOUND,
) -> None:
    """The time to the first packet, line by line, at the middle size with random weights in float32.

    One request, three seconds of speech and a question in writing, is answered aloud at several lengths: 50 codes and
    4 tokens of text a second. The ends are made impossible, so that a reply is as long as it is asked to be; codes are
    drawn in the published way.

    Cold is the first request of a process that has just loaded the model: all is compiled on the way. Warm is one
    after model.warmup(): of several rounds the one with the median time to the first packet. Predicted is how much each
    part has to do until then, from what the parts declare, times what a unit of its work takes in another reply.
    PyTorch answers the same request from the same weights; it has no sound before its reply is whole, and its time
    leaves out the reading of the input.

    Each call of a part is waited for while it is timed. audio_rtf is the time from the request to the last packet for a
    second of speech; underruns and gaps are those of a player that starts with the first packet, at normal speed.

    On two cores: about 25 minutes, half of it PyTorch's and the cold runs'.

    Example: python tools/bench.py latency --json-out out/latency.json --picture out/latency.png

    Example, in a few minutes: python tools/bench.py latency --seconds 2 4 --reference-seconds 2 --repeats 1

    Args:
      json_out: write the figures here as well.
      picture: draw the budgets here as stacked bars (.png, .svg or .pdf); tools/latency_picture.py draws them later.
      seconds: of the replies.
      reference_seconds: those of them that PyTorch speaks too, once each after a short one.
      repeats: rounds of the warm replies.
      sound: what is heard in the request.
    """
    _check(seconds, reference_seconds, repeats, sound, picture)
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # of the processes to come: cold is to be cold
    lengths = [Length(s) for s in sorted(seconds)]
    theirs = [length for length in lengths if length.seconds in reference_seconds]
    with tempfile.TemporaryDirectory() as folder:
        request = Request(Path(folder) / "converted", sound.resolve())
        results = report(middle_config(), request, lengths, theirs, repeats, json_out=json_out)
    show(results)
    if picture is not None:
        from benchmarks.latency_picture import draw

        draw(results, picture)


def _check(seconds: Sequence[int], reference: Sequence[int], repeats: int, sound: Path, picture: Path | None) -> None:
    dit = OmniConfig.qwen2_5_omni_7b().token2wav_config.dit_config
    longest = dit.max_position_embeddings // dit.repeats // CODES_A_SECOND
    if not seconds or not all(1 <= s <= longest for s in seconds) or len(set(seconds)) < len(seconds):
        sys.exit(f"--seconds {' '.join(map(str, seconds))}: give different lengths of 1 to {longest}")
    if set(reference) - set(seconds):
        sys.exit(f"--reference-seconds {' '.join(map(str, reference))}: each must be one of --seconds")
    if repeats < 1:
        sys.exit(f"--repeats {repeats}: it must be at least 1")
    if not sound.is_file():
        sys.exit(f"--sound {sound}: there is no such file")
    check_picture(picture)


def check_picture(picture: Path | None) -> None:
    """Exits, saying why, if no picture could be drawn there."""
    if picture is not None and picture.suffix not in PICTURES:
        sys.exit(f"--picture {picture}: its name must end in {', '.join(PICTURES)}")
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--picture needs matplotlib: pip install -e '.[plots]'")


def report(
    config: OmniConfig,
    request: Request,
    lengths: Sequence[Length],
    theirs: Sequence[Length],
    repeats: int,
    *,
    side: Callable[[], Side] = Side,
    json_out: Path | None = None,
) -> dict[str, Any]:
    """All figures.

    Args:
      config: of the model, which is made in ``request.folder`` and beside it.
      request: what is asked.
      lengths: of the replies, shortest first.
      theirs: those of them that PyTorch speaks too.
      repeats: rounds of the warm replies.
      side: makes a process of its own for each part of the work.
      json_out: where the figures are written, each part as it is done.
    """
    published = request.folder.with_name("published")
    replies: list[dict[str, Any]] = [dict(seconds=n.seconds, tokens=n.tokens, codes=n.codes) for n in lengths]
    results: dict[str, Any] = dict(tokens_a_second=TOKENS_A_SECOND, audible=AUDIBLE, sound=request.sound.name)
    results["replies"] = replies
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("writing a model", total=2 + len(lengths) * (1 + repeats) + bool(theirs) + len(theirs))

        def step(done: str) -> None:
            """One more is done; what comes now."""
            write(json_out, results)
            progress.update(bar, advance=1, description=done)

        _apart(side, lambda work: work(latency_ours.make_model, published, request.folder, config))
        step("cold replies")
        for length, reply in zip(lengths, replies, strict=True):
            reply["cold"] = _apart(side, lambda work, n=length: work(latency_ours.cold, request, n))
            step("cold replies")
        prompt = _apart(side, lambda work: _warm(work, request, lengths, repeats, results, step))
        if theirs:
            _apart(side, lambda work: _reference(work, published, prompt, theirs, results, step))
    return results


def _apart(side: Callable[[], Side], do: Callable[[Side], Any]) -> Any:
    """Does something with a process of its own, which ends then."""
    work = side()
    try:
        return do(work)
    finally:
        work.close()


def _warm(
    work: Side,
    request: Request,
    lengths: Sequence[Length],
    repeats: int,
    results: dict[str, Any],
    step: Callable[[str], None],
) -> dict[str, Any]:
    """Adds predictions and warm replies to the results; gives the prompt as PyTorch takes it."""
    known = work(latency_ours.warm_up, request, tuple(lengths))
    for reply in results["replies"]:
        for key in ("predicted", "predicted_work"):
            reply[key] = known[key][reply["seconds"]]
    results |= {key: value for key, value in known.items() if key not in ("predicted", "predicted_work")}
    step("warm replies")
    rounds: list[list[dict[str, Any]]] = [[] for _ in lengths]
    for _ in range(repeats):
        for length, made in zip(lengths, rounds, strict=True):
            made.append(work(latency_ours.warm, request, length))
            step("warm replies")
    for reply, made in zip(results["replies"], rounds, strict=True):
        reply["warm"] = middle(made, "audio_ttfp")
        reply["warm_audio_ttfp"] = [one["audio_ttfp"] for one in made]
    results["ratio"] = results["replies"][-1]["warm"]["audio_ttfp"] / results["replies"][0]["warm"]["audio_ttfp"]
    return work(latency_ours.reference_prompt, request)


def _reference(
    work: Side,
    folder: Path,
    prompt: dict[str, Any],
    lengths: Sequence[Length],
    results: dict[str, Any],
    step: Callable[[str], None],
) -> None:
    """Adds PyTorch's replies."""
    results["pytorch_load_seconds"] = work(latency_theirs.load, str(folder), prompt, VOICE)
    step("PyTorch")
    for reply in results["replies"]:
        if reply["seconds"] in [length.seconds for length in lengths]:
            reply["pytorch"] = work(latency_theirs.answer, str(folder), prompt, VOICE, Length(reply["seconds"]))
            step("PyTorch")


def show(results: dict[str, Any]) -> None:
    """Prints what ``report`` gave."""
    console, replies = Console(width=160), results["replies"]
    console.print(_budgets(replies))
    console.print(_requests(replies))
    shortest, longest = replies[0]["seconds"], replies[-1]["seconds"]
    text = f"audio_ttfp of the {longest} s reply over that of the {shortest} s one, both warm: {results['ratio']:.3f}"
    warmed, packet = results["warmup"], results["first_packet"]
    console.print(text)
    console.print(f"warm-up: {warmed['programs']} programs in {duration(warmed['seconds'])}")
    chunks = " + ".join(map(str, packet["chunks"]))
    console.print(f"the first packet: {duration(packet['seconds'])} of sound, from {chunks} codes")


def _budgets(replies: Sequence[dict[str, Any]]) -> Table:
    budgets = [each for r in replies for each in (r["cold"]["budget"], r["warm"]["budget"], r["predicted"])]
    heads = [f"{r['seconds']} s, {kind}" for r in replies for kind in ("cold", "warm", "predicted")]
    table = Table("to the first packet", *heads)
    for line in (*LINES, REST):
        table.add_row(line, *(_or_none(budget.get(line)) for budget in budgets))
    table.add_section()
    table.add_row("together", *(duration(sum(budget.values())) for budget in budgets))
    return table


def _requests(replies: Sequence[dict[str, Any]]) -> Table:
    heads = ("ttft", "audio_ttfp", "first audible", "whole", "audio_rtf", "underruns", "largest gap", "compilations")
    table = Table("reply", "", *heads, title=f"first audible: the first sample of at least {AUDIBLE:g} of full scale")
    for r in replies:
        for kind in ("cold", "warm", "pytorch"):
            if kind in r:
                one = r[kind]
                times = [_or_none(one.get(key)) for key in ("ttft", "audio_ttfp", "first_audible", "wall")]
                compiled = f"{one['compilations']}" if "compilations" in one else "-"
                if one.get("compilations"):
                    compiled += f" in {duration(one['compile_seconds'])}"
                played = f"{one.get('underruns', '-')}", _or_none(one.get("largest_gap"))
                table.add_row(f"{r['seconds']} s", kind, *times, f"{one['audio_rtf']:.2f}", *played, compiled)
    return table


def _or_none(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)
