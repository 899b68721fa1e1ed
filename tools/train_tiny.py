"""Trains omni-tiny from nothing, by the stages of this repository, and tells what it has learned.

    python tools/train_tiny.py out/omni-tiny        (make train-tiny)

Data are those of ``tools/make_world.py``, which needs flite. First come two stages of text in place of the language
model that published stages begin from: ``lists``, which are only to be copied, and ``language``, questions about media
whose content is told in words; and ``encoders``, in place of published encoders: which words are said of a picture or a
sound. Then come pretraining 1, 2 and 3, instruction tuning, of which ``pictures`` is the first part, and the stages of
speech. Run again, it goes on where it was stopped; ``--begin checkpoints/omni-tiny`` goes on from what is shipped (see
docs/omni-tiny.md). What the Thinker answers on held-out rows is in OUT/answers.jsonl, and in OUT/answers_in_text.jsonl
where media are told in words. The end tells whether each stage has learned.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from configs.omni_tiny import PIXELS, RECIPES, TALKER_SAMPLING, omni_tiny_config
from omni_jax.plain_files import replace_file
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.processing.tokenizer_files import write_generation_config, write_tokenizer
from tools.make_speech import FLITE_VOICES, VOICES
from tools.row_files import read_values, write_values
from tools.run_commands import Stages, count_cores, exit_on_sigterm, find_devices, run
from tools.run_recipe import EVALUATIONS, run_recipe
from tools.score_world import Answered
from tools.speech_stages import SpeechData, SpeechStages
from tools.training_checks import find_rising, is_above_chance

NUM_PIECES = 768  # of the vocabulary: every word of the world and of its prompts is a token
NUM_VALID = 500  # held-out rows that stages look at, drawn at random, so that a look takes seconds
# of pretraining 1: a picture or a sound, and all that it shows or says. From questions about pictures encoders learn
# little: from twelve thousand descriptions they learn in minutes what they do not learn from as many questions
CAPTION_TASKS = ("transcribe", "phrase", "hear", "describe", "picture-dialogue", "shapes")
NARRATION_TASKS = ("narrate", "video-dialogue")  # the same of videos, which take five times as long; for pretraining 2
# what pretraining 2 reads, with how much of each; text too, so that what was learned from it stays
JOINT_WEIGHTS = {"all": 2, "captions": 3, "narrations": 1, "texts": 1}
# what instruction tuning begins with, a medium at a time: a step of one alone has more rows, and takes less time
PICTURE_TASKS = ("colour", "shape", "count", "place", "describe", "shapes", "dialogue", "picture-dialogue")
SILENT_TASKS = ("order", "direction", "repeats", "sign", "watch")
SPOKEN_TASKS = ("transcribe", "phrase", "hear")  # what is heard in them, the Talker learns to say, too
VOICED_TASKS = ("opposite", "day", "owner")  # of text alone, also asked by voice
TIMED_TASKS = ("colour-at-sound", "word-at-shape", "moments")  # that need a picture and a sound at once
VIDEO_WEIGHTS = {"silent": 4, "pictures": 1}
# the last of them is of videos of which one moment is asked for, and of questions by voice, also about what is seen
ASKED_TASKS = ("colour", "shape", "count", "place", "describe", "order", "direction", "repeats", "sign")
TIMING_WEIGHTS = {"timed": 5, "asked": 6, "narrations": 2, "all": 2}
TUNING_WEIGHTS = {
    "all": 3,
    "pictures": 3,
    "timed": 2,
    "asked": 2,
    "narrations": 1,
    "silent": 1,
    "recordings": 2,
    # without it lists are copied with errors after a while
    "texts": 1,
}
# whose answers the Talker learns to say apart from what they are about: of all kinds of sentences, and words of them in
# any order. From few kinds it learns what follows what in these, and says other ones wrongly
ANSWER_TASKS = (
    *("colour", "shape", "count", "place", "describe", "shapes", "effect", "narrate"),
    *SILENT_TASKS, *TIMED_TASKS, *VOICED_TASKS,
)  # fmt: skip
HELD_OUT_LIST = 50  # one list of words in so many, of those that occur once; the Talker learns to copy the others
NUM_SOUNDS = {"train": 4000, "valid": 96, "test": 96}  # sentences that codes, the DiT and the vocoder are learned from
NUM_PAIRS = 6000  # of recordings, of which the Talker learns to prefer one
SPEECH_SHARE = 4  # one dialogue in so many has the system prompt of spoken replies
STAGES_FILE = "stages.json"  # the log
ANSWERS = "answers.jsonl"  # to held-out questions about media
ANSWERS_IN_TEXT = "answers_in_text.jsonl"  # and about what they hold, told in words
JOINED = 4  # dialogues that follow each other in a row of pretraining 3
_MEDIA_FIELDS = ("audios", "images", "videos")

Values = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How much is made and trained."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    items: int = 2000
    """Of each task to train on; a tenth of it is held out."""
    captions: int = 12_000
    """Of each task of captions, beside those, to train on."""
    texts: int = 8000
    """Of each task in text alone, to learn language from."""
    questions: int = 6000
    """Of each task about a picture or a video, beside those, to train on, half as many of those asked by voice, and
    three and a half times as many lists of words for the Talker."""
    steps_scale: float = 1.0
    """Factor of the steps of every recipe; below 1 for a trial."""
    scored: int = 100
    """Held-out rows of each task that are answered at the end."""
    short: bool = False
    """A part of the steps and of the data, to see within twenty minutes that each stage learns. There are not the
    stages of one medium that instruction tuning begins with, nor that of lists which the Talker begins with."""
    begin: Path | None = None
    """A checkpoint with the log of its stages, such as checkpoints/omni-tiny: these do not train again."""


# of a short form: the data, the factor of the steps of each recipe, and that of those that are not named. What is to
# be copied from a text is learned within some hundred steps, and not in fewer
_SHORT = {"items": 40, "captions": 300, "texts": 1500, "questions": 60, "scored": 10}
_SHORT_SCALES = {"lists": 0.4, "language": 0.1}
_SHORT_SCALE = 0.008
_SHORT_EVALUATIONS = 2
# stages that train all parts at once, and the factor of their rate: in so few steps at the whole rate more is forgotten
# of what was learned before than is learned
_SHORT_SLOW = ("pretrain2", "pretrain3", "thinker-sft")
_SHORT_RATE = 0.3


class Stage(NamedTuple):
    """A part of the training.

    Attributes:
      name: in the log.
      work: what it does.
      folder: of the checkpoint that it makes, relative to the output; None: it makes none.
    """

    name: str
    work: Callable[[], None]
    folder: str | None = None


class Training:
    """The stages, each a method; each reads what those before have left in the folder."""

    def __init__(self, options: Options) -> None:
        if options.short:
            options = dataclasses.replace(options, **_SHORT)
        self.options = options
        self.out = options.out.resolve()
        self.files = self.out / "files"  # config and tokenizer
        self.data = self.out / "data"  # with the media, which rows name relative to it
        self.speech = SpeechStages(
            self.out,
            SpeechData(
                self.data,
                sounds={part: f"{part}_sounds" for part in ("train", "valid")},
                texts={part: [f"{part}_speech", f"{part}_words"] for part in ("train", "valid")},
                replies={part: f"{part}_replies" for part in ("train", "valid")},
                lists={} if options.short else {part: f"{part}_words" for part in ("train", "valid")},
                test="test_sounds",
            ),
            files=self.files,
            thinker=self.out / "thinker-sft",
            steps_scale=self._scale("speech"),
            talker_size="omni-tiny",
            evaluations=self._evaluations,
        )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """In their order."""
        speech = self.speech
        of_lists: tuple[Stage, ...] = ()
        of_one_medium: tuple[Stage, ...] = ()
        if not self.options.short:
            of_lists = (Stage("Talker on lists", speech.train_talker_on_lists, "talker-lists"),)
            of_one_medium = (
                Stage("pictures", self.tune_on_pictures, "pictures"),
                Stage("videos", self.tune_on_videos, "videos"),
                Stage("sounds", self.tune_on_sounds, "sounds"),
                Stage("timing", self.tune_on_timing, "timing"),
            )
        return (
            Stage("texts", self.make_texts),
            Stage("lists", self.learn_to_copy, "lists"),
            Stage("language", self.learn_language, "language"),
            Stage("data", self.make_data),
            Stage("encoders", self.learn_words, "encoders"),
            Stage("pretraining 1", self.align, "pretrain1"),
            Stage("pretraining 2", self.join, "pretrain2"),
            Stage("pretraining 3", self.lengthen, "pretrain3"),
            *of_one_medium,
            Stage("instruction tuning", self.tune, "thinker-sft"),
            Stage("scoring", self.score),
            Stage("speech tokenizer", speech.train_tokenizer, "tokenizer"),
            Stage("codes", speech.make_codes),
            Stage("DiT", speech.train_dit, "dit"),
            Stage("vocoder", speech.train_vocoder, "vocoder"),
            Stage("voices", speech.add_voices, f"voices/{VOICES[-1]}"),
            Stage("distilled DiT", speech.distill, "distilled"),
            *of_lists,
            Stage("Talker 1", speech.train_talker, "talker1"),
            Stage("Talker 3", speech.add_speaker, "talker3"),
            # published before the third; here the pairs are of answers to media in all voices, which the third begins
            Stage("Talker 2", lambda: speech.prefer_words(NUM_PAIRS), "talker2"),
            Stage("checks", self.check),
        )

    def begin(self, checkpoint: Path) -> None:
        """Lets a checkpoint stand for those of all stages in its log; what these write beside is made again.

        Raises:
          SystemExit: if it has no log.
        """
        log = checkpoint / STAGES_FILE
        if not log.is_file():
            raise SystemExit(f"error: {checkpoint} has no {STAGES_FILE}, the log of the stages that made it")
        values = json.loads(log.read_text(encoding="utf-8"))
        made = [stage for stage in self.stages if stage.name in values["complete"] and stage.folder]
        for stage in made:
            assert stage.folder is not None
            link = self.out / stage.folder
            link.parent.mkdir(parents=True, exist_ok=True)
            # what no answer needs lies apart, so that the checkpoint stays small
            apart = checkpoint.with_name(f"{checkpoint.name}-{stage.folder}")
            link.symlink_to(apart if apart.is_dir() else checkpoint)
        values["complete"] = [stage.name for stage in made]
        replace_file(self.out / STAGES_FILE, (json.dumps(values, indent=2) + "\n").encode())

    def make_texts(self) -> None:
        folder = self.data / "text"
        in_text = ("--in-text", "--seed", 2)
        run("tools/make_world.py", folder, "--items", self.options.texts, *in_text)
        run("tools/make_world.py", folder / "lists", "--items", 2 * self.options.texts, "--tasks", "list", *in_text)
        for part in ("train", "valid"):
            for name, path in (("texts", folder), ("lists", folder / "lists")):
                rows = read_values(path / f"{part}.jsonl")
                self._write(f"{part}_{name}", rows if part == "train" else rows[:: max(len(rows) // NUM_VALID, 1)])
        config = omni_tiny_config(NUM_PIECES)
        prompts = f"system\n{SPEECH_SYSTEM_PROMPT}\nsystem\nYou are a helpful assistant.\nuser\nassistant\n"
        texts = []
        for values in read_values(self._rows("train_texts")):
            texts.append(prompts + " ".join(message["content"] for message in values["messages"]))
        write_tokenizer(self.files, config, texts, PIXELS)
        write_generation_config(self.files, config, TALKER_SAMPLING)
        config.save(self.files)

    def make_data(self) -> None:
        run("tools/make_world.py", self.data, "--items", self.options.items, "--spoken", 0.25)
        run(
            *("tools/make_world.py", self.data / "captions", "--items", self.options.captions, "--split", "train"),
            *("--tasks", *CAPTION_TASKS, *NARRATION_TASKS, "--voiced", 0, "--seed", 1),
        )
        one_question = [task for task in PICTURE_TASKS if not task.endswith("dialogue")]
        self._make_questions("seen", self.options.questions, one_question, "--voiced", 0, "--seed", 6)
        self._make_questions("watched", self.options.questions, SILENT_TASKS, "--voiced", 0, "--seed", 3)
        self._make_questions("voiced", self.options.questions // 2, VOICED_TASKS, "--voiced", 1, "--seed", 4)
        self._make_questions("timed", self.options.questions, TIMED_TASKS, "--voiced", 0, "--seed", 5)
        self._make_questions("asked", self.options.questions // 4, ASKED_TASKS, "--voiced", 1, "--seed", 8)
        answers = self.options.questions // 10
        self._make_questions("answers", answers, ANSWER_TASKS, "--in-text", "--spoken", 1, "--seed", 9)
        self._make_questions("shuffled", 7 * answers, ["shuffled"], "--seed", 10)
        flite = ("--voices", *FLITE_VOICES)  # of whom the Talker learns first
        self._make_questions("words", 7 * self.options.questions // 2, ["words"], "--voiced", 0, "--seed", 7, *flite)
        for part in ("train", "valid"):
            rows = read_values(self._rows(part))
            if part == "train":
                described = read_subfolder(self._rows("captions/train"))
            else:
                chosen = np.random.default_rng(0).permutation(len(rows))[:NUM_VALID]
                rows = [rows[i] for i in sorted(chosen)]
                described = rows
            self._write(f"{part}_captions", _select(described, CAPTION_TASKS))
            self._write(f"{part}_narrations", _select(described, NARRATION_TASKS))
            self._write(f"{part}_long", list(join_dialogues(rows)))
            prompted = list(with_system_prompts(rows))
            self._write(f"{part}_all", prompted)
            asked = [*prompted, *described] if part == "train" else prompted
            more: dict[str, list[Values]] = {}
            for folder in ("seen", "watched", "voiced", "timed", "asked"):
                more[folder] = read_subfolder(self._rows(f"{folder}/train")) if part == "train" else []
            by_voice = [f"{task}-voice" for task in VOICED_TASKS]
            all_by_voice = [*by_voice, *(f"{task}-voice" for task in ASKED_TASKS)]
            self._write(f"{part}_pictures", [*_select(asked, PICTURE_TASKS), *more["seen"]])
            self._write(f"{part}_silent", [*more["watched"], *_select(prompted, SILENT_TASKS)])
            recorded = _select(asked, (*SPOKEN_TASKS, *VOICED_TASKS, *by_voice))
            self._write(f"{part}_recordings", [*recorded, *more["voiced"]])
            self._write(f"{part}_timed", [*_select(prompted, TIMED_TASKS), *more["timed"]])
            self._write(f"{part}_asked", _select([*prompted, *more["voiced"], *more["asked"]], all_by_voice))
        for part, count in NUM_SOUNDS.items():
            rows = read_values(self._rows(part))
            self._write(f"{part}_replies", list(find_replies(rows)))
            spoken = rows
            if part == "train":
                spoken = [*rows, *read_subfolder(self._rows("captions/train"))]
            speech = list(find_speech(spoken, SPOKEN_TASKS))
            if part == "train":
                speech += find_speech(read_subfolder(self._rows("shuffled/train")), ["shuffled"])
                speech += find_answers(read_subfolder(self._rows("answers/train")))
            self._write(f"{part}_speech", speech)
            self._write(f"{part}_sounds", list(find_speech(spoken, ("transcribe",)))[:count])
        lists = list(find_speech(read_subfolder(self._rows("words/train")), ("words",)))
        # lists of one word, and some of two, are drawn several times
        occurrences = Counter(values["text"] for values in lists)
        held_out = [values for values in lists if occurrences[values["text"]] == 1][::HELD_OUT_LIST]
        texts = {values["text"] for values in held_out}
        self._write("valid_words", held_out)
        self._write("train_words", [values for values in lists if values["text"] not in texts])

    def _make_questions(self, folder: str, items: int, tasks: Sequence[str], *more: object) -> None:
        """More rows of some tasks to train on."""
        run(
            *("tools/make_world.py", self.data / folder, "--items", items, "--split", "train", "--tasks", *tasks),
            *more,
        )

    def _write(self, name: str, rows: Sequence[Values]) -> None:
        write_values(self._rows(name), rows)

    def _rows(self, name: str) -> Path:
        return self.data / f"{name}.jsonl"

    def learn_to_copy(self) -> None:
        self._train("lists", "random", ["lists"], "--model", self.files)

    def learn_language(self) -> None:
        self._train("language", self.out / "lists", ["texts"])

    def learn_words(self) -> None:
        self._train("encoders", self.out / "language", ["captions"])

    def align(self) -> None:
        self._train("pretrain1", self.out / "encoders", ["captions"])

    def join(self) -> None:
        self._train_mixture("pretrain2", self.out / "pretrain1", JOINT_WEIGHTS)

    def lengthen(self) -> None:
        self._train("pretrain3", self.out / "pretrain2", ["long"])

    def tune_on_pictures(self) -> None:
        self._train("pictures", self.out / "pretrain3", ["pictures"])

    def tune_on_videos(self) -> None:
        self._train_mixture("videos", self.out / "pictures", VIDEO_WEIGHTS)

    def tune_on_sounds(self) -> None:
        self._train("sounds", self.out / "videos", ["recordings"])

    def tune_on_timing(self) -> None:
        self._train_mixture("timing", self.out / "sounds", TIMING_WEIGHTS)

    def tune(self) -> None:
        init = self.out / ("pretrain3" if self.options.short else "timing")
        self._train_mixture("thinker-sft", init, TUNING_WEIGHTS)

    def _train_mixture(self, stage: str, init: Path, weights: Mapping[str, int]) -> None:
        self._train(stage, init, list(weights), "--data.weights", *weights.values())

    def _train(self, stage: str, init: object, rows: Sequence[str], *more: object) -> None:
        train, valid = ([self._rows(f"{part}_{name}") for name in rows] for part in ("train", "valid"))
        name = f"{stage}-omni-tiny"
        if self.options.short and stage in _SHORT_SLOW:
            more = (*more, "--optimizer.learning-rate", _SHORT_RATE * RECIPES[name].optimizer.learning_rate)
        workdir = self.out / stage
        scale = self._scale(stage)
        run_recipe(name, workdir, init, train, valid, *more, steps_scale=scale, evaluations=self._evaluations)

    @property
    def _evaluations(self) -> int:
        """How often held-out rows are evaluated in a stage."""
        return _SHORT_EVALUATIONS if self.options.short else EVALUATIONS

    def _scale(self, stage: str) -> float:
        """The factor of a stage's steps."""
        short = _SHORT_SCALES.get(stage, _SHORT_SCALE) if self.options.short else 1.0
        return self.options.steps_scale * short

    def score(self) -> None:
        # of media, and of what they hold told in words
        for rows, answers in ((self._rows("test"), ANSWERS), (self.data / "text" / "test.jsonl", ANSWERS_IN_TEXT)):
            run(
                *("tools/score_world.py", self.out / "thinker-sft", rows),
                *("--most", self.options.scored, "--out", self.out / answers),
            )

    def check(self) -> None:
        """Tells whether each stage has learned.

        Raises:
          SystemExit: if a loss has not fallen, or the answers are no better than chance.
        """
        folders = {stage.name: self.out / stage.folder for stage in self.stages if stage.folder}
        wrong = [f"the held-out loss of {name} has not fallen" for name in find_rising(folders)]
        rows = [values for file in (ANSWERS, ANSWERS_IN_TEXT) for values in read_values(self.out / file)]
        if not is_above_chance([Answered(**values) for values in rows]):
            wrong.append("answers to held-out questions are no better than chance")
        if wrong:
            raise SystemExit(f"error: {'; '.join(wrong)}")


def read_subfolder(path: Path) -> list[Values]:
    """Rows of another folder within that of the others, with media named relative to the latter."""
    rows = read_values(path)
    for values in rows:
        for field in _MEDIA_FIELDS:
            if field in values:
                values[field] = [f"{path.parent.name}/{file}" for file in values[field]]
        if "reply" in values:
            values["reply"]["audio"] = f"{path.parent.name}/{values['reply']['audio']}"
    return rows


def _select(rows: Sequence[Values], tasks: Sequence[str]) -> list[Values]:
    return [values for values in rows if values["task"] in tasks]


def find_speech(rows: Sequence[Values], tasks: Sequence[str]) -> Iterator[Values]:
    """What is heard in rows of some tasks, with its text, its voice and another sound of that voice."""
    recorded = []
    for values in _select(rows, tasks):
        (audio,) = values["audios"]
        recorded.append({"audio": audio, "text": values["messages"][-1]["content"], "voice": values["voice"]})
    return _add_clips(recorded)


def find_answers(rows: Sequence[Values]) -> Iterator[Values]:
    """The spoken answers of rows, as ``find_speech`` has what is heard: without what they answer."""
    return _add_clips([{**values["reply"], "text": values["messages"][-1]["content"]} for values in rows])


def _add_clips(recorded: Sequence[Values]) -> Iterator[Values]:
    """Each with the sound of its voice before it, the first of a voice with the last."""
    previous = {values["voice"]: values["audio"] for values in recorded}
    for values in recorded:
        yield {**values, "ref_audio": previous[values["voice"]]}
        previous[values["voice"]] = values["audio"]


def find_replies(rows: Sequence[Values]) -> Iterator[Values]:
    """Dialogues whose last answer is spoken, under the system prompt of speech."""
    for values in rows:
        if "reply" in values:
            messages = [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, *values["messages"]]
            yield {**values, **values["reply"], "text": messages[-1]["content"], "messages": messages}


def with_system_prompts(rows: Sequence[Values]) -> Iterator[Values]:
    """The same rows, of which one in ``SPEECH_SHARE`` begins with the system prompt of spoken replies."""
    for number, values in enumerate(rows):
        messages = values["messages"]
        if number % SPEECH_SHARE == 0:
            messages = [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, *messages]
        yield {**values, "messages": messages}


def join_dialogues(rows: Sequence[Values]) -> Iterator[Values]:
    """Rows of ``JOINED`` dialogues with all their media, each of other tasks, as rows come task by task.

    Up to ``JOINED - 1`` rows that are left over are in none.
    """
    count = len(rows) // JOINED
    for number in range(count):
        joined: Values = {"task": "joined", "messages": []}
        for values in rows[number::count][:JOINED]:
            joined["messages"] += values["messages"]
            for field in _MEDIA_FIELDS:
                if field in values:
                    joined[field] = [*joined.get(field, []), *values[field]]
        yield joined


def describe_device() -> str:
    """What programs train on here, for the log."""
    backend, count, kind = find_devices()
    if backend != "cpu":
        return f"{count} x {kind}"
    # a run may be held to some of them
    used = count_cores()
    return f"{used} CPU cores" if used == os.cpu_count() else f"{used} of {os.cpu_count()} CPU cores"


def main() -> None:
    exit_on_sigterm()
    options = tyro.cli(Options, description=__doc__)
    training = Training(options)
    training.out.mkdir(parents=True, exist_ok=True)
    log = training.out / STAGES_FILE
    if options.begin is not None and not log.exists():
        training.begin(options.begin.resolve())
    stages = Stages(log, describe_device())
    for stage in training.stages:
        stages.run(stage.name, stage.work)


if __name__ == "__main__":
    main()
