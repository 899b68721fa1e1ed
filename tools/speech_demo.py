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
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from configs import RECIPES
from omni_jax.checkpoint.voices import load_voices
from omni_jax.evaluation.speaker_probe import SpeakerProbe
from omni_jax.mini_config import NUM_CODES, mini_config
from omni_jax.plain_files import replace_file
from omni_jax.processing.read_aloud import make_dialogue
from omni_jax.processing.tokenizer_files import write_tokenizer
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from tools.make_speech import FLITE_VOICES, HIBARI_VOICE, VOICES
from tools.measure_speech import describe
from tools.row_files import read_values, write_values
from tools.run_commands import Stages, exit_on_sigterm, run

UNSEEN_VOICE = "kal16"  # of flite; nothing is trained on it
UNSEEN_TEXT = "The small dog waited beside the river, and then it walked to the village."
# folders of the stages that train, as they are drawn
CURVES = ("thinker", "tokenizer", "dit", "vocoder", "distilled", "talker1", "talker2", "talker3")
NUM_DISTILLED = 8  # held-out rows whose published solve is compared with the student's
NUM_PIECES = 1280  # of the vocabulary: every word of the grammar is a token
NUM_PROBED = 1200  # rows that the speaker is guessed after
LICENCE = "A synthesizer's voice, whose licence lets anyone use it; nobody's consent is needed."


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
        self.data = self.out / "data"
        # what the Thinker and the Talker read; codes and sounds are learned from sentences alone, as those are measured
        self.texts = {"train": ["train", "phrases"] if options.phrases else ["train"], "valid": ["valid"]}

    def train(
        self,
        recipe: str,
        folder: str,
        init: object,
        rows: Sequence[object],
        *more: object,
        looks: int = 6,
    ) -> None:
        """Trains with a ``-mini`` recipe.

        Args:
          recipe: its name.
          folder: of the run.
          init: what it begins from.
          rows: to train on, and held-out ones.
          more: options.
          looks: how often the held-out rows are evaluated.
        """
        steps = self._scale(RECIPES[recipe].steps)
        run(
            *("train.py", recipe, "--workdir", self.out / folder, "--init", init, "--steps", steps),
            *("--data.train", rows[0], "--data.valid", rows[1], "--eval.every", max(steps // looks, 1), *more),
        )

    def _scale(self, steps: int, least: int = 4) -> int:
        return max(round(steps * self.options.steps_scale), least)

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
        self.train("thinker-sft-mini", "thinker", "random", rows, "--model", self._make_files(rows[0]))

    def _make_files(self, dialogues: Path) -> Path:
        """What the model begins from: its sizes, and a vocabulary of what the dialogues say, prompts included."""
        files = self.out / "files"
        texts = []
        for values in read_values(dialogues):
            for message in values["messages"]:
                texts += [message["role"], message["content"]]
        config = mini_config(NUM_PIECES)
        write_tokenizer(files, config, texts)
        config.save(files)
        return files

    def train_tokenizer(self) -> None:
        rows = [self.data / "train.jsonl", self.data / "valid.jsonl"]
        self.train("speech-tokenizer-mini", "tokenizer", self.out / "thinker", rows)

    def make_codes(self) -> None:
        for part in (*self.texts["train"], *self.texts["valid"], "test"):
            self._make_codes(part, f"{part}_codes")
        # of voices with other pitch and formants, for the probe
        rows = read_values(self.data / "train.jsonl")[:NUM_PROBED]
        write_values(self.data / "probed.jsonl", rows)
        for part in ("probed", "test"):
            self._make_codes(part, f"{part}_perturbed", "--perturb")

    def _make_codes(self, part: str, name: str, *more: object) -> None:
        target = self.data / f"{name}.jsonl"
        if not target.exists():
            run("tools/make_codes.py", self.data / f"{part}.jsonl", target, "--model", self.out / "tokenizer", *more)

    def train_dit(self) -> None:
        self.train("token2wav-dit-mini", "dit", self.out / "tokenizer", self._sound_rows())

    def _sound_rows(self) -> list[Path]:
        return [self.data / "train_codes.jsonl", self.data / "valid_codes.jsonl"]

    def train_vocoder(self) -> None:
        first = self._scale(RECIPES["vocoder-mini"].phases[0].steps or 0, least=2)
        rows = [self.data / "train.jsonl", self.data / "valid.jsonl"]
        self.train("vocoder-mini", "vocoder", self.out / "dit", rows, "--phases.0.steps", first)

    def distill(self) -> None:
        # the teacher's published solve of a row takes as long as several steps, so few are held out
        few = read_values(self.data / "valid_codes.jsonl")[:NUM_DISTILLED]
        rows = [self.data / "train_codes.jsonl", write_values(self.data / "valid_few.jsonl", few)]
        self.train("token2wav-distill-mini", "distilled", self._with_voices(), rows, looks=2)

    def _with_voices(self) -> Path:
        """The checkpoint to which the last voice was added."""
        return self.out / "voices" / VOICES[-1]

    def add_voices(self) -> None:
        model: Path = self.out / "vocoder"
        for voice in VOICES:
            target = self.out / "voices" / voice
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                row = self._find_row(voice)
                run(
                    *("tools/add_voice.py", model, "--name", voice, "--audio", self.data / row["audio"]),
                    *("--text", row["text"], "--consent", LICENCE, "--own-token", "--no-speaker-vector"),
                    *("--out", target),
                )
            model = target

    def _find_row(self, voice: str) -> dict[str, Any]:
        for values in read_values(self.data / "train.jsonl"):
            if values["voice"] == voice:
                return values
        raise SystemExit(f"error: no row of {voice}")

    def train_talker(self) -> None:
        """Stage 1: the next code, in the voices of flite; a third of the rows goes on from a clip."""
        rows = []
        for name, parts in self.texts.items():
            target = self.data / f"{name}_flite.jsonl"
            self._keep_flite([self.data / f"{part}_codes.jsonl" for part in parts], target)
            rows.append(self._make_spoken(target))
        self.train("talker-pretrain-mini", "talker1", self.out / "distilled", rows)

    def _make_spoken(self, codes: Path) -> Path:
        target = codes.with_name(f"{codes.stem}_spoken.jsonl")
        if not target.exists():
            run("tools/make_spoken_rows.py", codes, target, "--clips", 0.33)
        return target

    def prefer(self) -> None:
        """Stage 2: of four answers to a text, the best and the worst."""
        spoken = read_values(self.data / "train_flite.jsonl")[: self.options.preferences]
        texts = write_values(self.data / "texts.jsonl", [{"text": values["text"]} for values in spoken])
        pairs = self.out / "pairs.jsonl"
        if not pairs.exists():
            run(
                *("tools/make_pairs.py", texts, pairs, "--model", self.out / "talker1", "--recognizer", "whisper"),
                # bad answers too: all answers of so small a model have errors, and some have fewer
                *("--voices", *FLITE_VOICES, "--max-codes", 400, "--pairs.bad-below", -2.0),
            )
        scored = self.out / "scored.jsonl"
        common = ("talker-dpo-mini", "--init", self.out / "talker1", "--data.train")
        if not scored.exists():
            run("tools/score_pairs.py", *common, pairs, "--out", scored)
        steps = self._scale(RECIPES["talker-dpo-mini"].steps)
        run("train.py", *common, scored, "--workdir", self.out / "talker2", "--steps", steps)

    def add_speaker(self) -> None:
        """Stage 3: all speakers, of whom one is new."""
        rows = [self._make_spoken(path) for path in self._sound_rows()]
        self.train("talker-voices-mini", "talker3", self.out / "talker2", rows, *self._new_voice())

    def _new_voice(self) -> tuple[object, ...]:
        token = load_voices(self._with_voices())[HIBARI_VOICE].bos_token
        return "--objective.voices", HIBARI_VOICE, token

    def measure(self) -> None:
        """Copies by the teacher's published solve and by the student's; speech after each stage of the Talker."""
        flite = self.data / "test_flite.jsonl"
        self._keep_flite([self.data / "test_codes.jsonl"], flite)
        # all that is spoken after stage 3, in an unseen voice too
        clip = ("--clip", self.data / "unseen.wav", "--clip-text", UNSEEN_TEXT)
        kinds = ("--kinds", "source", "copy", "spoken", "cloned")
        self._measure(self.out / "talker3", "measured", self.data / "test_codes.jsonl", *kinds, *clip)
        self._measure(self._with_voices(), "measured_teacher", self.data / "test_codes.jsonl", "--kinds", "copy")
        few = max(self.options.measured // 3, 1)
        for stage in ("talker1", "talker2"):
            self._measure(self.out / stage, f"measured_{stage}", flite, "--kinds", "spoken", sentences=few)

    def _measure(self, model: Path, folder: str, rows: Path, *more: object, sentences: int = 0) -> None:
        if not (self.out / folder / "report.json").exists():
            # of a command that was stopped
            shutil.rmtree(self.out / folder, ignore_errors=True)
            run(
                *("tools/measure_speech.py", model, rows, "--voice-rows", self.data / "valid.jsonl"),
                *("--sentences", sentences or self.options.measured, "--out", self.out / folder, *more),
            )

    def _keep_flite(self, sources: Sequence[Path], target: Path) -> None:
        """Rows of flite's voices."""
        rows = [values for source in sources for values in read_values(source) if values["voice"] in FLITE_VOICES]
        write_values(target, rows)

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
    stages.run("speech tokenizer", demo.train_tokenizer)
    stages.run("codes", demo.make_codes)
    stages.run("DiT", demo.train_dit)
    stages.run("vocoder", demo.train_vocoder)
    stages.run("voices", demo.add_voices)
    stages.run("distilled DiT", demo.distill)
    stages.run("Talker 1", demo.train_talker)
    stages.run("Talker 2", demo.prefer)
    stages.run("Talker 3", demo.add_speaker)
    stages.run("measuring", demo.measure)
    demo.report(stages)


if __name__ == "__main__":
    main()
