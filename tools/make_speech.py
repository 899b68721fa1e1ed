"""Makes speech to train on: sentences of a small grammar in the voices of synthesizers, as sounds and rows.

    python tools/make_speech.py out/speech --sentences 600

Voices are flite's slt, rms and awb (``apt install flite``) and hibari's heart (``pip install omni_jax[speech-data]``),
at several rates. Every sentence is spoken once; those of ``valid.jsonl`` and ``test.jsonl`` are in no other file. The
grammar has about 200 words, so that every word of a held-out sentence is in others too. ``--phrases`` writes short
phrases and lists of words, in which the text alone tells what comes next, to ``phrases.jsonl``. A row is
``{"audio": ..., "text": ..., "voice": ..., "ref_audio": ...}``; ``ref_audio`` is another sound of the voice. The same
seed gives the same files, and a command that was stopped goes on.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import wave
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.errors import InputError
from omni_jax.plain_files import replace_file
from tools.command_errors import exit_on_error

FLITE_VOICES = ("slt", "rms", "awb")
HIBARI_VOICE = "heart"
VOICES = (*FLITE_VOICES, HIBARI_VOICE)
RATES = (0.9, 1.0, 1.1)  # of speech, relative to the voice's own

NAMES = "Alice Ben Clara David Emma Frank Grace Henry Julia Kevin Laura Martin Nina Oscar Paula Robert".split()
ADJECTIVES = """big small red green blue yellow white black old new heavy light warm cold clean dirty quiet loud soft
    strong broken empty round square little""".split()
THINGS = """box bottle chair table lamp book letter clock basket blanket bucket candle hammer ladder mirror pencil
    picture plate spoon umbrella window camera guitar kettle""".split()
ANIMALS = "dog cat horse bird rabbit sheep donkey duck lion tiger monkey".split()
PLACES = """garden kitchen river mountain station market village forest bridge library school hospital office harbor
    island castle valley street""".split()
TIMES = """today yesterday tomorrow morning evening afternoon Monday Tuesday Wednesday Thursday Friday Saturday
    Sunday""".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve twenty thirty".split()
SIDES = "near behind beside under above".split()
PAST = "found painted carried opened cleaned dropped wanted bought repaired borrowed".split()
MOTIONS = "walked ran jumped waited slept".split()
ACTIONS = "carry bring open clean paint repair".split()
WORDS = (*NAMES, *ADJECTIVES, *THINGS, *ANIMALS, *PLACES, *TIMES, *NUMBERS, *SIDES, *PAST, *MOTIONS, *ACTIONS)


@dataclass(frozen=True)
class Options:
    """How much is made."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    sentences: int = 600
    """To train on, in each voice."""
    phrases: int = 0
    """In each voice, in a file of their own."""
    held_out: int = 24
    """In each voice, of valid.jsonl and of test.jsonl each."""
    voices: tuple[str, ...] = VOICES
    """Of slt, rms, awb and heart."""
    seed: int = 0


class Grammar:
    """Draws sentences, and phrases."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._templates: Sequence[Callable[[], str]] = (
            lambda: f"The {self._thing()} is {self._side()} the {self._place()}.",
            lambda: f"{self._name()} {self._draw(PAST)} the {self._thing()} {self._day()}.",
            lambda: f"The {self._animal()} {self._draw(MOTIONS)} {self._side()} the {self._place()}.",
            lambda: f"Did {self._name()} see the {self._thing()} in the {self._place()}?",
            lambda: f"Please {self._draw(ACTIONS)} the {self._thing()}, and then call {self._name()}.",
            lambda: f"There are {self._draw(NUMBERS)} {self._plural()} in the {self._place()}.",
            lambda: f"{self._name()} has {self._draw(NUMBERS)} {self._plural()}, but {self._name()} has none.",
            lambda: f"Where is the {self._animal()}? It is {self._side()} the {self._thing()}.",
        )

    def sentence(self) -> str:
        return self._templates[int(self._rng.integers(len(self._templates)))]()

    def phrase(self) -> str:
        """One thing, or two to four words in any order."""
        count = int(self._rng.integers(1, 5))
        words = [f"the {self._thing()}"] if count == 1 else [self._draw(WORDS) for _ in range(count)]
        phrase = ", ".join(words)
        return f"{phrase[0].upper()}{phrase[1:]}."

    def _draw(self, words: Sequence[str]) -> str:
        return words[int(self._rng.integers(len(words)))]

    def _name(self) -> str:
        return self._draw(NAMES)

    def _place(self) -> str:
        return self._draw(PLACES)

    def _side(self) -> str:
        return self._draw(SIDES)

    def _thing(self) -> str:
        return f"{self._draw(ADJECTIVES)} {self._draw(THINGS)}"

    def _animal(self) -> str:
        return f"{self._draw(ADJECTIVES)} {self._draw(ANIMALS)}"

    def _plural(self) -> str:
        word = self._draw(THINGS)
        return word + ("es" if word.endswith("x") else "s")

    def _day(self) -> str:
        word = self._draw(TIMES)
        if word.endswith("day") and word[0].isupper():
            return f"on {word}"
        return word if word in ("today", "yesterday", "tomorrow") else f"in the {word}"


@dataclass(frozen=True)
class Utterance:
    """A sentence that is to be spoken."""

    path: Path  # of the sound, relative to the folder
    text: str
    voice: str
    rate: float


def plan_utterances(options: Options) -> dict[str, list[Utterance]]:
    """The utterances of each file of rows, by its name; no sentence is in two of them, nor twice in one."""
    rng = np.random.default_rng(options.seed)
    grammar = Grammar(rng)
    used: set[str] = set()
    planned: dict[str, list[Utterance]] = {"test": [], "valid": [], "train": [], "phrases": []}
    plans = (
        ("test", options.held_out, grammar.sentence),
        ("valid", options.held_out, grammar.sentence),
        ("train", options.sentences, grammar.sentence),
        ("phrases", options.phrases, grammar.phrase),
    )
    for part, count, draw in plans:
        for number in range(count):
            for voice in options.voices:
                text = draw()
                while text in used:
                    text = draw()
                used.add(text)
                path = Path("sounds", part, f"{voice}-{number:05d}.wav")
                planned[part].append(Utterance(path, text, voice, RATES[int(rng.integers(len(RATES)))]))
    return {part: utterances for part, utterances in planned.items() if utterances}


class Speaker:
    """Speaks utterances as WAV files."""

    def __init__(self, voices: Sequence[str]) -> None:
        """Loads what the voices need.

        Raises:
          InputError: if a voice is not known, or its synthesizer is not installed.
        """
        unknown = set(voices) - set(VOICES)
        if unknown or not voices:
            raise InputError(f"voices: {', '.join(sorted(unknown)) or 'none'}; there are {', '.join(VOICES)}")
        if set(voices) & set(FLITE_VOICES) and shutil.which("flite") is None:
            raise InputError("flite is not installed: apt install flite, or leave out --voices slt rms awb")
        self._hibari: Any = None
        if HIBARI_VOICE in voices:
            try:
                from hibari import Hibari  # pyright: ignore[reportMissingImports], an extra
            except ImportError as e:
                raise InputError(f"hibari is not installed ({e}): pip install omni_jax[speech-data]") from e
            self._hibari = Hibari(threads=1)

    def write(self, utterance: Utterance, path: Path) -> None:
        """Speaks into a file, which has its name when it is complete."""
        partial = path.with_name(f".{path.name}.{utterance.voice}")
        if utterance.voice == HIBARI_VOICE:
            samples = self._hibari(utterance.text, speed=utterance.rate, seed=0)
            _write_wave(partial, np.asarray(samples), 24_000)
        else:
            stretch = f"duration_stretch={1 / utterance.rate:.4f}"
            command = ["flite", "-voice", utterance.voice, "--setf", stretch, "-t", utterance.text, "-o", str(partial)]
            subprocess.run(command, check=True)
        partial.rename(path)


def _write_wave(path: Path, samples: np.ndarray, rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((32767 * np.clip(samples, -1, 1)).astype("<i2").tobytes())


def make_rows(utterances: Sequence[Utterance]) -> list[dict[str, str]]:
    """A row of each; the clip of its voice is the utterance before it in that voice, or the last."""
    by_voice: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        by_voice.setdefault(utterance.voice, []).append(utterance)
    previous = {voice: own[-1] for voice, own in by_voice.items()}
    rows = []
    for utterance in utterances:
        row = {
            "audio": str(utterance.path),
            "text": utterance.text,
            "voice": utterance.voice,
            "ref_audio": str(previous[utterance.voice].path),
        }
        rows.append(row)
        previous[utterance.voice] = utterance
    return rows


def make_speech(options: Options) -> None:
    """Writes all sounds, and then the files of rows.

    Raises:
      InputError: if a synthesizer is missing.
    """
    planned = plan_utterances(options)
    missing = []
    for part, utterances in planned.items():
        (options.out / "sounds" / part).mkdir(parents=True, exist_ok=True)
        missing += [utterance for utterance in utterances if not (options.out / utterance.path).exists()]
    if missing:
        speaker = Speaker(options.voices)
        with ThreadPoolExecutor(2) as pool:
            jobs = pool.map(lambda utterance: speaker.write(utterance, options.out / utterance.path), missing)
            for _ in track(jobs, total=len(missing), description="speaking", console=Console(stderr=True)):
                pass
    for part, utterances in planned.items():
        lines = [json.dumps(row) + "\n" for row in make_rows(utterances)]
        replace_file(options.out / f"{part}.jsonl", "".join(lines).encode())
        print(f"{options.out / part}.jsonl: {len(lines)} rows")


def main(options: Options) -> None:
    with exit_on_error():
        make_speech(options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
