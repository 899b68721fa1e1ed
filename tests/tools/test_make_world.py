"""The small world: what it draws, what it asks, and what it holds out."""

import dataclasses
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import ImageColor

from omni_jax.data.rows import Dialogue, read_row, row_values
from omni_jax.data.sources import open_rows
from omni_jax.errors import InputError
from tests.tools.tone_world import ToneSpeaker
from tools import make_world as tool
from tools.world.captions import capitalize, describe_medium
from tools.world.items import PARTS, Item, Picture, Spoken, Video, part_of
from tools.world.pictures import FRAME_RATE, SIDE, Ground, Thing, draw_picture
from tools.world.sounds import EFFECT_SECONDS, Placed, make_effect, mix_track
from tools.world.tasks import ONLY_NAMED, SEGMENT_SECONDS, STYLES, Artist
from tools.world.vocabulary import COLOURS, EFFECTS, SHAPES, SIGNS, nearest_colour


@pytest.fixture(autouse=True)
def speaks_in_tones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "Speaker", ToneSpeaker)


@pytest.fixture
def artist() -> Artist:
    return Artist(np.random.default_rng(0), STYLES["train"], ("slt",))


def test_parts_share_no_combination(tmp_path: Path) -> None:
    options = tool.Options(tmp_path, voices=("slt", "awb"))
    keys = {}
    for part in PARTS:
        items = tool.draw_items(options, part, 12)
        keys[part] = {item.key for item in items}
        assert all(part_of(item.key) == part for item in items)
        if part == "train":
            # a held-out pair of colour and shape is in no picture of training either
            assert all(part_of(key) == "train" for item in items for key in item.seen)
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["valid"] and not keys["valid"] & keys["test"]
    # another seed asks other things, of the same part
    others = tool.draw_items(tool.Options(tmp_path, seed=7), "test", 12)
    assert {part_of(item.key) for item in others} == {"test"}
    assert {item.key for item in others} != keys["test"]


def test_every_task_has_items_of_every_part(tmp_path: Path) -> None:
    names = set(Artist(np.random.default_rng(0), STYLES["train"], ("slt",)).tasks) - {*ONLY_NAMED}
    for part in PARTS:
        assert {item.task.removesuffix("-voice") for item in tool.draw_items(tool.Options(tmp_path), part, 1)} == names


def test_answers_are_balanced(artist: Artist) -> None:
    """No answer is so frequent that guessing it pays."""
    for task, most in (("colour", 0.25), ("shape", 0.25), ("place", 0.4), ("count", 0.3), ("direction", 0.4)):
        answers = [artist.tasks[task]().turns[-1].answer for _ in range(200)]
        words = "left right up down top bottom middle one two three four five six".split()
        if task == "colour":
            words = list(COLOURS)
        elif task == "shape":
            words = list(SHAPES)
        counts = [sum(f"{word}" in answer.rstrip(".").split() for answer in answers) for word in words]
        assert max(counts) / len(answers) < most, task


def test_a_thing_has_its_colour() -> None:
    for colour, value in COLOURS.items():
        pixels = draw_picture([Thing("circle", colour, 0.3, 0.6)], Ground(20))
        assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8
        assert tuple(pixels[round(0.6 * SIDE), round(0.3 * SIDE)]) == value
        assert tuple(pixels[5, 5]) == (20, 20, 20)
    ring = draw_picture([Thing("ring", "red", 0.5, 0.5)], Ground(20))
    assert tuple(ring[SIDE // 2, SIDE // 2]) == (20, 20, 20)


def test_shapes_differ() -> None:
    drawn = [draw_picture([Thing(shape, "white", 0.5, 0.5)], Ground(0)).astype(float) for shape in SHAPES]
    for index, one in enumerate(drawn):
        for other in drawn[:index]:
            # a hundredth of the picture's pixels are others, at least
            assert np.mean(np.abs(one - other).max(-1) > 100) > 0.01


def test_effects_differ_and_mix() -> None:
    spectra = []
    for name in EFFECTS:
        samples = make_effect(name, 1.0, 0)
        assert len(samples) == EFFECT_SECONDS * 16_000 and np.abs(samples).max() <= 0.5
        spectrum = np.abs(np.fft.rfft(samples))
        spectra.append(spectrum / np.linalg.norm(spectrum))
    for index, one in enumerate(spectra):
        assert all(one @ other < 0.5 for other in spectra[:index])
    with pytest.raises(ValueError, match="trumpet"):
        make_effect("trumpet", 1.0, 0)
    track = mix_track(2.0, [Placed(1.0, make_effect("drum", 1.0, 0))], 0.001, 0)
    assert len(track) == 32_000
    assert np.abs(track[:15_000]).max() < 0.01 < np.abs(track[16_000:20_000]).max()


def _asked_segment(item: Item, video: Video) -> int:
    """The segment in which the sound that is asked for is, as told by the picture of the answer."""
    answer = item.turns[0].answer.rstrip(".").split()[-1]
    colours = [picture.things[0].colour for picture in video.frames[:: round(SEGMENT_SECONDS * FRAME_RATE)]]
    return colours.index(answer)


def test_the_time_of_a_sound_says_which_colour_is_meant(artist: Artist) -> None:
    for _ in range(50):
        item = artist.colour_at_sound()
        video = item.turns[0].media[0]
        assert isinstance(video, Video) and video.sounds is not None
        start = video.sounds[0][0]
        segment = _asked_segment(item, video)
        # the whole sound is in the time of its picture, and not at its edge
        assert segment * SEGMENT_SECONDS + 0.3 < start
        assert start + EFFECT_SECONDS + 0.3 < (segment + 1) * SEGMENT_SECONDS
        # the same pictures with the sound elsewhere have another answer, so it cannot be read off them
        assert len({picture.things[0].colour for picture in video.frames}) == 3


def test_moments_ask_about_every_sound_of_a_video(artist: Artist) -> None:
    for _ in range(50):
        item = artist.moments()
        video = item.turns[0].media[0]
        assert isinstance(video, Video) and video.sounds is not None
        answers = set()
        for start, sound in video.sounds:
            segment = int(start // SEGMENT_SECONDS)
            thing = video.frames[round(start * FRAME_RATE)].things[0]
            ordinal = ("first", "second", "last")[segment]
            if isinstance(sound, Spoken):
                question = f"Which word was said while the {thing.shape} was there?"
                named = [frame.things[0].shape for frame in video.frames[:: round(SEGMENT_SECONDS * FRAME_RATE)]]
                words = [spoken.text for _, spoken in video.sounds if isinstance(spoken, Spoken)]
                told = [f"with the {shape} {word}" for shape, word in zip(named, words, strict=True)]
                answers.add((question, capitalize(f"{', '.join(told)}, so {told[segment]}")))
            else:
                question = f"What colour was the {thing.shape} when the {sound.name} came?"
                answers.add((question, f"The {ordinal} {thing.shape} was {thing.colour}."))
        assert {(turn.question, turn.answer) for turn in item.turns} == answers
        assert len(item.turns) == len(video.sounds)
        # each question alone has a key, and in training none of them may be held out
        assert sum(key.startswith(("at ", "said ")) for key in (item.key, *item.seen)) == len(item.turns)


def test_shapes_are_shown_in_colours_that_are_not_named(artist: Artist) -> None:
    shown = set()
    for _ in range(50):
        item = artist.shapes()
        picture = item.turns[0].media[0]
        assert isinstance(picture, Picture)
        words = item.turns[0].answer.lower().rstrip(".").split()
        assert not set(words) & set(COLOURS)
        # in training the pair that each looks most like is not a held-out one
        nearest = {f"{nearest_colour(thing.colour)} {thing.shape}" for thing in picture.things}
        assert set(item.seen) == nearest
        shown |= {ImageColor.getrgb(thing.colour) for thing in picture.things}
    assert not shown & set(COLOURS.values()) and all(max(colour) > 140 for colour in shown)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_named_colour_is_the_nearest_to_itself(colour: str) -> None:
    red, green, blue = COLOURS[colour]
    assert nearest_colour(f"#{red:02x}{green:02x}{blue:02x}") == colour


def test_rows_can_be_read_and_made_again(tmp_path: Path) -> None:
    options = tool.Options(tmp_path / "a", items=1, split="test", voices=("slt",), seed=3)
    tool.make_world(options)
    for source in open_rows(str(options.out / "test.jsonl")):
        assert isinstance(read_row(source), Dialogue)
        row = row_values(source)
        for kind in ("images", "audios", "videos"):
            for file in row.get(kind, ()):
                assert (options.out / file).exists()
        assert ("<audio>" in row["messages"][0]["content"]) == ("audios" in row)
    again = tool.Options(tmp_path / "b", items=1, split="test", voices=("slt",), seed=3)
    tool.make_world(again)
    files = sorted(path.relative_to(options.out) for path in options.out.rglob("*.*"))
    assert files == sorted(path.relative_to(again.out) for path in again.out.rglob("*.*"))
    assert [file for file in files if (options.out / file).read_bytes() != (again.out / file).read_bytes()] == []
    # what is there is kept, and what was lost is made again
    kept = options.out / files[0]
    kept.unlink()
    tool.make_world(options)
    assert kept.read_bytes() == (again.out / files[0]).read_bytes()


def test_a_question_in_text_says_what_media_hold(tmp_path: Path) -> None:
    options = tool.Options(tmp_path, items=1, split="valid", in_text=True, seed=1)
    tool.make_world(options)
    rows = {row_values(row)["task"]: row_values(row) for row in open_rows(str(tmp_path / "valid.jsonl"))}
    # a question by voice would be the same as that in text
    assert not [task for task in rows if "-voice" in task]
    assert not list((tmp_path / "media").iterdir())
    for row in rows.values():
        words = " ".join(message["content"] for message in row["messages"] if message["role"] == "user")
        assert "<" not in words and not {"audios", "images", "videos"} & row.keys()
    for task in ("transcribe", "describe", "narrate"):
        question, answer = (message["content"] for message in rows[f"{task}-text"]["messages"])
        assert question.startswith(answer)
    for task in ("colour", "order", "colour-at-sound", "word-at-shape", "sign"):
        question, answer = (message["content"] for message in rows[f"{task}-text"]["messages"])
        # what is answered is in what stands for the medium
        medium = question.split(".")[0].lower().replace(",", "").split()
        named = [word for word in answer.rstrip(".").split() if word in (*COLOURS, *SHAPES, *SIGNS)]
        assert named and set(named) <= set(medium)
    direction = rows["direction-text"]["messages"]
    assert direction[1]["content"].split("moves ")[1].rstrip(".") in direction[0]["content"].split(".")[0]


def test_the_article_follows_the_colour() -> None:
    things = [Thing("star", "orange", 0.2, 0.5), Thing("ring", "blue", 0.5, 0.2)]
    picture = Picture(tuple(things), Ground())
    assert describe_medium(picture) == "An orange star on the left and a blue ring at the top."
    three = Picture((*things, Thing("ring", "blue", 0.5, 0.8)), Ground())
    assert describe_medium(three) == "Two blue rings and one orange star."
    assert describe_medium(Picture((), Ground(), "dog")) == "Nothing and the word dog."


def test_some_answers_are_spoken_and_all_else_stays(tmp_path: Path) -> None:
    options = dict(items=40, split="train", tasks=("opposite",), voices=("slt", "awb"), seed=3)
    silent = tool.draw_items(tool.Options(tmp_path, **options), "train", 40)
    items = tool.draw_items(tool.Options(tmp_path, spoken=0.5, **options), "train", 40)
    assert silent == [dataclasses.replace(item, reply=None) for item in items]
    replies = [item.reply for item in items if item.reply]
    assert 0.3 < len(replies) / len(items) < 0.7
    assert {reply.voice for reply in replies} == {"slt", "awb"}
    for item in items:
        assert item.reply is None or item.reply.text == item.turns[-1].answer

    # also of questions whose media are told in words
    for in_text in (False, True):
        out = tmp_path / str(in_text)
        tool.make_world(tool.Options(out, **{**options, "items": 2}, spoken=1.0, in_text=in_text))
        for source in open_rows(str(out / "train.jsonl")):
            reply = row_values(source)["reply"]
            assert reply["voice"] in ("slt", "awb") and (out / reply["audio"]).exists()


def test_shuffled_words_are_of_answers_and_made_where_they_are_named(tmp_path: Path) -> None:
    tasks = {item.task for item in tool.draw_items(tool.Options(tmp_path, items=1, voiced=0.0), "train", 1)}
    assert "shuffled" not in tasks and "words" in tasks
    options = tool.Options(tmp_path, items=200, tasks=("shuffled",))
    items = tool.draw_items(options, "train", 200)
    # in the order of the answer, too, they are none that is held out
    assert all(part_of(key) == "train" for item in items for key in (item.key, *item.seen))
    assert all(item.seen for item in items)
    texts = [item.turns[0].answer for item in items]
    words = [word for text in texts for word in text.rstrip(".").lower().split()]
    assert all(2 <= len(text.split()) <= 7 for text in texts)
    assert {"the", "is", "came"} <= set(words)
    # an order that no answer has
    assert any("the is" in text.lower() for text in texts)


def test_other_options_in_the_same_folder_keep_their_media_apart(tmp_path: Path) -> None:
    """More items of the first tasks move those behind them; each row still names its own media."""
    few = tool.Options(tmp_path / "a", items=1, split="test", tasks=("colour", "count"), voices=("slt",))
    more = tool.Options(tmp_path / "a", items=2, split="test", tasks=("colour", "count"), voices=("slt",))
    alone = tool.Options(tmp_path / "b", items=2, split="test", tasks=("colour", "count"), voices=("slt",))
    for options in (few, more, alone):
        tool.make_world(options)
    assert (more.out / "test.jsonl").read_bytes() == (alone.out / "test.jsonl").read_bytes()
    for path in alone.out.glob("media/*"):
        assert path.read_bytes() == (more.out / "media" / path.name).read_bytes()


def test_videos_have_their_length_and_their_sound(tmp_path: Path) -> None:
    options = tool.Options(tmp_path, items=1, split="train", tasks=("word-at-shape", "repeats"), voices=("slt",))
    tool.make_world(options)
    expected = {"word-at-shape": (6.0, 1), "repeats": (8.0, 0)}
    for source in open_rows(str(tmp_path / "train.jsonl")):
        row = row_values(source)
        seconds, tracks = expected[row["task"].removesuffix("-voice")]
        with av.open(str(tmp_path / row["videos"][0])) as container:
            assert len(container.streams.audio) == tracks
            times = [frame.time for frame in container.decode(video=0)]
        assert len(times) == seconds * FRAME_RATE and times[1] == pytest.approx(1 / FRAME_RATE)


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"taste.*there are transcribe"):
        tool.make_world(tool.Options(tmp_path, tasks=("taste",)))
    with pytest.raises(InputError, match="items"):
        tool.make_world(tool.Options(tmp_path, items=0))
    with pytest.raises(InputError, match="voiced"):
        tool.make_world(tool.Options(tmp_path, voiced=2))
    assert not list(tmp_path.iterdir())
