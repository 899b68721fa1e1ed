"""The arithmetic of the latency report: which steps lead to the first packet, what they take, and how packets play.

Nothing here imports JAX or PyTorch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOKENS_A_SECOND = 4  # of text, in a second of speech
CODES_A_SECOND = 50
SAMPLE_RATE = 24_000
AUDIBLE = 0.01  # of full scale, 40 dB under it: the least sample that is called audible

# lines of the budget, in the order of the work, and the parts of the model whose calls each adds up
LINES = {
    "input: decoding, features, tokens": ("input",),
    "audio encoder": ("encode",),
    "prefill, Thinker and Talker": ("read",),
    "voice: speaker encoder": ("voice",),
    "Thinker, until the Talker may start": ("think",),
    "Thinker, while the Talker waits": ("think on",),
    "Talker": ("begin", "talk"),
    "DiT": ("solve",),
    "vocoder": ("vocode",),
    "copy to host": ("copy",),
}
REST = "everything else on the host"


@dataclass(frozen=True)
class Length:
    """A reply of a fixed length."""

    seconds: int

    @property
    def tokens(self) -> int:
        return TOKENS_A_SECOND * self.seconds

    @property
    def codes(self) -> int:
        return CODES_A_SECOND * self.seconds


@dataclass(frozen=True)
class Call:
    """One call of a part, in seconds since the request, and how much it did: steps, blocks, frames."""

    part: str
    started: float
    ended: float
    work: float


@dataclass(frozen=True)
class Streams:
    """What the parts declare (``layers.stream.Streaming``) and how they are paced (``generation.reading.ChunkSizes``).

    Attributes:
      first_tokens, tokens: of text in the first call of the Thinker, and in later ones.
      codes: in a call of the Talker at most.
      first_chunk_codes, chunk_codes: that Token2Wav waits for.
      block: codes of a block of the DiT.
      frames: of mel for a code.
      dit_ahead: codes that the DiT looks ahead.
      vocoder_ahead, vocoder_back: frames that the vocoder looks ahead and back.
    """

    first_tokens: int
    tokens: int
    codes: int
    first_chunk_codes: int
    chunk_codes: int
    block: int
    frames: int
    dit_ahead: int
    vocoder_ahead: int
    vocoder_back: int

    def chunks(self) -> tuple[int, ...]:
        """Codes of the chunks that are needed until the first packet that is not empty."""
        chunks = [self.first_chunk_codes]
        while (sum(chunks) - self.dit_ahead) * self.frames <= self.vocoder_ahead:
            chunks.append(self.chunk_codes)
        return tuple(chunks)

    @property
    def first_packet(self) -> float:
        """Seconds of sound in it, for a reply that is longer."""
        frames = (sum(self.chunks()) - self.dit_ahead) * self.frames - self.vocoder_ahead
        return frames / (CODES_A_SECOND * self.frames)

    def lockstep(self, length: Length) -> dict[str, int]:
        """Steps of Thinker and Talker until there are codes for the first packet, as they take turns.

        While the text goes on there are rows for two codes fewer than tokens; when it has ended, for all.
        """
        needed, said, steps = min(sum(self.chunks()), length.codes), 0, self.first_tokens
        work = {"think": 0, "think on": 0, "begin": 0, "talk": 0}
        while work["talk"] < needed:
            new = min(steps, length.tokens - said)
            work["think on" if work["begin"] else "think"] += new
            said, steps = said + new, self.tokens
            if said < 2:
                continue
            work["begin"] = 1
            rows = length.codes if said == length.tokens else said - 2
            work["talk"] += min(rows - work["talk"], length.codes - work["talk"], self.codes)
        return work

    def work(self, length: Length, audio_blocks: int, positions: int) -> dict[str, float]:
        """What every part has to do until the first packet.

        Args:
          length: of the reply, at least as long as the first packet.
          audio_blocks: of two seconds that the encoder is called with, padding included.
          positions: of the chunks that the prompt is read in.
        """
        chunks, window = self.chunks(), self.vocoder_back + self.vocoder_ahead
        out: dict[str, float] = {"input": 1, "encode": audio_blocks, "read": positions, "voice": 1}
        out |= self.lockstep(length)
        out["solve"] = sum(chunks) / self.block
        out["vocode"] = sum(window + n * self.frames for n in chunks)
        return out | {"copy": len(chunks)}


def named(calls: Sequence[Call]) -> list[Call]:
    """The calls, with the Thinker's after the Talker's beginning under a name of their own, "think on"."""
    begins = [call.started for call in calls if call.part == "begin"]
    later = min(begins, default=float("inf"))
    on = [Call("think on", c.started, c.ended, c.work) for c in calls]
    return [b if a.part == "think" and a.started > later else a for a, b in zip(calls, on, strict=True)]


def before(calls: Sequence[Call], moment: float) -> list[Call]:
    """Those that had ended by then."""
    return [call for call in calls if call.ended <= moment]


def done(calls: Sequence[Call]) -> dict[str, float]:
    """How much each part did."""
    parts = dict.fromkeys(call.part for call in calls)
    return {part: sum(c.work for c in calls if c.part == part) for part in parts}


def costs(calls: Sequence[Call]) -> dict[str, float]:
    """Seconds of one unit of each part's work. A word costs the same whoever waits for it."""
    work = done(calls)
    return {part: sum(c.ended - c.started for c in calls if c.part == part) / work[part] for part in work}


def measured(calls: Sequence[Call], moment: float) -> dict[str, float]:
    """The budget until then, in seconds, line by line; all lines together are ``moment``."""
    took = {line: sum(c.ended - c.started for c in calls if c.part in parts) for line, parts in LINES.items()}
    return took | {REST: moment - sum(took.values())}


def predicted(work: Mapping[str, float], a_unit: Mapping[str, float]) -> dict[str, float]:
    """The budget in seconds if each unit of work takes what it was measured to take; nothing for the rest."""
    price = {**a_unit, "think on": a_unit["think"]}
    return {line: sum(work[part] * price[part] for part in parts) for line, parts in LINES.items()}


@dataclass(frozen=True)
class Playback:
    """What somebody hears who plays packets as they come, at normal speed from the first one on.

    Attributes:
      begins: when each packet is heard, in the time of the arrivals.
      gaps: the silences in seconds, one before each packet that came too late.
    """

    begins: tuple[float, ...]
    gaps: tuple[float, ...]

    @property
    def underruns(self) -> int:
        return len(self.gaps)

    @property
    def largest_gap(self) -> float:
        return max(self.gaps, default=0.0)


def play(arrivals: Sequence[float], samples: Sequence[int], rate: int = SAMPLE_RATE) -> Playback:
    """Plays packets of so many samples that arrived then."""
    begins, gaps, end = [], [], None
    for arrived, count in zip(arrivals, samples, strict=True):
        begin = arrived if end is None else max(arrived, end)
        if end is not None and arrived > end:
            gaps.append(arrived - end)
        begins.append(begin)
        end = begin + count / rate
    return Playback(tuple(begins), tuple(gaps))


def middle(rounds: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """The round whose ``key`` is the median, the lower of two, so that its figures belong together."""
    wanted = statistics.median_low(r[key] for r in rounds)
    return next(r for r in rounds if r[key] == wanted)
