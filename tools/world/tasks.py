"""The tasks of the small world: each draws a question with its media and its answer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from omni_jax.processing.read_aloud import QUESTION
from tools.world import texts
from tools.world.captions import capitalize, describe_medium, name_place
from tools.world.draws import draw, draw_colour, sample
from tools.world.items import Effect, Item, Medium, Part, Picture, Spoken, Turn, Video
from tools.world.pictures import FRAME_RATE, Ground, Thing
from tools.world.questions import ORDINALS, ask_about_events, ask_about_things, ask_for_colour, ask_for_word
from tools.world.sounds import EFFECT_SECONDS
from tools.world.vocabulary import (
    COLOURS,
    DAYS,
    DIRECTIONS,
    EFFECTS,
    NAMES,
    NUMBERS,
    OPPOSITES,
    PLACES,
    SHAPES,
    SIGNS,
    WORDS,
    nearest_colour,
    plural,
)

SEGMENT_SECONDS = 2.0  # that each thing of a video with several is shown
_SEGMENTS = 3
_WORD_SECONDS = 0.7  # kept free for a word, which takes some 0.6; until the edge it has a second and more
_EDGE = 0.4  # seconds between a sound and the next change of the picture
_APART = tuple(place for place in PLACES if place != "middle")  # things at these do not touch
# tasks that are not asked by voice: what is said is asked for already, or they are there to learn from
NOT_VOICED = ("transcribe", "phrase", "read", "list", "hear", "watch", "moments", "words", "shapes", "shuffled")
ONLY_NAMED = ("shuffled",)  # made where they are asked for by name: the Talker learns from them, and nobody is examined


@dataclass(frozen=True)
class Style:
    """How things are drawn and spoken in a part of the data."""

    rates: tuple[float, ...]
    """Of speech."""
    radii: tuple[float, float]
    """Of things, in widths of the picture: the smallest and the largest."""
    levels: tuple[int, ...]
    """Of the ground."""
    pitches: tuple[float, ...]
    """Of sound effects."""


_HELD_OUT = Style(rates=(0.95, 1.05), radii=(0.12, 0.15), levels=(16, 34), pitches=(0.96, 1.04))
STYLES: dict[Part, Style] = {
    "train": Style(rates=(0.9, 1.0, 1.1), radii=(0.11, 0.16), levels=(8, 24, 44), pitches=(0.92, 1.0, 1.08)),
    "valid": _HELD_OUT,
    "test": _HELD_OUT,
}


class Artist:
    """Draws items of every task from one source of random numbers."""

    def __init__(self, rng: np.random.Generator, style: Style, voices: Sequence[str]) -> None:
        self._rng = rng
        self._style = style
        self._voices = tuple(voices)
        self.tasks: dict[str, Callable[[], Item]] = {
            "transcribe": self.transcribe,
            "phrase": self.phrase,
            "effect": self.effect,
            "describe": self.describe,
            "narrate": self.narrate,
            "colour": self.colour,
            "shape": self.shape,
            "count": self.count,
            "place": self.place,
            "order": self.order,
            "direction": self.direction,
            "repeats": self.repeats,
            "sign": self.sign,
            "colour-at-sound": self.colour_at_sound,
            "word-at-shape": self.word_at_shape,
            "opposite": partial(texts.opposite, rng),
            "day": partial(texts.day, rng),
            "owner": partial(texts.owner, rng),
            "dialogue": self.dialogue,
            "list": partial(texts.word_list, rng),
            "read": self.read,
            "hear": self.hear,
            "picture-dialogue": self.picture_dialogue,
            "video-dialogue": self.video_dialogue,
            "watch": self.watch,
            "words": self.words,
            "moments": self.moments,
            "shapes": self.shapes,
            "shuffled": self.shuffled,
        }

    # draws

    def draw_voice(self) -> tuple[str, float]:
        """A voice and a rate."""
        return draw(self._rng, self._voices), draw(self._rng, self._style.rates)

    def _say(self, text: str) -> Spoken:
        voice, rate = self.draw_voice()
        return Spoken(text, voice, rate)

    def _ground(self) -> Ground:
        return Ground(
            draw(self._rng, self._style.levels), float(self._rng.uniform(0, 6)), int(self._rng.integers(2**31))
        )

    def _thing(self, shape: str, colour: str, place: tuple[float, float], room: float = 0.04) -> Thing:
        """A thing about a place; room is how far from it, in widths of the picture."""
        x, y = place
        return Thing(
            shape,
            colour,
            x + float(self._rng.uniform(-room, room)),
            y + float(self._rng.uniform(-room, room)),
            float(self._rng.uniform(*self._style.radii)),
            float(self._rng.uniform(-0.25, 0.25)),
        )

    def _effect(self, name: str) -> Effect:
        return Effect(name, draw(self._rng, self._style.pitches), int(self._rng.integers(2**31)))

    def _time_in(self, segment: int, length: float) -> float:
        """When a sound starts that is in one segment of a video with its whole length."""
        latest = SEGMENT_SECONDS - _EDGE - length
        return segment * SEGMENT_SECONDS + float(self._rng.uniform(_EDGE, max(latest, _EDGE)))

    # sounds

    def _sentence(self) -> str:
        colour = draw(self._rng, tuple(COLOURS))
        shape = draw(self._rng, SHAPES)
        animal = draw(self._rng, SIGNS)
        count = int(self._rng.integers(2, len(NUMBERS) + 1))
        day = draw(self._rng, DAYS)
        other = draw(self._rng, SIGNS)
        sentences = (
            f"The {colour} {shape} is {name_place(draw(self._rng, tuple(PLACES)))}.",
            f"There are {NUMBERS[count - 1]} {colour} {plural(shape, count)}.",
            f"{draw(self._rng, NAMES)} saw a {animal} on {day}.",
            f"The {draw(self._rng, draw(self._rng, OPPOSITES))} {animal} is near the {colour} {shape}.",
            f"The {draw(self._rng, EFFECTS)} came, and the {animal} followed the {other}.",
            f"On {day} {draw(self._rng, NAMES)} painted the {shape} {colour}.",
        )
        return draw(self._rng, sentences)

    def transcribe(self) -> Item:
        """A sentence that is heard."""
        sentence = self._sentence()
        return Item("transcribe", sentence, (self._ask_what_is_spoken(sentence),))

    def _ask_what_is_spoken(self, text: str) -> Turn:
        return Turn(draw(self._rng, ("What is said?", "Write down what you hear.")), text, (self._say(text),))

    def phrase(self) -> Item:
        """One to three words that are heard, in any order, so that no word follows from the others."""
        text = self._phrase()
        return Item("phrase", text, (self._ask_what_is_spoken(text),))

    def _phrase(self, least: int = 1, most: int = 3) -> str:
        return capitalize(" ".join(sample(self._rng, WORDS, int(self._rng.integers(least, most + 1)))))

    def words(self) -> Item:
        """One to six words that are heard. Whoever speaks them finds each next one in the text alone."""
        text = self._phrase(1, 6)
        return Item("words", text, (self._ask_what_is_spoken(text),))

    def effect(self) -> Item:
        """Which of three effects came first, second or last; the video shows nothing, and only keeps the time."""
        effects = sample(self._rng, EFFECTS, _SEGMENTS)
        which = int(self._rng.integers(_SEGMENTS))
        sounds = tuple(
            (self._time_in(segment, EFFECT_SECONDS), self._effect(name)) for segment, name in enumerate(effects)
        )
        video = Video(tuple(self._in_turn([()] * _SEGMENTS, self._ground())), sounds)
        answer = f"The {effects[which]} came {ORDINALS[which]}."
        turn = Turn(f"Which sound came {ORDINALS[which]}?", answer, (video,))
        return Item("effect", f"sound {which} {' '.join(effects)}", (turn,))

    # pictures

    def _picture(self, things: Sequence[Thing]) -> Picture:
        return Picture(tuple(things), self._ground())

    def _two_things(self) -> tuple[list[Thing], list[str], list[str], list[str]]:
        """Two things that differ in shape, colour and place."""
        shapes = sample(self._rng, SHAPES, 2)
        colours = sample(self._rng, tuple(COLOURS), 2)
        places = sample(self._rng, _APART, 2)
        things = [
            self._thing(shape, colour, PLACES[place])
            for shape, colour, place in zip(shapes, colours, places, strict=True)
        ]
        return things, shapes, colours, places

    def colour(self) -> Item:
        """The colour of one of two things."""
        things, shapes, colours, _ = self._two_things()
        question = draw(self._rng, (f"What colour is the {shapes[0]}?", f"Which colour has the {shapes[0]}?"))
        turn = Turn(question, f"The {shapes[0]} is {colours[0]}.", (self._picture(things),))
        return Item("colour", f"{colours[0]} {shapes[0]}", (turn,), (f"{colours[1]} {shapes[1]}",))

    def shape(self) -> Item:
        """The shape of one of two things."""
        things, shapes, colours, _ = self._two_things()
        question = draw(self._rng, (f"What is {colours[0]}?", f"Which shape is {colours[0]}?"))
        turn = Turn(question, f"The {shapes[0]} is {colours[0]}.", (self._picture(things),))
        return Item("shape", f"{colours[0]} {shapes[0]}", (turn,), (f"{colours[1]} {shapes[1]}",))

    def place(self) -> Item:
        """Where one of two things is."""
        things, shapes, colours, places = self._two_things()
        name = f"{colours[0]} {shapes[0]}"
        question = draw(self._rng, (f"Where is the {shapes[0]}?", f"Where is the {name}?"))
        turn = Turn(question, f"The {name} is {name_place(places[0])}.", (self._picture(things),))
        return Item("place", f"{places[0]} {name}", (turn,), (name, f"{colours[1]} {shapes[1]}"))

    def describe(self) -> Item:
        """All that a picture shows: two things and their places, or numbers of two kinds of things."""
        if self._rng.random() < 0.5:
            things, shapes, colours, _ = self._two_things()
        else:
            shapes = sample(self._rng, SHAPES, 2)
            colours = sample(self._rng, tuple(COLOURS), 2)
            counts = [int(self._rng.integers(1, len(NUMBERS) + 1)), int(self._rng.integers(0, 3))]
            things = self._scatter(shapes, colours, counts)
        picture = self._picture(things)
        answer = describe_medium(picture)
        turn = Turn(draw(self._rng, ("What do you see?", "Describe the picture.")), answer, (picture,))
        seen = tuple(f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True))
        return Item("describe", answer, (turn,), seen)

    def shapes(self) -> Item:
        """The shapes of a picture whose colours have no name, so that a shape is learned apart from its colours."""
        (described,) = self.describe().turns[0].media
        assert isinstance(described, Picture)
        colours = {thing.colour: draw_colour(self._rng) for thing in described.things}
        things = [dataclasses.replace(thing, colour=colours[thing.colour]) for thing in described.things]
        picture = Picture(tuple(things), described.ground)
        answer = describe_medium(picture)
        turn = Turn(draw(self._rng, ("Which shapes do you see?", "Name the shapes.")), answer, (picture,))
        # each counts as the colour that it is nearest to, so that nothing like a held-out pair is in training
        seen = {f"{nearest_colour(colours[thing.colour])} {thing.shape}" for thing in described.things}
        return Item("shapes", answer, (turn,), tuple(sorted(seen)))

    def _scatter(self, shapes: Sequence[str], colours: Sequence[str], counts: Sequence[int]) -> list[Thing]:
        """Numbers of things of several kinds, in cells of three rows and columns."""
        cells = [(0.17 + 0.33 * (cell % 3), 0.17 + 0.33 * (cell // 3)) for cell in range(9)]
        kinds: list[tuple[str, str]] = []
        for shape, colour, count in zip(shapes, colours, counts, strict=True):
            kinds += [(shape, colour)] * count
        places = sample(self._rng, cells, len(kinds))
        return [self._thing(*kind, place, 0.015) for kind, place in zip(kinds, places, strict=True)]

    def count(self) -> Item:
        """How many things of a kind there are, among some of another."""
        shape, other = sample(self._rng, SHAPES, 2)
        colour, other_colour = sample(self._rng, tuple(COLOURS), 2)
        count = int(self._rng.integers(1, len(NUMBERS) + 1))
        things = self._scatter((shape, other), (colour, other_colour), (count, int(self._rng.integers(0, 3))))
        question = draw(self._rng, (f"How many {plural(shape, 2)} are there?", f"Count the {plural(shape, 2)}."))
        verb = "is" if count == 1 else "are"
        answer = f"There {verb} {NUMBERS[count - 1]} {colour} {plural(shape, count)}."
        turn = Turn(question, answer, (self._picture(things),))
        return Item("count", f"{count} {colour} {shape}", (turn,), (f"{colour} {shape}", f"{other_colour} {other}"))

    # silent videos

    def _in_turn(self, pictures: Sequence[tuple[Thing, ...]], ground: Ground) -> list[Picture]:
        frames: list[Picture] = []
        for things in pictures:
            frames += [Picture(things, ground)] * round(SEGMENT_SECONDS * FRAME_RATE)
        return frames

    def order(self) -> Item:
        """Which of three shapes came first, second or last."""
        shapes = sample(self._rng, SHAPES, _SEGMENTS)
        colours = sample(self._rng, tuple(COLOURS), _SEGMENTS)
        things = [(self._thing(*kind, (0.5, 0.5), 0.2),) for kind in zip(shapes, colours, strict=True)]
        which = int(self._rng.integers(_SEGMENTS))
        video = Video(tuple(self._in_turn(things, self._ground())))
        turn = Turn(f"Which shape came {ORDINALS[which]}?", f"The {shapes[which]} came {ORDINALS[which]}.", (video,))
        seen = tuple(f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True))
        return Item("order", f"order {which} {' '.join(shapes)}", (turn,), seen)

    def direction(self) -> Item:
        """Which way a thing moves."""
        shape = draw(self._rng, SHAPES)
        colour = draw(self._rng, tuple(COLOURS))
        way = draw(self._rng, tuple(DIRECTIONS))
        columns, rows = DIRECTIONS[way]
        start = self._thing(shape, colour, (0.5 - 0.32 * columns, 0.5 - 0.32 * rows), 0.05)
        ground = self._ground()
        count = 4 * FRAME_RATE
        frames = []
        for index in range(count):
            moved = 0.62 * index / (count - 1)
            thing = Thing(shape, colour, start.x + moved * columns, start.y + moved * rows, start.radius, start.angle)
            frames.append(Picture((thing,), ground))
        answer = f"The {shape} moves {way}." if way in ("up", "down") else f"The {shape} moves to the {way}."
        question = draw(self._rng, (f"Which way does the {shape} move?", f"Where does the {shape} go?"))
        turn = Turn(question, answer, (Video(tuple(frames)),))
        return Item("direction", f"move {way} {colour} {shape}", (turn,), (f"{colour} {shape}",))

    def repeats(self) -> Item:
        """How often a thing appears: a second each time, with a second between."""
        shape = draw(self._rng, SHAPES)
        colour = draw(self._rng, tuple(COLOURS))
        count = int(self._rng.integers(1, 5))
        ground = self._ground()
        shown = sorted(sample(self._rng, range(4), count))
        frames: list[Picture] = []
        for slot in range(4):
            thing = self._thing(shape, colour, (0.5, 0.5), 0.2)
            frames += [Picture((), ground)] * FRAME_RATE
            frames += [Picture((thing,) if slot in shown else (), ground)] * FRAME_RATE
        times = ("once", "two times", "three times", "four times")[count - 1]
        turn = Turn(f"How often does the {shape} appear?", f"The {shape} appears {times}.", (Video(tuple(frames)),))
        return Item("repeats", f"repeats {count} {colour} {shape}", (turn,), (f"{colour} {shape}",))

    def sign(self) -> Item:
        """Which word is drawn for a second."""
        word = draw(self._rng, SIGNS)
        shape = draw(self._rng, SHAPES)
        colour = draw(self._rng, tuple(COLOURS))
        ground = self._ground()
        thing = self._thing(shape, colour, PLACES[draw(self._rng, ("top", "bottom"))], 0.05)
        second = int(self._rng.integers(1, 4))
        frames: list[Picture] = []
        for index in range(5):
            frames += [Picture((thing,), ground, word if index == second else "")] * FRAME_RATE
        turn = Turn("Which word is shown?", f"The word is {word}.", (Video(tuple(frames)),))
        return Item("sign", f"sign {word} {colour} {shape}", (turn,), (f"{colour} {shape}",))

    def watch(self) -> Item:
        """All that happens in a silent video of one of the tasks above."""
        item = draw(self._rng, (self.order, self.direction, self.repeats, self.sign))()
        (video,) = item.turns[0].media
        assert isinstance(video, Video)
        answer = describe_medium(video)
        return Item("watch", answer, (self._ask_what_happens(answer, video),), item.seen)

    def _ask_what_happens(self, answer: str, video: Video) -> Turn:
        return Turn(draw(self._rng, ("What happens?", "Tell what happens.")), answer, (video,))

    # videos with sound: only the time says which is meant

    def narrate(self) -> Item:
        """All that happens in a video, in turn: what is there, with the effect or the word that is heard."""
        video, shapes, colours, _ = self._draw_events()
        answer = describe_medium(video)
        turn = self._ask_what_happens(answer, video)
        seen = tuple(f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True))
        return Item("narrate", answer, (turn,), seen)

    def _draw_events(self) -> tuple[Video, list[str], list[str], list[str]]:
        """A video of several things, with the shape and the colour of each and what is heard with it, if anything."""
        shapes = sample(self._rng, SHAPES, _SEGMENTS)
        colours = sample(self._rng, tuple(COLOURS), _SEGMENTS)
        names = [draw(self._rng, (*EFFECTS, *sample(self._rng, SIGNS, len(EFFECTS)), "")) for _ in range(_SEGMENTS)]
        sounds: list[tuple[float, Effect | Spoken]] = []
        for segment, name in enumerate(names):
            if name in EFFECTS:
                sounds.append((self._time_in(segment, EFFECT_SECONDS), self._effect(name)))
            elif name:
                sounds.append((self._time_in(segment, _WORD_SECONDS), self._say(name)))
        things = [(self._thing(*kind, (0.5, 0.5), 0.2),) for kind in zip(shapes, colours, strict=True)]
        video = Video(tuple(self._in_turn(things, self._ground())), tuple(sounds))
        return video, shapes, colours, names

    def colour_at_sound(self) -> Item:
        """What colour was on screen when an effect sounded, beside another effect at another time."""
        shape = draw(self._rng, SHAPES)
        colours = sample(self._rng, tuple(COLOURS), _SEGMENTS)
        effect, other = sample(self._rng, EFFECTS, 2)
        segments = sample(self._rng, range(_SEGMENTS), 2)
        things = [(self._thing(shape, colour, (0.5, 0.5), 0.1),) for colour in colours]
        sounds = tuple(
            (self._time_in(segment, EFFECT_SECONDS), self._effect(name))
            for name, segment in zip((effect, other), segments, strict=True)
        )
        video = Video(tuple(self._in_turn(things, self._ground())), sounds)
        key, turn = ask_for_colour(effect, segments[0], [thing for (thing,) in things])
        seen = tuple(f"{colour} {shape}" for colour in colours)
        return Item("colour-at-sound", key, (dataclasses.replace(turn, media=(video,)),), seen)

    def word_at_shape(self) -> Item:
        """Which word was said while a shape was there."""
        shapes = sample(self._rng, SHAPES, _SEGMENTS)
        colours = sample(self._rng, tuple(COLOURS), _SEGMENTS)
        words = sample(self._rng, SIGNS, _SEGMENTS)
        which = int(self._rng.integers(_SEGMENTS))
        things = [(self._thing(*kind, (0.5, 0.5), 0.1),) for kind in zip(shapes, colours, strict=True)]
        sounds = tuple((self._time_in(segment, _WORD_SECONDS), self._say(word)) for segment, word in enumerate(words))
        video = Video(tuple(self._in_turn(things, self._ground())), sounds)
        key, turn = ask_for_word(which, [thing for (thing,) in things], words)
        seen = tuple(f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True))
        return Item("word-at-shape", key, (dataclasses.replace(turn, media=(video,)),), seen)

    def moments(self) -> Item:
        """All that can be asked about a video of the two tasks above, in any order: one question for each sound."""
        item = draw(self._rng, (self.colour_at_sound, self.word_at_shape))()
        (video,) = item.turns[0].media
        assert isinstance(video, Video) and video.sounds is not None
        shown = [video.frames[round(segment * SEGMENT_SECONDS * FRAME_RATE)].things[0] for segment in range(_SEGMENTS)]
        asked = []
        for start, sound in video.sounds:
            segment = int(start // SEGMENT_SECONDS)
            if isinstance(sound, Effect):
                asked.append(ask_for_colour(sound.name, segment, shown))
            else:
                words = [sound.text for _, sound in video.sounds if isinstance(sound, Spoken)]
                asked.append(ask_for_word(segment, shown, words))
        shuffled = sample(self._rng, asked, len(asked))
        turns = [turn for _, turn in shuffled]
        turns[0] = dataclasses.replace(turns[0], media=(video,))
        (key, _), *others = shuffled
        return Item("moments", key, tuple(turns), (*item.seen, *(key for key, _ in others)))

    # text alone; more are in ``tools.world.texts``

    def read(self) -> Item:
        """A text that is to be read aloud."""
        text = self._sentence() if self._rng.random() < 0.7 else self._phrase()
        return Item("read", text, (Turn(QUESTION.replace("{text}", text), text),))

    # of other tasks

    def hear(self) -> Item:
        """A question or an answer of another task that is heard."""
        item = self._draw_voiced_item()
        text = draw(self._rng, (item.turns[0].question, item.turns[0].answer))
        return Item("hear", text, (self._ask_what_is_spoken(text),), (item.key, *item.seen))

    def shuffled(self) -> Item:
        """Up to seven words of another task's answer, in any order: all that answers have, such as "the" and "came"."""
        item = self._draw_voiced_item()
        first, *others = re.findall(r"\w+", item.turns[0].answer)
        words = [first if first in (*NAMES, *DAYS) else first.lower(), *others]
        text = capitalize(" ".join(sample(self._rng, words, int(self._rng.integers(2, 8)))))
        return Item("shuffled", text, (self._ask_what_is_spoken(text),), (item.key, *item.seen))

    def _draw_voiced_item(self) -> Item:
        return self.tasks[draw(self._rng, [name for name in self.tasks if name not in NOT_VOICED])]()

    # two turns

    def dialogue(self) -> Item:
        """The colour of a thing, and then where it is."""
        things, shapes, colours, places = self._two_things()
        name = f"{colours[0]} {shapes[0]}"
        turns = (
            Turn(f"What colour is the {shapes[0]}?", f"The {shapes[0]} is {colours[0]}.", (self._picture(things),)),
            Turn("And where is it?", f"It is {name_place(places[0])}."),
        )
        return Item("dialogue", f"{places[0]} {name}", turns, (name, f"{colours[1]} {shapes[1]}"))

    # several questions about the same medium: one that is encoded once then teaches several times as much

    def picture_dialogue(self) -> Item:
        """Some of all colours, shapes and places of two to four things are asked for."""
        count = int(self._rng.integers(2, 5))
        shapes = sample(self._rng, SHAPES, count)
        colours = sample(self._rng, tuple(COLOURS), count)
        places = sample(self._rng, _APART, count)
        things = [
            self._thing(shape, colour, PLACES[place])
            for shape, colour, place in zip(shapes, colours, places, strict=True)
        ]
        asked = ask_about_things(shapes, colours, places)
        seen = tuple(f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True))
        return self._ask_several("picture-dialogue", self._picture(things), asked, seen)

    def video_dialogue(self) -> Item:
        """Some of all that happens in a video, as ``narrate`` tells it, is asked for."""
        video, shapes, colours, names = self._draw_events()
        asked = ask_about_events(shapes, colours, names)
        seen = tuple(f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True))
        return self._ask_several("video-dialogue", video, asked, seen)

    def _ask_several(self, task: str, medium: Medium, asked: Sequence[Turn], seen: tuple[str, ...]) -> Item:
        turns = sample(self._rng, asked, 6)
        turns[0] = dataclasses.replace(turns[0], media=(medium,))
        key = " ".join(turn.answer for turn in turns)
        return Item(task, key, tuple(turns), seen)
