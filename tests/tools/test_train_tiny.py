"""omni-tiny's data and its score, without training it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import omni_jax
from omni_jax.data.rows import Dialogue, read_row, row_values
from omni_jax.data.sources import open_rows
from omni_jax.engine.request import TalkerParams
from omni_jax.engine.sampling import SamplingParams
from omni_jax.errors import InputError
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.processing.tokenizer import TextTokenizer
from tools import make_world, score_world
from tools.row_files import read_values
from tools.score_world import Answered, Options, Score, ask, score
from tools.speech_stages import make_reply_row
from tools.train_tiny import (
    ANSWER_TASKS,
    ANSWERS,
    ANSWERS_IN_TEXT,
    CAPTION_TASKS,
    JOINED,
    NARRATION_TASKS,
    Training,
    find_speech,
    join_dialogues,
)
from tools.train_tiny import Options as TrainingOptions
from tools.training_checks import count_by_chance


def row(task: str, question: str, answer: str, **media: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"task": task, "messages": messages, **media}


ROWS = [
    row("transcribe", "<audio>Write down what you hear.", "The sheep is new.", audios=["media/a.wav"], voice="slt"),
    row("colour", "<image>What colour is the star?", "The star is red.", images=["media/b.png"]),
    row("order-voice", "<video><audio>", "The ring came last.", videos=["media/c.mp4"], audios=["media/d.wav"]),
    row(
        "day",
        "Emma comes the day after Monday. When?",
        "Emma comes on Tuesday.",
        reply={"audio": "media/f.wav", "voice": "awb"},
    ),
]


CAPTIONS = [
    row("describe", "<image>What do you see?", "Two red stars.", images=["media/e.png"]),
    row("narrate", "<video>What happens?", "A star, then a ring.", videos=["media/g.mp4"]),
    row("transcribe", "<audio>Write down what you hear.", "The dog is old.", audios=["media/m.wav"], voice="rms"),
]
QUESTIONS = {
    "seen": [row("shape", "<image>What is red?", "The star is red.", images=["media/h.png"])],
    "watched": [row("watch", "<video>What happens?", "A star, then a ring.", videos=["media/i.mp4"])],
    "voiced": [row("day-voice", "<audio>", "Emma comes on Tuesday.", audios=["media/j.wav"], voice="rms")],
    "timed": [row("word-at-shape", "<video>Which word was said?", "The word was dog.", videos=["media/k.mp4"])],
    "asked": [
        row("shape", "<image>What is red?", "The star is red.", images=["media/p.png"]),
        row("shape-voice", "<image><audio>", "The star is red.", images=["media/p.png"], audios=["media/q.wav"]),
    ],
    # a list that is drawn twice, and one that is held out
    "words": [
        row("words", "<audio>What is said?", text, audios=[f"media/{file}.wav"], voice="awb")
        for file, text in (("l", "Dog"), ("n", "New dog red star"), ("o", "Dog"))
    ],
    "shuffled": [row("shuffled", "<audio>What is said?", "Red is star.", audios=["media/r.wav"], voice="rms")],
    "answers": [
        row("colour-text", "A star.", "The star is red.", reply={"audio": f"media/{file}.wav", "voice": "awb"})
        for file in "st"
    ],
}
LISTS = [row("list-text", "Read this aloud: star red dog", "star red dog")]
TEXTS = [row("colour-text", "A red star and a blue ring. What colour is the star?", "The star is red.")]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(values) + "\n" for values in rows), encoding="utf-8")
    return path


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    made = Training(TrainingOptions(tmp_path))

    def make(*arguments: object) -> str:
        assert arguments[0] == "tools/make_world.py"
        assert isinstance(arguments[1], Path)
        rows = {
            made.data: ROWS,
            made.data / "captions": CAPTIONS,
            made.data / "text": TEXTS,
            made.data / "text" / "lists": LISTS,
            **{made.data / folder: questions for folder, questions in QUESTIONS.items()},
        }[arguments[1]]
        for part in ("train", "valid", "test"):
            write_rows(arguments[1] / f"{part}.jsonl", rows)
        return ""

    monkeypatch.setattr("tools.train_tiny.run", make)
    made.make_texts()
    made.make_data()
    return made


def test_language_is_learned_from_text_alone(training: Training) -> None:
    assert read_values(training.data / "train_texts.jsonl") == TEXTS
    assert read_values(training.data / "valid_texts.jsonl") == TEXTS
    assert read_values(training.data / "train_lists.jsonl") == LISTS
    # with the tokenizer, whose words are those of the texts
    tokenizer = TextTokenizer.load(training.out / "files")
    assert len(tokenizer.encode([(" colour", False)])) == 1
    # and how its codes are to be drawn
    assert TalkerParams.load(training.out / "files").sampling == SamplingParams(0.3, 40, 0.8, 1.05)


def test_captions_are_of_their_tasks(training: Training) -> None:
    caption, sound = read_values(training.data / "train_captions.jsonl")
    (narration,) = read_values(training.data / "train_narrations.jsonl")
    # media are found from the folder of this file
    assert sound["audios"] == ["captions/media/m.wav"]
    assert caption["images"] == ["captions/media/e.png"] and narration["videos"] == ["captions/media/g.mp4"]
    assert [values["task"] for values in read_values(training.data / "valid_captions.jsonl")] == ["transcribe"]
    tasks = make_world.Artist(make_world.np.random.default_rng(0), make_world.STYLES["train"], ("slt",)).tasks
    assert {*CAPTION_TASKS, *NARRATION_TASKS, *ANSWER_TASKS} <= set(tasks)


def test_pictures_are_those_of_questions_and_of_captions(training: Training) -> None:
    rows = read_values(training.data / "train_pictures.jsonl")
    assert [(values["task"], values["images"]) for values in rows] == [
        ("colour", ["media/b.png"]),
        ("describe", ["captions/media/e.png"]),
        ("shape", ["seen/media/h.png"]),
    ]
    assert [values["task"] for values in read_values(training.data / "valid_pictures.jsonl")] == ["colour"]


@pytest.mark.parametrize(
    "name, expected, num_valid",
    [
        ("silent", [("watch", "watched/media/i.mp4")], 0),
        (
            "recordings",
            [
                ("transcribe", "media/a.wav"),
                ("day", None),
                ("transcribe", "captions/media/m.wav"),
                ("day-voice", "voiced/media/j.wav"),
            ],
            2,
        ),
        ("timed", [("word-at-shape", "timed/media/k.mp4")], 0),
        (
            "asked",
            [("order-voice", "media/d.wav"), ("day-voice", "voiced/media/j.wav"), ("shape-voice", "asked/media/q.wav")],
            1,
        ),
    ],
)
def test_rows_of_one_medium(
    training: Training, name: str, expected: list[tuple[str, str | None]], num_valid: int
) -> None:
    found = []
    for values in read_values(training.data / f"train_{name}.jsonl"):
        files = [*values.get("audios", ()), *values.get("videos", ())]
        found.append((values["task"], files[0] if files else None))
    assert found == expected
    # what is made beside the others is to train on alone
    assert len((training.data / f"valid_{name}.jsonl").read_text().splitlines()) == num_valid


def test_one_dialogue_in_four_has_the_system_prompt_of_speech(training: Training) -> None:
    rows = read_values(training.data / "train_all.jsonl")
    assert [values["messages"][0]["role"] for values in rows] == ["system", "user", "user", "user"]
    assert rows[0]["messages"][0]["content"] == SPEECH_SYSTEM_PROMPT
    assert rows[0]["messages"][1:] == ROWS[0]["messages"]


def test_transcribed_sounds_and_spoken_answers_become_rows(training: Training) -> None:
    # those of captions are among them, and lists and answers that the Talker alone learns from
    for_talker = ["shuffled/media/r.wav", "answers/media/s.wav", "answers/media/t.wav"]
    for name, others in (("sounds", []), ("speech", for_talker)):
        spoken, *more = read_values(training.data / f"train_{name}.jsonl")
        assert [values["audio"] for values in more] == ["captions/media/m.wav", *others]
        assert spoken == {
            "audio": "media/a.wav",
            "text": "The sheep is new.",
            "voice": "slt",
            "ref_audio": "media/a.wav",
        }
    assert read_values(training.data / "train_speech.jsonl")[-1] == {
        "audio": "answers/media/t.wav",
        "text": "The star is red.",
        "voice": "awb",
        "ref_audio": "answers/media/s.wav",
    }
    (reply,) = read_values(training.data / "valid_replies.jsonl")
    assert [reply[name] for name in ("audio", "voice", "text")] == ["media/f.wav", "awb", "Emma comes on Tuesday."]
    assert [message["role"] for message in reply["messages"]] == ["system", "user", "assistant"]
    spoken = make_reply_row({**reply, "codec_ids": [1, 2], "codec": "c"})
    assert spoken == {
        "messages": reply["messages"],
        "speech": {"codec_ids": [1, 2], "codec": "c", "voice": "awb"},
    }


def test_held_out_lists_of_words_are_not_trained_on(training: Training) -> None:
    for part, expected in (
        ("train", [("Dog", "words/media/l.wav"), ("Dog", "words/media/o.wav")]),
        ("valid", [("New dog red star", "words/media/n.wav")]),
    ):
        rows = read_values(training.data / f"{part}_words.jsonl")
        assert [(values["text"], values["audio"]) for values in rows] == expected


def test_another_sound_of_a_voice_is_the_one_before() -> None:
    rows = [
        row("phrase", "<audio>What is spoken?", str(i), audios=[f"{i}.wav"], voice=voice)
        for i, voice in enumerate(("slt", "awb", "slt"))
    ]
    assert [values["ref_audio"] for values in find_speech(rows, ("phrase",))] == ["2.wav", "1.wav", "0.wav"]


def test_few_held_out_rows_are_looked_at(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.train_tiny.NUM_VALID", 2)
    training.make_data()
    assert len(read_values(training.data / "train_all.jsonl")) == len(ROWS)
    few = read_values(training.data / "valid_all.jsonl")
    assert len(few) == 2 and {values["task"] for values in few} < {values["task"] for values in ROWS}


def test_a_checkpoint_stands_for_the_stages_of_its_log(tmp_path: Path) -> None:
    checkpoint = tmp_path / "shipped"
    checkpoint.mkdir()
    (tmp_path / "shipped-tokenizer").mkdir()
    complete = ["data", "language", "pretraining 1", "speech tokenizer"]
    log = {"complete": complete, "seconds": {"data": 9.0, "language": 1.0}}
    (checkpoint / "stages.json").write_text(json.dumps(log))
    continued = Training(TrainingOptions(tmp_path / "out"))
    continued.begin(checkpoint)
    # rows and media are made again: they are in no checkpoint
    assert json.loads((continued.out / "stages.json").read_text())["complete"] == complete[1:]
    for folder in ("language", "pretrain1"):
        assert (continued.out / folder).resolve() == checkpoint
    assert (continued.out / "tokenizer").resolve() == tmp_path / "shipped-tokenizer"
    assert not (continued.out / "pretrain2").exists()
    with pytest.raises(SystemExit, match=r"has no stages.json"):
        continued.begin(tmp_path)


def test_the_short_form_has_fewer_stages_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [stage.name for stage in Training(TrainingOptions(tmp_path)).stages]
    short = Training(TrainingOptions(tmp_path, short=True))
    left_out = ("pictures", "videos", "sounds", "timing", "Talker on lists")
    assert [stage.name for stage in short.stages] == [name for name in names if name not in left_out]
    assert short.options.items < TrainingOptions(tmp_path).items
    steps = {}
    monkeypatch.setattr(
        "tools.train_tiny.run_recipe", lambda name, *rest, steps_scale, **kw: steps.update({name: (steps_scale, kw)})
    )
    for learn in (short.learn_to_copy, short.learn_language, short.align):
        learn()
    twice = {"evaluations": 2}
    assert steps == {
        "lists-omni-tiny": (0.4, twice),
        "language-omni-tiny": (0.1, twice),
        "pretrain1-omni-tiny": (0.008, twice),
    }


def test_the_end_tells_whether_stages_have_learned(tmp_path: Path) -> None:
    training = Training(TrainingOptions(tmp_path))
    right = [vars(Answered("colour", str(i), f"answer {i}", f"answer {i}")) for i in range(10)]
    guessed = [vars(Answered("colour", str(i), "red" if i < 8 else "blue", "red")) for i in range(10)]
    losses = [{"step": 1, "loss": 0.5, "since": 0}, {"step": 2, "loss": 0.25, "since": 0}]
    write_rows(tmp_path / "lists" / "eval.jsonl", losses)
    for name in (ANSWERS, ANSWERS_IN_TEXT):
        write_rows(tmp_path / name, right)
    training.check()
    write_rows(tmp_path / "talker1" / "eval.jsonl", losses[::-1])
    for name in (ANSWERS, ANSWERS_IN_TEXT):
        write_rows(tmp_path / name, guessed)
    with pytest.raises(SystemExit) as error:
        training.check()
    assert "loss of Talker 1 has not fallen; answers to held-out questions are no better" in str(error.value)


def test_chance_does_not_know_the_answer_of_the_question_itself() -> None:
    # of colours red is the most frequent; the one blue answer is frequent to no other question
    colours = [Answered("colour", str(i), answer, "") for i, answer in enumerate(("red", "red", "red", "blue"))]
    # four answers that occur once each: by hindsight one of them would be right
    places = [Answered("place", str(i), str(i), "") for i in range(4)]
    assert count_by_chance([*colours, *places, Answered("day", "0", "Monday", "")]) == 3


def test_joined_dialogues_have_all_media_in_their_order(training: Training) -> None:
    (joined,) = open_rows(str(training.data / "train_long.jsonl"))
    content = read_row(joined)
    assert isinstance(content, Dialogue)
    assert [message["role"] for message in content.messages] == ["user", "assistant"] * JOINED
    values = row_values(joined)
    assert values["audios"] == ["media/a.wav", "media/d.wav"] and values["videos"] == ["media/c.mp4"]


def test_joined_dialogues_are_far_from_each_other() -> None:
    rows = [row("colour", f"question {i}", f"answer {i}") for i in range(2 * JOINED + 1)]
    first, second = join_dialogues(rows)
    questions = [message["content"] for message in first["messages"][::2]]
    assert questions == ["question 0", "question 2", "question 4", "question 6"]
    assert second["messages"][0]["content"] == "question 1"


def test_score_counts_words_and_not_their_case() -> None:
    answered = [
        Answered("colour", "1", "The star is red.", "the star is red"),
        Answered("colour", "2", "The star is red.", "The star is blue."),
        Answered("count", "3", "There are two stars.", "There are 2 stars"),
    ]
    assert score(answered) == {"colour": Score(1, 2), "count": Score(1, 1)}


def test_interval_is_that_of_wilson() -> None:
    # Wilson's formula for 8 of 10, by hand
    low, high = Score(8, 10).interval
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)


def test_asks_so_many_of_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(model: object, prompts: Sequence[Any], **options: object) -> list[str]:
        asked.extend(prompts)
        return [f"answer {number}" for number in range(len(prompts))]

    monkeypatch.setattr(omni_jax, "load", lambda *args, **options: None)
    monkeypatch.setattr(score_world, "answer", answer)
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS, *ROWS, ROWS[3]])
    answered = ask(Options(tmp_path, rows, most=1))
    assert [a.task for a in answered] == ["transcribe", "colour", "order-voice", "day"]
    assert [a.expected for a in answered] == [values["messages"][1]["content"] for values in ROWS]
    assert [a.answer for a in answered] == ["answer 0", "answer 1", "answer 2", "answer 3"]
    assert all(prompt[-1]["role"] == "user" for prompt in asked)


def test_rows_without_a_task_are_named(tmp_path: Path) -> None:
    values = {key: value for key, value in ROWS[3].items() if key != "task"}
    rows = write_rows(tmp_path / "rows.jsonl", [ROWS[3], values])
    with pytest.raises(InputError, match=r"rows.jsonl.*2.*has no task"):
        ask(Options(tmp_path, rows))


def test_no_rows_are_no_request(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--most.* 0"):
        ask(Options(tmp_path, write_rows(tmp_path / "rows.jsonl", ROWS), most=0))
