"""Makes a small world to learn and to be examined in: dialogues about pictures, sounds and videos, with their media.

    python tools/make_world.py out/world --items 400
    python tools/make_world.py out/exam --split test --items 50 --seed 7

Pictures and videos are drawn, sound effects are computed, and speech is that of flite's voices slt, rms and awb
(``apt install flite``) and hibari's heart (``pip install omni_jax[speech-data]``). A row is a dialogue in the format of
training (docs/data.md) with its ``task`` and its ``key``, the combination that it asks for; where a user speaks,
``voice`` says in whose voice. With ``--spoken`` some last answers are spoken, too, and their rows name the sound and
its voice as ``reply``. Which part a key belongs to follows from the key alone, so that items of any seed are held out
if they are of ``valid`` or ``test``; these are drawn and spoken with sizes, grounds, pitches and rates between those of
training, too. Tasks whose name ends with ``-voice`` are asked by voice. The same seed gives the same files, and a
command that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checks import check_float, check_int
from omni_jax.errors import InputError
from omni_jax.plain_files import replace_file
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.media import read_audio
from tools.command_errors import exit_on_error
from tools.make_speech import VOICES, Speaker, Utterance
from tools.world.captions import ask_in_text
from tools.world.items import PARTS, Effect, Item, Medium, Part, Picture, Spoken, Video, ask_by_voice, fits_part
from tools.world.pictures import FRAME_RATE, SOUND_RATE, draw_picture, write_picture, write_video
from tools.world.sounds import Placed, make_effect, mix_track
from tools.world.tasks import NOT_VOICED, ONLY_NAMED, STYLES, Artist

_MOST_DRAWS = 10_000  # of one item, until one is of the part asked for
_LOUDNESS = 0.6  # of the largest sample of what is said in a video
# by the kind of a medium: the field of a row that lists it, and its file's format
_FIELDS = {Spoken: "audios", Picture: "images", Video: "videos"}
_FORMATS = {Spoken: "wav", Picture: "png", Video: "mp4"}


@dataclass(frozen=True)
class Options:
    """What is made."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    items: int = 400
    """Of each task to train on; valid and test have a tenth of it, unless they are asked for by --split."""
    split: Part | None = None
    """Make this part alone, with all of --items."""
    tasks: tuple[str, ...] = ()
    """Names of tasks; without any all but shuffled, lists that nothing but speaking is learned from."""
    voiced: float = 0.25
    """Items asked by voice for each asked in text, of training; held-out ones are all asked both ways. With --in-text
    none is asked by voice: in words, its row would be the same as that of the question in text."""
    voices: tuple[str, ...] = VOICES
    """Of slt, rms, awb and heart."""
    in_text: bool = False
    """Write what pictures, sounds and videos hold in their place, so that nothing but text is asked."""
    spoken: float = 0.0
    """Share of the items whose last answer is spoken, too, also with --in-text."""
    seed: int = 0


def draw_items(options: Options, part: Part, count: int) -> list[Item]:
    """Items of a part, task by task.

    Args:
      options: tasks, voices and seed.
      part: of the data.
      count: of each task, asked in text.

    Raises:
      InputError: if a task is not known.
    """
    rng = np.random.default_rng((options.seed, PARTS.index(part)))
    artist = Artist(rng, STYLES[part], options.voices)
    unknown = sorted(set(options.tasks) - set(artist.tasks))
    if unknown:
        raise InputError(f"tasks: {', '.join(unknown)}; there are {', '.join(artist.tasks)}")
    items = []
    for name in options.tasks or [name for name in artist.tasks if name not in ONLY_NAMED]:
        can_be_voiced = not options.in_text and name not in NOT_VOICED
        for _ in range(count):
            item = _draw_item(artist, name, part)
            items.append(item)
            if can_be_voiced and (part != "train" or rng.random() < options.voiced):
                items.append(ask_by_voice(item, *artist.draw_voice()))
    if options.in_text:
        items = [ask_in_text(item) for item in items]
    return _speak_answers(items, options, part)


def _speak_answers(items: Sequence[Item], options: Options, part: Part) -> list[Item]:
    """The same items, some with a spoken answer; what else is in them does not depend on how many."""
    rng = np.random.default_rng((options.seed, PARTS.index(part), 1))
    artist = Artist(rng, STYLES[part], options.voices)
    spoken = []
    for item in items:
        reply = Spoken(item.turns[-1].answer, *artist.draw_voice())
        spoken.append(dataclasses.replace(item, reply=reply) if rng.random() < options.spoken else item)
    return spoken


def _draw_item(artist: Artist, task: str, part: Part) -> Item:
    for _ in range(_MOST_DRAWS):
        item = artist.tasks[task]()
        if fits_part(item, part):
            return item
    raise RuntimeError(f"task {task} has no item of {part}")


class MediaWriter:
    """Writes media, each to the file that ``media_file`` names."""

    def __init__(self, options: Options) -> None:
        """Loads the synthesizers.

        Raises:
          InputError: if one is missing.
        """
        self._out = options.out
        # texts alone need no synthesizer
        self._speaker = None if options.in_text and not options.spoken else Speaker(options.voices)
        (options.out / "media").mkdir(parents=True, exist_ok=True)

    def write(self, medium: Medium) -> None:
        """Writes a medium, unless it is there; what is said in a video has been written before."""
        file = media_file(medium)
        path = self._out / file
        if path.exists():
            return
        if isinstance(medium, Spoken):
            assert self._speaker is not None
            self._speaker.write(Utterance(Path(file), medium.text, medium.voice, medium.rate), path)
            return
        partial = path.with_name(f".{path.name}")
        if isinstance(medium, Picture):
            write_picture(partial, draw_picture(medium.things, medium.ground, medium.sign))
        else:
            write_video(partial, list(_draw_frames(medium)), self._mix(medium))
        partial.rename(path)

    def _mix(self, video: Video) -> np.ndarray | None:
        if video.sounds is None:
            return None
        placed = []
        for start, sound in video.sounds:
            if isinstance(sound, Effect):
                placed.append(Placed(start, make_effect(sound.name, sound.pitch, sound.seed)))
            else:
                placed.append(Placed(start, _read_speech(self._out / media_file(sound))))
        return mix_track(len(video.frames) / FRAME_RATE, placed, video.noise, len(placed))


def media_file(medium: Medium) -> str:
    """The file of a medium, relative to the folder. It is named after all that is in the medium.

    So files of other options can lie in the same folder, and none is taken for another.
    """
    digest = hashlib.sha256(repr(medium).encode()).hexdigest()[:20]
    return f"media/{digest}.{_FORMATS[type(medium)]}"


def _find_media(items: Sequence[Item]) -> tuple[list[Spoken], list[Picture | Video]]:
    """All that is said in items, in videos too, and all that is drawn, each once."""
    spoken: dict[Spoken, None] = {}
    drawn: dict[Picture | Video, None] = {}
    for item in items:
        if item.reply is not None:
            spoken[item.reply] = None
        for turn in item.turns:
            for medium in turn.media:
                if isinstance(medium, Spoken):
                    spoken[medium] = None
                    continue
                drawn[medium] = None
                if isinstance(medium, Video):
                    spoken.update({sound: None for _, sound in medium.sounds or () if isinstance(sound, Spoken)})
    return list(spoken), list(drawn)


def _draw_frames(video: Video) -> Iterator[np.ndarray]:
    """Frames, each [SIDE, SIDE, 3]; one that is as the one before it is not drawn again."""
    previous: Picture | None = None
    pixels = np.empty(0)
    for picture in video.frames:
        if picture != previous:
            pixels = draw_picture(picture.things, picture.ground, picture.sign)
            previous = picture
        yield pixels


def _read_speech(path: Path) -> np.ndarray:
    """[samples], float32, SOUND_RATE a second, without silence at either end."""
    samples = read_audio(str(path), MelSettings(sampling_rate=SOUND_RATE))
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1]
    return (_LOUDNESS * samples / np.abs(samples).max()).astype(np.float32)


def make_row(item: Item) -> dict[str, Any]:
    """The row of an item."""
    row: dict[str, Any] = {"task": item.task, "key": item.key, "messages": []}
    for turn in item.turns:
        row["messages"].append({"role": "user", "content": turn.content})
        row["messages"].append({"role": "assistant", "content": turn.answer})
        for medium in turn.media:
            if isinstance(medium, Spoken):
                row["voice"] = medium.voice
            row.setdefault(_FIELDS[type(medium)], []).append(media_file(medium))
    if item.reply is not None:
        row["reply"] = {"audio": media_file(item.reply), "voice": item.reply.voice}
    return row


def write_part(options: Options, part: Part, items: Sequence[Item], writer: MediaWriter) -> None:
    """Writes the media of a part, and then its file of rows."""
    spoken, drawn = _find_media(items)
    console = Console(stderr=True)
    with ThreadPoolExecutor(2) as pool:
        # what is said is written first, since videos hold it
        for what, media in (("speaking", spoken), ("drawing", drawn)):
            jobs = pool.map(writer.write, media)
            for _ in track(jobs, total=len(media), description=f"{what} {part}", console=console):
                pass
    lines = [json.dumps(make_row(item)) + "\n" for item in items]
    replace_file(options.out / f"{part}.jsonl", "".join(lines).encode())
    print(f"{options.out / part}.jsonl: {len(lines)} rows")


def make_world(options: Options) -> None:
    """Makes the parts that are asked for.

    Raises:
      InputError: if an option is out of its range, a task is unknown, or a synthesizer is missing.
    """
    check_int("items", options.items, 1, 1_000_000)
    check_float("voiced", options.voiced, 0, 1)
    check_float("spoken", options.spoken, 0, 1)
    counts: dict[Part, int] = {part: options.items if part == "train" else -(-options.items // 10) for part in PARTS}
    if options.split is not None:
        counts = {options.split: options.items}
    drawn: dict[Part, list[Item]] = {part: draw_items(options, part, count) for part, count in counts.items()}
    writer = MediaWriter(options)
    for part, items in drawn.items():
        write_part(options, part, items, writer)


def main(options: Options) -> None:
    with exit_on_error():
        make_world(options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
