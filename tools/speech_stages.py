"""The stages that teach a checkpoint to speak, from sounds to several voices (docs/speech-training.md).

Each is a method, reads what those before have left in the folder, and goes on where it was stopped. The speech
tokenizer and Token2Wav are learned from sounds alone; the Talker, with a Thinker whose hidden states it reads.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_jax.checkpoint.voices import load_voices
from tools.make_speech import FLITE_VOICES, HIBARI_VOICE, VOICES
from tools.row_files import read_values, write_values
from tools.run_commands import run
from tools.run_recipe import EVALUATIONS, run_recipe

# folders of the stages that train, in their order
TRAINED = ("tokenizer", "dit", "vocoder", "distilled", "talker1", "talker2", "talker3")
# of recordings: at least so many pairs, and one held-out pair for so many
_LEAST_PAIRS = 64
_VALID_PAIRS = 25
_LEAST_DISTILLATION = 0.1  # of the steps of its recipe
_QUESTION = "Say something."  # that any text answers
NUM_DISTILLED = 8  # held-out rows whose published solve is compared with the student's
LICENCE = "A synthesizer's voice, whose licence lets anyone use it; nobody's consent is needed."


@dataclass(frozen=True)
class SpeechData:
    """Rows of sounds, each with ``audio``, ``text``, ``voice`` and ``ref_audio`` (``tools/make_speech.py``).

    Attributes:
      folder: of the files of rows.
      sounds: names of the files that codes, the DiT and the vocoder are learned from, by part: train and valid.
      texts: names of the files that the Talker learns from, by part.
      replies: names of files of dialogues with a spoken reply, by part, that it learns from too in its last stage.
      lists: names of files of lists of words, by part, that it learns from before texts; none: there is no such stage.
      test: name of the file that is measured.
    """

    folder: Path
    sounds: Mapping[str, str]
    texts: Mapping[str, Sequence[str]]
    replies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)
    test: str = "test"

    def rows(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"


class SpeechStages:
    """What follows the Thinker's stages."""

    def __init__(
        self,
        out: Path,
        data: SpeechData,
        *,
        files: Path,
        thinker: Path,
        steps_scale: float,
        preferences: int = 0,
        talker_size: str = "mini",
        evaluations: int = EVALUATIONS,
    ) -> None:
        """Trains nothing yet.

        Args:
          out: folder of the runs.
          data: what is spoken.
          files: config and tokenizer of the model, from which the speech tokenizer begins at random.
          thinker: a checkpoint of the same config, or the folder of its run, whose Thinker the Talker reads.
          steps_scale: factor of the steps of every recipe.
          preferences: texts that pairs of answers are made of; 0: stage 3 follows stage 1.
          talker_size: of the recipes of the Talker's stages.
          evaluations: how often held-out rows are evaluated in a stage.
        """
        self.out = out
        self.data = data
        self._files = files
        self._thinker = thinker
        self._steps_scale = steps_scale
        self._preferences = preferences
        self._talker_size = talker_size
        self._evaluations = evaluations

    def _train(
        self,
        recipe: str,
        folder: str,
        init: object,
        train: Sequence[Path],
        valid: Sequence[Path],
        *more: object,
    ) -> None:
        scale = self._steps_scale
        workdir = self.out / folder
        run_recipe(recipe, workdir, init, train, valid, *more, steps_scale=scale, evaluations=self._evaluations)

    def train_tokenizer(self) -> None:
        self._train("speech-tokenizer-mini", "tokenizer", "random", *self._sound_rows(), "--model", self._files)

    def _sound_rows(self, suffix: str = "") -> tuple[list[Path], list[Path]]:
        """Files to train on, and held-out ones."""
        train, valid = ([self.data.rows(f"{self.data.sounds[part]}{suffix}")] for part in ("train", "valid"))
        return train, valid

    def make_codes(self) -> None:
        data = self.data
        names = [*data.sounds.values(), *itertools.chain(*data.texts.values()), *data.replies.values()]
        for name in dict.fromkeys([*names, *data.lists.values(), data.test]):
            self.make_codes_of(name, f"{name}_codes")

    def make_codes_of(self, name: str, target: str, *more: object) -> None:
        """Adds codes to the rows of a file, with options of ``tools/make_codes.py``."""
        path = self.data.rows(target)
        if not path.exists():
            run("tools/make_codes.py", self.data.rows(name), path, "--model", self.out / "tokenizer", *more)

    def train_dit(self) -> None:
        self._train("token2wav-dit-mini", "dit", self.out / "tokenizer", *self._sound_rows("_codes"))

    def train_vocoder(self) -> None:
        self._train("vocoder-mini", "vocoder", self.out / "dit", *self._sound_rows())

    def add_voices(self) -> None:
        """Each voice with a clip of its own."""
        model: Path = self.out / "vocoder"
        for voice in VOICES:
            target = self.out / "voices" / voice
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                row = self._find_row(voice)
                run(
                    *("tools/add_voice.py", model, "--name", voice, "--audio", self.data.folder / row["audio"]),
                    *("--text", row["text"], "--consent", LICENCE, "--own-token", "--no-speaker-vector"),
                    *("--out", target),
                )
            model = target

    def _find_row(self, voice: str) -> dict[str, Any]:
        for values in read_values(self.data.rows(self.data.sounds["train"])):
            if values["voice"] == voice:
                return values
        raise SystemExit(f"error: no row of {voice}")

    @property
    def with_voices(self) -> Path:
        """The checkpoint to which the last voice was added."""
        return self.out / "voices" / VOICES[-1]

    def distill(self) -> None:
        # the teacher's published solve of a row takes as long as several steps, so few are held out
        train, (valid,) = self._sound_rows("_codes")
        few = write_values(self.data.rows("valid_few"), read_values(valid)[:NUM_DISTILLED])
        # within some steps the student is further from its teacher than where it began
        scale = max(self._steps_scale, _LEAST_DISTILLATION)
        workdir = self.out / "distilled"
        run_recipe("token2wav-distill-mini", workdir, self.with_voices, train, [few], steps_scale=scale, evaluations=2)

    def train_talker_on_lists(self) -> None:
        """Before stage 1: the codes of lists of words, of which each follows from the text alone."""
        rows = {}
        for part, name in self.data.lists.items():
            rows[part] = [self._make_spoken(self.data.rows(f"{name}_codes"), clips=0.0)]
        self._train_talker("talker-lists", "talker-lists", self._join(), rows)

    def train_talker(self) -> None:
        """Stage 1: the next code, in the voices of flite; a third of the texts that are read aloud goes on from a clip.

        Where the last stage has replies, each text is an answer, too, to a question that does not hold it: a Talker
        that has only read aloud copies from the question, and speaks other words where they stand in the reply alone.
        """
        rows = {}
        for part, names in self.data.texts.items():
            codes = keep_flite([self.data.rows(f"{name}_codes") for name in names], self.data.rows(f"{part}_flite"))
            rows[part] = [self._make_spoken(codes)]
            if self.data.replies:
                rows[part].append(self._make_answers(codes))
        before = self.out / "talker-lists" if self.data.lists else self._join()
        self._train_talker("talker-pretrain", "talker1", before, rows)

    def _join(self) -> Path:
        """A checkpoint of the trained Thinker, and of the speech tokenizer and Token2Wav after distillation."""
        target = self.out / "joined"
        if not target.exists():
            run("tools/pack_checkpoint.py", self.out / "distilled", target, "--thinker", self._thinker)
        return target

    def _make_spoken(self, codes: Path, clips: float = 0.33) -> Path:
        """Rows of texts that are read aloud."""
        return self._make_talker_rows(codes, _spoken(codes), "--clips", clips)

    def _make_answers(self, codes: Path) -> Path:
        """Rows of the same texts, each as the answer to a question that does not hold it."""
        return self._make_talker_rows(codes, codes.with_name(f"{codes.stem}_answers.jsonl"), "--question", _QUESTION)

    def _make_talker_rows(self, codes: Path, target: Path, *more: object) -> Path:
        if not target.exists():
            run("tools/make_spoken_rows.py", codes, target, *more)
        return target

    def _train_talker(
        self, stage: str, folder: str, init: Path, rows: Mapping[str, Sequence[Path]], *more: object
    ) -> None:
        self._train(f"{stage}-{self._talker_size}", folder, init, rows["train"], rows["valid"], *more)

    def prefer(self) -> None:
        """Stage 2: of four answers to a text, the best and the worst."""
        spoken = read_values(self.data.rows("train_flite"))[: self._preferences]
        texts = write_values(self.data.rows("texts"), [{"text": values["text"]} for values in spoken])
        pairs = self.out / "pairs.jsonl"
        if not pairs.exists():
            run(
                *("tools/make_pairs.py", texts, pairs, "--model", self.out / "talker1", "--recognizer", "whisper"),
                # bad answers too: all answers of so small a model have errors, and some have fewer
                *("--voices", *FLITE_VOICES, "--max-codes", 400, "--pairs.bad-below", -2.0),
            )
        scored = self._score(pairs, "talker-dpo-mini", self.out / "talker1")
        self._train("talker-dpo-mini", "talker2", self.out / "talker1", [scored], [])

    def add_speaker(self) -> None:
        """Stage 3: all speakers, of whom one is new."""
        before = self.out / ("talker2" if self._preferences else "talker1")
        self._train_talker("talker-voices", "talker3", before, self._rows_of_all_voices(), *self._new_voice())

    def _rows_of_all_voices(self) -> dict[str, list[Path]]:
        """Files of texts and of replies, by part."""
        rows = {}
        for part, names in self.data.texts.items():
            rows[part] = [self._make_spoken(self.data.rows(f"{name}_codes")) for name in names]
            if part in self.data.replies:
                rows[part].append(_make_replies(self.data.rows(f"{self.data.replies[part]}_codes")))
        return rows

    def _new_voice(self) -> tuple[object, ...]:
        """Options of ``train.py`` for the voice that stages before the third do not have."""
        return "--objective.voices", HIBARI_VOICE, load_voices(self.with_voices)[HIBARI_VOICE].bos_token

    def prefer_words(self, num_pairs: int) -> None:
        """Stage 2 of recordings, after stage 3: the words of an answer, not nearly the same ones.

        Args:
          num_pairs: to train on, with all steps; fewer with fewer.
        """
        num_pairs = max(round(num_pairs * self._steps_scale), _LEAST_PAIRS)
        before = self.out / "talker3"
        voice = self._new_voice()
        recipe = f"talker-dpo-{self._talker_size}"
        scored = {}
        for part, rows in self._rows_of_all_voices().items():
            count = num_pairs if part == "train" else max(num_pairs // _VALID_PAIRS, 4)
            pairs = self.data.rows(f"{part}_pairs")
            if not pairs.exists():
                run("tools/make_minimal_pairs.py", *rows, "--out", pairs, "--most", count)
            scored[part] = self._score(pairs, recipe, before, *voice)
        self._train(recipe, "talker2", before, [scored["train"]], [scored["valid"]], *voice)

    def _score(self, pairs: Path, recipe: str, model: Path, *more: object) -> Path:
        """The pairs with the log-probabilities of the model, beside them."""
        scored = pairs.with_name(f"{pairs.stem}_scored.jsonl")
        if not scored.exists():
            run("tools/score_pairs.py", recipe, "--init", model, "--data.train", pairs, "--out", scored, *more)
        return scored

    def measure(self, model: Path, folder: str, rows: Path, voice_rows: Path, sentences: int, *more: object) -> None:
        """Measures speech (``tools/measure_speech.py``) into a folder of this name, unless that is complete."""
        if not (self.out / folder / "report.json").exists():
            # of a command that was stopped
            shutil.rmtree(self.out / folder, ignore_errors=True)
            run(
                *("tools/measure_speech.py", model, rows, "--voice-rows", voice_rows),
                *("--sentences", sentences, "--out", self.out / folder, *more),
            )


def keep_flite(sources: Sequence[Path], target: Path) -> Path:
    """Writes the rows of flite's voices."""
    rows = [values for source in sources for values in read_values(source) if values["voice"] in FLITE_VOICES]
    return write_values(target, rows)


def make_reply_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """The Talker's row of a dialogue (docs/data.md).

    Args:
      values: the dialogue, with the ``codec_ids`` of its reply in a ``voice``, and ``codec``.
    """
    row = {name: values[name] for name in ("messages", "audios", "images", "videos") if name in values}
    row["speech"] = {name: values[name] for name in ("codec_ids", "codec", "voice")}
    return row


def _make_replies(codes: Path) -> Path:
    return write_values(_spoken(codes), [make_reply_row(values) for values in read_values(codes)])


def _spoken(codes: Path) -> Path:
    return codes.with_name(f"{codes.stem}_spoken.jsonl")
