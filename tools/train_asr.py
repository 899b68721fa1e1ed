"""Trains a small model from nothing to write down what is said, and tells its word errors on sentences it has not heard.

    python tools/train_asr.py out/asr

Speech comes from flite (``apt install flite``), or is tones where there is none. A model of 1.3 million parameters
learns sentences of twelve words; then adapters (LoRA) on top of it learn twelve other words, with sentences of the first
twelve among them so that these are not forgotten. Word errors and the curves of the loss are in OUT.
"""

from __future__ import annotations

import csv
import json
import math
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

from omni_jax.config import AudioEncoderConfig, OmniConfig, TextConfig, ThinkerConfig, VisionEncoderConfig
from omni_jax.processing.tokenizer_files import write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
HALVES = {
    "first": "one two three four five six seven eight nine ten eleven twelve".split(),
    "second": "red green blue yellow black white river mountain window garden summer winter".split(),
}
VOICES = ("slt", "rms", "kal16")
RATE = 16_000
TONE_SECONDS = 0.18
WIDTH = 128  # of the model


@dataclass(frozen=True)
class Options:
    """How much is made and trained."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    sentences: int = 1200
    """Of each half of the words; one of ten is held out."""
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


def write_model_files(folder: Path) -> None:
    """config.json of a small model, and the files of a tokenizer of bytes."""
    text = TextConfig.tiny(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=3, head_dim=WIDTH // 4,
        rope_scaling=dataclass_replace_sections(),
    )  # fmt: skip
    audio = AudioEncoderConfig.tiny(
        d_model=WIDTH, encoder_layers=3, encoder_ffn_dim=2 * WIDTH, output_dim=WIDTH, encoder_attention_heads=4
    )
    vision = VisionEncoderConfig.tiny(out_hidden_size=WIDTH)
    config = OmniConfig.tiny(
        thinker_config=ThinkerConfig.tiny(text_config=text, audio_config=audio, vision_config=vision)
    )
    write_tokenizer(folder, config)
    config.save(folder)


def run(*arguments: object) -> str:
    """Runs a tool as on the command line, and returns what it printed."""
    print("$", "python", *arguments, flush=True)
    process = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    text = process.stdout.decode()
    print(text, end="", flush=True)
    return text


if __name__ == "__main__":
    pass
