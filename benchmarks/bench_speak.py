"""``bench.py speak``: Token2Wav, the Talker, and spoken replies one by one and together."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from benchmarks import speaking_ours, speaking_theirs
from benchmarks.bench_sizes import middle_config
from benchmarks.bench_timing import Case, Side, duration, measure, show, write
from benchmarks.speaking_ours import STAGES, Dialogue, products
from omni_jax.config import OmniConfig

Part = Literal["token2wav", "talker", "replies"]

CODES_A_SECOND = 50
CLIP_FRAMES = 300  # of the voice
TALKER_PROMPT, TALKER_STEPS = 250, 64
REPLIES = tuple(Dialogue(i, prompt=120, words=16, codes=(40, 60)[i % 2]) for i in range(8))


def speak(
    json_out: Path | None = None,
    seconds: tuple[int, ...] = (2, 10, 30),
    reference_seconds: tuple[int, ...] = (2, 10),
    batches: tuple[int, ...] = (1, 4, 8),
    parts: tuple[Part, ...] = ("token2wav", "talker", "replies"),
    repeats: int = 5,
) -> None:
    """Token2Wav at published size, the Talker at 6 layers of 512, and eight replies at the middle size.

    Token2Wav's figures are seconds for one second of speech (of all rows together); below 1 it keeps up with the
    voice. Each side has a process of its own, and "memory" is the most that process held in a case, with libraries,
    weights and what was compiled. The time of compiling is left out.

    On two cores Token2Wav takes some 15 seconds a second of speech, PyTorch's 20 to 30: all of it, about 25 minutes.

    Example, in 9 minutes: python tools/bench.py speak --seconds 2 10 --batches 1 --json-out out/speak.json

    Example, in 3 minutes: python tools/bench.py speak --parts talker replies

    Example, ours alone: python tools/bench.py speak --parts token2wav --seconds 30 --reference-seconds --batches 1

    Args:
      json_out: write the figures here as well.
      seconds: of speech that Token2Wav makes in one go.
      reference_seconds: those of them that PyTorch makes too; a run each, after a warm-up of one code.
      batches: requests at once: of the Talker, and of Token2Wav with each as long as the shortest of ``seconds``.
      parts: what to time.
      repeats: counted rounds of the Talker, after one that is not; the longer cases run once.
    """
    _check(seconds, reference_seconds, batches, repeats)
    ours, theirs = Side(), Side()
    results: dict[str, Any] = {}
    try:
        for part in parts:
            if part == "token2wav":
                cases = token2wav_cases(ours, theirs, OmniConfig.qwen2_5_omni_7b(), seconds, reference_seconds, batches)
                results[part] = _run(cases, ours, theirs, 1, warm_up=False)
            elif part == "talker":
                cases = talker_cases(ours, theirs, middle_config(), batches)
                results[part] = _run(cases, ours, theirs, repeats, warm_up=True)
            else:
                results[part] = replies(ours, middle_config())
            write(json_out, results)  # each part as it is done: a long run may be broken off
    finally:
        ours.close()
        theirs.close()


def _check(seconds: Sequence[int], reference: Sequence[int], batches: Sequence[int], repeats: int) -> None:
    c = OmniConfig.qwen2_5_omni_7b().token2wav_config.dit_config
    longest = c.max_position_embeddings // c.repeats // CODES_A_SECOND
    if not seconds or not all(1 <= s <= longest for s in seconds):
        sys.exit(f"--seconds {' '.join(map(str, seconds))}: give lengths of 1 to {longest}")
    if set(reference) - set(seconds):
        sys.exit(f"--reference-seconds {' '.join(map(str, reference))}: each must be one of --seconds")
    if not batches or min(*batches, repeats) < 1:
        sys.exit("--batches and --repeats must be at least 1")


def token2wav_cases(
    ours: Side,
    theirs: Side,
    config: OmniConfig,
    seconds: Sequence[int],
    reference: Sequence[int],
    batches: Sequence[int],
) -> list[Case]:
    """Both networks over the lengths, one request each; then over batches of the shortest. In seconds a second."""
    runs = [(s, 1) for s in sorted(seconds)] + [(min(seconds), rows) for rows in sorted(batches) if rows > 1]
    work, text, cases = products(config), json.dumps(config.to_dict()), []
    for s, rows in runs:
        for name in ("DiT", "vocoder"):
            given = s * CODES_A_SECOND
            here, there = getattr(speaking_ours, name.lower()), getattr(speaking_theirs, name.lower())
            mine = functools.partial(_each, s * rows, ours, here, config, CLIP_FRAMES, given, rows)
            other = functools.partial(_each, s, theirs, there, text, CLIP_FRAMES, given)
            title = f"{name}, {f'{rows} x ' if rows > 1 else ''}{s} s of speech"
            cases.append(
                Case(title, mine, other if rows == 1 and s in reference else None, work[name] / 1e9, "GFLOP/s")
            )
    return cases


def _each(many: int, side: Side, *call: Any) -> float:
    return side(*call) / many


def talker_cases(ours: Side, theirs: Side, config: OmniConfig, batches: Sequence[int]) -> list[Case]:
    """Steps after a prompt, over batches. In seconds a step."""
    text, cases = json.dumps(config.to_dict()), []
    for rows in sorted(batches):
        shape = (rows, TALKER_PROMPT, TALKER_STEPS)
        mine = functools.partial(ours, speaking_ours.talker, config, *shape)
        other = functools.partial(theirs, speaking_theirs.talker, text, *shape)
        cases.append(Case(f"Talker, a step of batch {rows}", mine, other, 1.0, "steps/s"))
    return cases


def _run(cases: Sequence[Case], ours: Side, theirs: Side, repeats: int, *, warm_up: bool) -> list[dict[str, Any]]:
    results = []
    for case in track(cases, "timing", console=Console(stderr=True)):
        result = measure(case, repeats, warm_up=warm_up)
        result["ours_gigabytes"] = ours.memory / 1e9
        if case.theirs is not None:
            result["theirs_gigabytes"] = theirs.memory / 1e9
        results.append(result)
    show(results)
    return results


def replies(side: Side, config: OmniConfig, dialogues: Sequence[Dialogue] = REPLIES) -> list[dict[str, Any]]:
    """Each dialogue answered alone, then all together: the seconds of every stage, the singles' added up."""
    work = functools.partial(side, speaking_ours.replies, config, CLIP_FRAMES)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("replies", total=len(dialogues) + 1)
        singles = []
        for dialogue in dialogues:
            singles.append(work((dialogue,)))
            progress.advance(bar)
        together = work(tuple(dialogues))
        progress.advance(bar)
    results: list[dict[str, Any]] = [
        dict(stage=stage, single_seconds=sum(one[stage] for one in singles), batch_seconds=together[stage])
        for stage in STAGES
    ]
    whole = {key: sum(r[key] for r in results) for key in ("single_seconds", "batch_seconds")}
    results.append(dict(stage="all", **whole))
    _show_replies(results, len(dialogues))
    return results


def _show_replies(results: list[dict[str, Any]], many: int) -> None:
    """Adds ratio and share to each row, and prints them."""
    table = Table(f"{many} spoken replies", "one by one", "together", "together / one by one", "share of together")
    for r in results:
        r["ratio"] = r["batch_seconds"] / r["single_seconds"]
        r["share"] = r["batch_seconds"] / results[-1]["batch_seconds"]
        times = duration(r["single_seconds"]), duration(r["batch_seconds"])
        table.add_row(r["stage"], *times, f"{r['ratio']:.2f}", f"{100 * r['share']:.0f} %")
    Console(width=110).print(table)
