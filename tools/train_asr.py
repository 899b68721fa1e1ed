"""Trains a small model from nothing to write down what is said, and tells its word errors on held-out sentences.

    python tools/train_asr.py out/asr

Speech comes from flite (``apt install flite``), or is tones where there is none. A model of 1.4 million parameters
learns sentences of twelve words. Then adapters (LoRA) on top of it learn twelve other words, with sentences of the
first twelve among them so that these are not forgotten. Word errors and the curves of the loss are in OUT.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
import time
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from tools.run_commands import exit_on_sigterm, run

HALVES = {
    "first": "one two three four five six seven eight nine ten eleven twelve".split(),
    "second": "red green blue yellow black white river mountain window garden summer winter".split(),
}
VOICES = ("slt", "rms", "kal16")
RATE = 16_000
TONE_SECONDS = 0.18
# of a step: sixteen rows or so, of one or two blocks of two seconds of sound each
SIZES = (
    *("--data.rows", "4", "--data.streams", "4", "--data.tokens", "512", "--data.audio-blocks", "8"),
    *("--data.canvases", "0", "--remat", "none", "--checkpoint.every", "300"),
)


@dataclass(frozen=True)
class Options:
    """How much is made and trained."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    sentences: int = 4000
    """Of each half of the words; one of forty is held out."""
    steps: int = 900
    """Of the training from nothing."""
    adapter_steps: int = 400
    """Of the training of adapters."""


def say(words: Sequence[str], voice: str, path: Path) -> None:
    """Writes a sentence as a WAV file of 16 kHz."""
    if shutil.which("flite") is None:
        write_tones(words, path)
        return
    subprocess.run(["flite", "-voice", voice, "-t", " ".join(words), "-o", str(path)], check=True)


def write_tones(words: Sequence[str], path: Path) -> None:
    """A pair of tones in turn for each word, in place of speech."""
    known = [word for half in HALVES.values() for word in half]
    pieces = []
    for word in words:
        number = known.index(word)
        for hertz in (300 + 120 * (number % 5), 1200 + 300 * (number // 5)):
            times = np.arange(int(TONE_SECONDS * RATE)) / RATE
            pieces.append(0.3 * np.sin(2 * math.pi * hertz * times))
        pieces.append(np.zeros(int(0.05 * RATE)))
    samples = (32767 * np.concatenate(pieces)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(samples.tobytes())


def make_sounds(half: str, count: int, folder: Path) -> Path:
    """Sentences of three to five words of a half, each once, as files; returns the table of them."""
    table = folder / f"{half}.csv"
    # it is there already when the command is run again
    if table.exists():
        return table
    (folder / half).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(half))
    sentences: dict[tuple[str, ...], str] = {}
    while len(sentences) < count:
        words = tuple(rng.choice(HALVES[half], int(rng.integers(3, 6))).tolist())
        sentences.setdefault(words, VOICES[len(sentences) % len(VOICES)])
    paths = [folder / half / f"{number:05d}.wav" for number in range(count)]
    with ThreadPoolExecutor(2) as pool:
        jobs = pool.map(say, sentences, sentences.values(), paths)
        for _ in track(jobs, total=count, description=f"speaking the {half} half", console=Console(stderr=True)):
            pass
    lines = [[str(path.relative_to(folder)), " ".join(words)] for path, words in zip(paths, sentences, strict=True)]
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "text"], *lines])
    return table


def make_rows(half: str, count: int, out: Path) -> tuple[Path, Path]:
    """Files of rows of a half: to train on, and held out."""
    table = make_sounds(half, count, out / "sounds")
    paths = out / f"{half}_train.jsonl", out / f"{half}_valid.jsonl"
    run("tools/make_rows.py", table, paths[0], "--valid", paths[1], "--every", 40)
    return paths


def measure(model: Path, rows: Sequence[Path], *options: object) -> dict[str, float]:
    """Word errors of each file of rows."""
    text = run("tools/word_errors.py", model, *rows, *options)
    return {name: float(value) / 100 for name, value in re.findall(r"^(.+): ([\d.]+)% word errors", text, re.MULTILINE)}


def main() -> None:
    exit_on_sigterm()
    options = tyro.cli(Options, description=__doc__)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if shutil.which("flite") is None:
        print("there is no flite (apt install flite): words are tones")
    started = time.monotonic()
    files = {half: make_rows(half, options.sentences, out) for half in HALVES}
    valid = [held_out for _, held_out in files.values()]
    train, held_out = files["first"]
    run(
        *("train.py", "thinker-sft-tiny", "--workdir", out / "first", "--init", "random", "--model", "mini"),
        *("--phases.0.train.0.paths", "thinker/(audio_encoder/(?!bos_eos)|decoder/).*"),
        *("--data.train", train, "--data.valid", held_out, "--steps", options.steps, *SIZES),
        *("--optimizer.learning-rate", "2e-3", "--optimizer.warmup", "50", "--eval.every", "150"),
    )
    minutes = (time.monotonic() - started) / 60
    before = measure(out / "first", valid)

    train, held_out = files["second"]
    run(
        *("train.py", "thinker-lora-tiny", "--workdir", out / "second", "--init", out / "first"),
        *("--lora.targets", "thinker/(decoder|audio_encoder)/layers/.*", "--lora.rank", "32", "--lora.alpha", "64"),
        # of the words that it knows a half, so that they are not forgotten
        *("--data.train", files["first"][0], train, "--data.weights", "1", "1"),
        *("--data.valid", *valid, "--steps", options.adapter_steps, *SIZES),
        *("--optimizer.learning-rate", "2e-3", "--optimizer.warmup", "20", "--eval.every", "100"),
    )
    after = measure(out / "first", valid, "--adapter", out / "second")
    report = {"minutes": minutes, "word_errors": before, "word_errors_with_adapter": after}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\nfrom nothing in {minutes:.1f} minutes; the curves are in {out}/first/loss.png and {out}/second/loss.png")
    for half, rows in zip(HALVES, valid, strict=True):
        print(f"word errors on the {half} half: {before[str(rows)]:.1%}, with adapters {after[str(rows)]:.1%}")


if __name__ == "__main__":
    main()
