"""Makes a small world to learn and to be examined in: dialogues about pictures, sounds and videos, with their media.

    python tools/make_world.py out/world --items 400
    python tools/make_world.py out/exam --split test --items 50 --seed 7

Pictures and videos are drawn, sound effects are computed, and speech is that of flite's voices slt, rms and awb
(``apt install flite``) and hibari's heart (``pip install omni_jax[speech-data]``). A row is a dialogue in the format of
training (docs/data.md) with its ``task`` and its ``key``, the combination that it asks for. Which part a key belongs to
follows from the key alone, so that items of any seed are held out if they are of ``valid`` or ``test``; these are
drawn and spoken with sizes, grounds, pitches and rates between those of training, too. Tasks whose name ends with
``-voice`` are asked by voice. The same seed gives the same files, and a command that was stopped goes on.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checks import check_int, printable
from omni_jax.errors import InputError
from omni_jax.plain_files import replace_file
from tools.make_speech import VOICES, Speaker, Utterance
from tools.world.items import PARTS, Effect, Item, Medium, Part, Picture, Spoken, Video, ask_by_voice, fits_part
from tools.world.pictures import FRAME_RATE, SOUND_RATE, draw_picture, write_picture, write_video
from tools.world.sounds import Placed, make_effect, mix_track
from tools.world.tasks import STYLES, Artist

_MOST_DRAWS = 10_000  # of one item, until one is of the part asked for
_LOUDNESS = 0.6  # of the largest sample of what is said in a video
_FIELDS = {"audio": "audios", "image": "images", "video": "videos"}


@dataclass(frozen=True)
class Options:
    """What is made."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    items: int = 400
    """Of each task to train on; valid and test have a tenth of it, unless they are asked for by --split."""
    split: Part | None = None
    """Make this part alone, with all of --items."""
    tasks: tuple[str, ...] = ()
    """Names of tasks; all if none is given."""
    voiced: float = 0.25
    """Items asked by voice for each asked in text, of training; held-out ones are all asked both ways."""
    voices: tuple[str, ...] = VOICES
    """Of slt, rms, awb and heart."""
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
    for name in options.tasks or artist.tasks:
        for _ in range(count):
            item = _draw_item(artist, name, part)
            items.append(item)
            # what is heard already is not asked by voice
            if name != "transcribe" and (part != "train" or rng.random() < options.voiced):
                items.append(ask_by_voice(item, *artist.draw_voice()))
    return items


def _draw_item(artist: Artist, task: str, part: Part) -> Item:
    for _ in range(_MOST_DRAWS):
        item = artist.tasks[task]()
        if fits_part(item, part):
            return item
    raise RuntimeError(f"task {task} has no item of {part}")


class MediaWriter:
    """Writes the media of items, each once."""

    def __init__(self, options: Options) -> None:
        """Loads the synthesizers.

        Raises:
          InputError: if one is missing.
        """
        self._out = options.out
        self._speaker = Speaker(options.voices)
        (options.out / "speech").mkdir(parents=True, exist_ok=True)

    def write(self, medium: Medium, name: str) -> str:
        """Writes a medium, unless it is there.

        Args:
          medium: it; speech has been spoken.
          name: its file without a suffix, relative to the folder; speech has a name of its own, after what is said.

        Returns:
          The file, relative to the folder.
        """
        if isinstance(medium, Spoken):
            return str(_speech_file(medium))
        file = f"{name}.png" if isinstance(medium, Picture) else f"{name}.mp4"
        path = self._out / file
        if not path.exists():
            partial = path.with_name(f".{path.name}")
            if isinstance(medium, Picture):
                write_picture(partial, draw_picture(medium.things, medium.ground, medium.sign))
            else:
                write_video(partial, list(_draw_frames(medium)), self._mix(medium))
            partial.rename(path)
        return file

    def speak(self, spoken: Spoken) -> None:
        """Speaks, unless the file is there."""
        file = _speech_file(spoken)
        if not (self._out / file).exists():
            self._speaker.write(Utterance(file, spoken.text, spoken.voice, spoken.rate), self._out / file)

    def _mix(self, video: Video) -> np.ndarray | None:
        if video.sounds is None:
            return None
        placed = []
        for start, sound in video.sounds:
            if isinstance(sound, Effect):
                placed.append(Placed(start, make_effect(sound.name, sound.pitch, sound.seed)))
            else:
                placed.append(Placed(start, _read_speech(self._out / _speech_file(sound))))
        return mix_track(len(video.frames) / FRAME_RATE, placed, video.noise, len(placed))


def _speech_file(spoken: Spoken) -> Path:
    """Relative to the folder."""
    digest = zlib.crc32(spoken.text.encode())
    return Path("speech", f"{spoken.voice}-{round(100 * spoken.rate)}-{digest:08x}.wav")


def _find_spoken(items: Sequence[Item]) -> list[Spoken]:
    """All that is said in items, each once."""
    found: dict[Spoken, None] = {}
    for item in items:
        for turn in item.turns:
            for medium in turn.media:
                sounds = (medium.sounds or ()) if isinstance(medium, Video) else ((0.0, medium),)
                found.update({sound: None for _, sound in sounds if isinstance(sound, Spoken)})
    return list(found)


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
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SOUND_RATE)
    parts = []
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    samples = np.concatenate(parts)
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1]
    return (_LOUDNESS * samples / np.abs(samples).max()).astype(np.float32)


def write_item(writer: MediaWriter, item: Item, name: str) -> dict[str, Any]:
    """Writes the media of an item.

    Args:
      writer: of media.
      item: it.
      name: of its files, relative to the folder.

    Returns:
      Its row.
    """
    row: dict[str, Any] = {"task": item.task, "key": item.key, "messages": []}
    for number, turn in enumerate(item.turns):
        row["messages"].append({"role": "user", "content": turn.content})
        row["messages"].append({"role": "assistant", "content": turn.answer})
        for place, medium in enumerate(turn.media):
            file = writer.write(medium, f"{name}-{number}{place}")
            kind = "audio" if isinstance(medium, Spoken) else "image" if isinstance(medium, Picture) else "video"
            row.setdefault(_FIELDS[kind], []).append(file)
    return row


def write_part(options: Options, part: Part, items: Sequence[Item], writer: MediaWriter) -> None:
    """Writes the media of a part, and then its file of rows."""
    (options.out / "media" / part).mkdir(parents=True, exist_ok=True)
    names = [f"media/{part}/{options.seed}-{number:06d}" for number in range(len(items))]
    spoken = _find_spoken(items)
    console = Console(stderr=True)
    with ThreadPoolExecutor(2) as pool:
        speaking = pool.map(writer.speak, spoken)
        list(track(speaking, total=len(spoken), description=f"speaking {part}", console=console))
        drawing = pool.map(lambda item, name: write_item(writer, item, name), items, names)
        rows = list(track(drawing, total=len(items), description=f"drawing {part}", console=console))
    lines = [json.dumps(row) + "\n" for row in rows]
    replace_file(options.out / f"{part}.jsonl", "".join(lines).encode())
    print(f"{options.out / part}.jsonl: {len(lines)} rows")


def make_world(options: Options) -> None:
    """Makes the parts that are asked for.

    Raises:
      InputError: if an option is out of its range, a task is unknown, or a synthesizer is missing.
    """
    check_int("items", options.items, 1, 1_000_000)
    counts: dict[Part, int] = {part: options.items if part == "train" else -(-options.items // 10) for part in PARTS}
    if options.split is not None:
        counts = {options.split: options.items}
    drawn: dict[Part, list[Item]] = {part: draw_items(options, part, count) for part, count in counts.items()}
    writer = MediaWriter(options)
    for part, items in drawn.items():
        write_part(options, part, items, writer)


def main(options: Options) -> int:
    try:
        make_world(options)
    except InputError as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
