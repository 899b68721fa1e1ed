"""Teaches a small model to speak, from nothing, by the stages of this repository, and measures what comes out.

    python tools/speech_demo.py out/speech        (make speech-demo)

The Thinker first learns to repeat a text. Speech comes from flite's voices slt, rms and awb and hibari's heart
(``tools/make_speech.py``). The speech tokenizer learns codes of it, and Token2Wav's DiT and vocoder learn to make sound
of them. The Talker learns to say a text in codes: first in flite's voices, then by preferences, then with the fourth
voice as a new speaker. The DiT is distilled before the pairs are made, since their sound is then made in a tenth of the
time. Run again, it goes on where it was stopped. Figures are in OUT/report.json, curves in OUT/curves.png, sounds and
spectrograms in OUT/measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.evaluation.speaker_probe import SpeakerProbe
from omni_jax.mini_config import NUM_CODES, mini_config
from omni_jax.plain_files import replace_file
from omni_jax.processing.read_aloud import make_dialogue
from omni_jax.processing.tokenizer_files import write_tokenizer
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from tools.make_speech import VOICES
from tools.measure_speech import describe
from tools.row_files import read_values, write_values
from tools.run_commands import Stages, exit_on_sigterm, run
from tools.run_recipe import run_recipe
from tools.speech_stages import TRAINED, SpeechData, SpeechStages, keep_flite

UNSEEN_VOICE = "kal16"  # of flite; nothing is trained on it
UNSEEN_TEXT = "The small dog waited beside the river, and then it walked to the village."
CURVES = ("thinker", *TRAINED)  # folders of the stages that train, as they are drawn
NUM_PIECES = 1280  # of the vocabulary: every word of the grammar is a token
TEMPERATURE = 0.8  # of the Talker, in what is measured
NUM_PROBED = 1200  # rows that the speaker is guessed after


@dataclass(frozen=True)
class Options:
    """How much is made and trained."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    sentences: int = 800
    """To train on, in each voice."""
    phrases: int = 400
    """In each voice, short ones and lists of words, that the Thinker and the Talker train on too."""
    held_out: int = 24
    """In each voice, to validate on and to measure with each."""
    measured: int = 12
    """Of these, how many in each voice are measured; a third of them after the Talker's first two stages."""
    preferences: int = 32
    """Texts that pairs of answers are made of."""
    steps_scale: float = 1.0
    """Factor of the steps of every recipe; below 1 for a trial."""


class Demo:
    """The stages, each a method; each reads what those before have left in the folder."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.out = options.out.resolve()
        self.files = self.out / "files"  # config and tokenizer
        self.data = self.out / "data"
        # what the Thinker and the Talker read; codes and sounds are learned from sentences alone, as those are measured
        self.texts = {"train": ["train", "phrases"] if options.phrases else ["train"], "valid": ["valid"]}
        self.speech = SpeechStages(
            self.out,
            SpeechData(self.data, {"train": "train", "valid": "valid"}, self.texts),
            files=self.files,
            thinker=self.out / "thinker",
            steps_scale=options.steps_scale,
            preferences=options.preferences,
        )

    def make_data(self) -> None:
        options = self.options
        run(
            *("tools/make_speech.py", self.data, "--sentences", options.sentences, "--phrases", options.phrases),
            *("--held-out", options.held_out),
        )
        clip = self.data / "unseen.wav"
        if not clip.exists():
            subprocess.run(["flite", "-voice", UNSEEN_VOICE, "-t", UNSEEN_TEXT, "-o", str(clip)], check=True)

    def train_thinker(self) -> None:
        """A Thinker that repeats what it is to read aloud, so that its hidden states say what comes."""
        rows = []
        for name, parts in self.texts.items():
            dialogues = []
            for part in parts:
                for values in read_values(self.data / f"{part}.jsonl"):
                    dialogues.append({"messages": make_dialogue(values["text"])})
            rows.append(write_values(self.data / f"{name}_texts.jsonl", dialogues))
        train, valid = rows
        self._make_files(train)
        run_recipe(
            *("thinker-sft-mini", self.out / "thinker", "random", [train], [valid]),
            *("--model", self.files),
            steps_scale=self.options.steps_scale,
        )

    def _make_files(self, dialogues: Path) -> None:
        """What the model begins from: its sizes, and a vocabulary of what the dialogues say, prompts included."""
        texts = []
        for values in read_values(dialogues):
            for message in values["messages"]:
                texts += [message["role"], message["content"]]
        config = mini_config(NUM_PIECES)
        write_tokenizer(self.files, config, texts)
        config.save(self.files)

    def make_codes(self) -> None:
        self.speech.make_codes()
        # of voices with other pitch and formants, for the probe
        rows = read_values(self.data / "train.jsonl")[:NUM_PROBED]
        write_values(self.data / "probed.jsonl", rows)
        for part in ("probed", "test"):
            self.speech.make_codes_of(part, f"{part}_perturbed", "--perturb")

    def measure(self) -> None:
        """Copies by the teacher's published solve and by the student's; speech after each stage of the Talker."""
        flite = keep_flite([self.data / "test_codes.jsonl"], self.data / "test_flite.jsonl")
        # all that is spoken after stage 3, in an unseen voice too
        clip = ("--clip", self.data / "unseen.wav", "--clip-text", UNSEEN_TEXT)
        kinds = ("--kinds", "source", "copy", "spoken", "cloned")
        self._measure(self.out / "talker3", "measured", self.data / "test_codes.jsonl", *kinds, *clip)
        self._measure(self.speech.with_voices, "measured_teacher", self.data / "test_codes.jsonl", "--kinds", "copy")
        few = max(self.options.measured // 3, 1)
        for stage in ("talker1", "talker2"):
            self._measure(self.out / stage, f"measured_{stage}", flite, "--kinds", "spoken", sentences=few)

    def _measure(self, model: Path, folder: str, rows: Path, *more: object, sentences: int = 0) -> None:
        voice_rows = self.data / "valid.jsonl"
        sentences = sentences or self.options.measured
        self.speech.measure(model, folder, rows, voice_rows, sentences, "--temperature", TEMPERATURE, *more)

    def probe(self) -> dict[str, float]:
        """How often the speaker is guessed from codes: of the sounds, and of perturbed ones."""
        found = {}
        for name, train in (("codes", "train_codes.jsonl"), ("perturbed", "probed_perturbed.jsonl")):
            codes, speakers = self._codes_of(train)
            probe = SpeakerProbe(codes[:NUM_PROBED], speakers[:NUM_PROBED], NUM_CODES)
            found[name] = probe.accuracy(*self._codes_of(f"test_{name}.jsonl"))
        return found

    def _codes_of(self, name: str) -> tuple[list[np.ndarray], list[str]]:
        codes = []
        speakers = []
        for values in read_values(self.data / name):
            codes.append(np.array(values["codec_ids"]))
            speakers.append(values["voice"])
        return codes, speakers

    def codebook_use(self) -> float:
        """Share of the codes that the rows to train on have."""
        codes, _ = self._codes_of("train_codes.jsonl")
        return len(np.unique(np.concatenate(codes))) / NUM_CODES

    def draw_curves(self) -> None:
        """The loss of every stage, of training and of held-out rows."""
        figure = Figure(figsize=(14, 6), layout="constrained")
        for axes, name in zip(figure.subplots(2, 4).flat, CURVES, strict=False):
            for file, style in ((METRICS_FILE, dict(linewidth=0.7)), (EVALUATIONS_FILE, dict(marker="o"))):
                metrics = read_metrics(self.out / name / file)
                axes.plot([values["step"] for values in metrics], [values["loss"] for values in metrics], **style)
            axes.set_title(name)
            axes.set_yscale("log" if name in ("dit", "vocoder") else "linear")
            axes.grid(alpha=0.3)
        figure.savefig(self.out / "curves.png", dpi=70)

    def report(self, stages: Stages) -> None:
        """Writes all figures into one file, and prints them."""
        self.draw_curves()
        values: dict[str, Any] = {"minutes": {name: seconds / 60 for name, seconds in stages.seconds.items()}}
        values["codebook_use"] = self.codebook_use()
        values["speaker_probe"] = self.probe()
        for name in ("measured", "measured_teacher", "measured_talker1", "measured_talker2"):
            values[name] = json.loads((self.out / name / "report.json").read_text(encoding="utf-8"))
        replace_file(self.out / "report.json", (json.dumps(values, indent=2) + "\n").encode())
        print("\nminutes of each stage")
        for name, minutes in values["minutes"].items():
            print(f"  {name}: {minutes:.1f}")
        print(f"  all: {sum(values['minutes'].values()):.1f}")
        print(f"codebook: {values['codebook_use']:.1%} of the codes are used")
        for name, accuracy in values["speaker_probe"].items():
            print(f"speaker guessed from codes, {name}: {accuracy:.1%} of {self.options.held_out * len(VOICES)}")
        for name in ("measured_teacher", "measured", "measured_talker1", "measured_talker2"):
            for kind in ("source", "copy", "spoken", "cloned"):
                if kind in values[name]:
                    print(f"{name.removeprefix('measured_')}, {describe(kind, values[name][kind])}")
        print(f"figures: {self.out}/report.json; sounds and pictures: {self.out}/measured")


def main() -> None:
    exit_on_sigterm()
    demo = Demo(tyro.cli(Options, description=__doc__))
    demo.out.mkdir(parents=True, exist_ok=True)
    stages = Stages(demo.out / "stages.json")
    stages.run("data", demo.make_data)
    stages.run("Thinker", demo.train_thinker)
    stages.run("speech tokenizer", demo.speech.train_tokenizer)
    stages.run("codes", demo.make_codes)
    stages.run("DiT", demo.speech.train_dit)
    stages.run("vocoder", demo.speech.train_vocoder)
    stages.run("voices", demo.speech.add_voices)
    stages.run("distilled DiT", demo.speech.distill)
    stages.run("Talker 1", demo.speech.train_talker)
    stages.run("Talker 2", demo.speech.prefer)
    stages.run("Talker 3", demo.speech.add_speaker)
    stages.run("measuring", demo.measure)
    demo.report(stages)


if __name__ == "__main__":
    main()
