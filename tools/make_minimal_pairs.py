"""Makes preference pairs of recordings whose texts are nearly the same (docs/speech-training.md).

    python tools/make_minimal_pairs.py spoken.jsonl --out pairs.jsonl
    python tools/score_pairs.py talker-dpo-omni-tiny --init runs/talker3 --data.train pairs.jsonl --out scored.jsonl

Rows are those that the Talker learns from (``tools/make_spoken_rows.py``). The better answer to a row is its own
recording; the other is the recording, in the same voice, of a text that differs from the row's in one word or, where
there is none, of one that begins like it. Both are speech of the same quality, so what the Talker learns from them is
to say the words of the text. Nothing is drawn from a model and nothing is recognized, so thousands take seconds.
The same seed gives the same pairs.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checks import check_float, check_int, shown
from omni_jax.data.sources import Row, open_rows
from omni_jax.errors import InputError
from omni_jax.evaluation.spoken_answers import read_spoken_text
from tools.command_errors import exit_on_error
from tools.row_files import write_values

_MOST_COMPARED = 30  # of texts with one other word, and on each side in the order of texts; one of them is taken


@dataclass(frozen=True)
class Options:
    """What to read and write."""

    rows: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SPOKEN.jsonl")]
    out: Path
    """Where the pairs are written."""
    most: int | None = None
    """Pairs, at most, of rows drawn at random; without it, of all rows."""
    max_length_gap: float = 0.5
    """How many more codes the longer recording of a pair may have, as a share of the shorter one's."""
    seed: int = 0


class Recording(NamedTuple):
    """A row, with the words and the codes of its answer."""

    values: dict[str, Any]
    text: str
    words: tuple[str, ...]
    voice: str
    codes: list[int]


def read_recording(row: Row, out: Path) -> Recording | None:
    """The recording of a row; None if no voice is named.

    Args:
      row: of the Talker's training.
      out: the file that pairs are written to.

    Raises:
      InputError: naming the row, if it has no text or no codes, or its voice is no name.
    """
    spoken = read_spoken_text(row, out)
    speech = spoken.values.get("speech")
    if not isinstance(speech, dict) or not isinstance(speech.get("codec_ids"), list):
        raise InputError(f"{row.name}: speech is {shown(speech)}; it must be an object with codec_ids")
    voice = speech.get("voice")
    if voice is None:
        return None
    if not isinstance(voice, str):
        raise InputError(f"{row.name}: speech.voice is {shown(voice)}; it must be the name of a voice")
    return Recording(dict(spoken.values), spoken.text, tuple(spoken.text.split()), voice, speech["codec_ids"])


class MinimalPairs:
    """Finds to a recording another one of nearly the same text."""

    def __init__(self, recordings: Sequence[Recording], max_length_gap: float, rng: np.random.Generator) -> None:
        """Sorts the recordings.

        Args:
          recordings: among which partners are sought.
          max_length_gap: as of ``Options``.
          rng: draws those that are compared.
        """
        self._max_length_gap = max_length_gap
        self._rng = rng
        self._by_context: dict[tuple[Any, ...], list[Recording]] = defaultdict(list)
        self._by_voice: dict[str, list[Recording]] = defaultdict(list)
        for recording in recordings:
            for context in _contexts(recording):
                self._by_context[context].append(recording)
            self._by_voice[recording.voice].append(recording)
        self._places: dict[int, int] = {}
        for of_voice in self._by_voice.values():
            of_voice.sort(key=lambda recording: recording.words)
            self._places.update({id(recording): place for place, recording in enumerate(of_voice)})

    def find(self, recording: Recording) -> Recording | None:
        """The partner of a recording, or None.

        Of those with one other word it is the one whose codes are the same for the longest, which is as fast. If there
        are none, it is the one whose text is the same for the longest.
        """
        contexts = list(_contexts(recording))
        self._rng.shuffle(contexts)
        for context in contexts:
            found = self._fitting(recording, self._by_context[context])
            if found:
                some = self._rng.permutation(len(found))[:_MOST_COMPARED]
                return max((found[i] for i in some), key=lambda other: _count_common(recording.codes, other.codes))
        of_voice = self._by_voice[recording.voice]
        place = self._places[id(recording)]
        near = self._fitting(recording, of_voice[max(place - _MOST_COMPARED, 0) : place + _MOST_COMPARED])
        return max(near, key=lambda other: _count_common(recording.words, other.words)) if near else None

    def _fitting(self, recording: Recording, others: Sequence[Recording]) -> list[Recording]:
        """Those with other words, and about as long."""
        return [
            other
            for other in others
            if other.words != recording.words and self._is_as_long(len(recording.codes), len(other.codes))
        ]

    def _is_as_long(self, count: int, other_count: int) -> bool:
        shorter, longer = sorted((count, other_count))
        return longer <= (1 + self._max_length_gap) * shorter


def _contexts(recording: Recording) -> Iterator[tuple[Any, ...]]:
    """For each word of the text what stands around it: texts that have one in common differ in one word."""
    words = recording.words
    for place in range(len(words)):
        yield recording.voice, place, words[:place], words[place + 1 :]


def _count_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """With how many of the same values two sequences begin."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def make_pair(better: Recording, other: Recording) -> dict[str, Any]:
    """The row of a pair (docs/data.md)."""
    shared = {name: value for name, value in better.values["speech"].items() if name != "codec_ids"}
    answers = {
        name: {"codec_ids": recording.codes, "text": recording.text}
        for name, recording in (("chosen", better), ("rejected", other))
    }
    return {**better.values, "speech": {**shared, **answers}}


def make_pairs(recordings: Sequence[Recording], options: Options) -> list[dict[str, Any]]:
    """The rows of all pairs, in an order that is drawn."""
    rng = np.random.default_rng(options.seed)
    finder = MinimalPairs(recordings, options.max_length_gap, rng)
    rows = []
    for number in rng.permutation(len(recordings)):
        if len(rows) == options.most:
            break
        other = finder.find(recordings[number])
        if other is not None:
            rows.append(make_pair(recordings[number], other))
    return rows


def main(options: Options) -> None:
    with exit_on_error():
        check_float("--max-length-gap", options.max_length_gap, 0, 10)
        if options.most is not None:
            check_int("--most", options.most, 1)
        if options.out.exists():
            raise InputError(f"{options.out} exists already; name another file")
        rows = itertools.chain.from_iterable(open_rows(path) for path in options.rows)
        recordings = [found for row in rows if (found := read_recording(row, options.out)) is not None]
        pairs = make_pairs(recordings, options)
        if not pairs:
            raise InputError("no row has a partner: texts that differ in a word, or begin alike, in the same voice")
        write_values(options.out, pairs)
    print(f"{options.out}: {len(pairs)} pairs of {len(recordings)} recordings that name a voice")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
