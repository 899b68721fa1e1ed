"""The arithmetic of latency: what leads to the first packet, what that takes, and how packets play.

Nothing here imports JAX or PyTorch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.side import CODES_PER_SECOND, TOKENS_PER_SECOND, Call, Part, StreamedReply

SAMPLE_RATE = 24_000
AUDIBLE = 0.01  # of full scale, 40 dB under it: the least sample that is called audible

# the Talker starts when two tokens are there; until then nothing else can be done
UNTIL_TALKER = "Thinker, until the Talker may start"
WHILE_TALKER_WAITS = "Thinker, while the Talker waits"
# lines of the budget, in the order of the work, and the parts whose calls each adds up; text has two lines
LINES: dict[str, tuple[Part, ...]] = {
    "input: decoding, features, tokens": (Part.INPUT,),
    "audio encoder": (Part.ENCODERS,),
    "prefill, Thinker and Talker": (Part.PREFILL, Part.TALKER_PREFILL),
    "voice: speaker encoder": (Part.SPEAKER,),
    UNTIL_TALKER: (Part.TEXT,),
    WHILE_TALKER_WAITS: (Part.TEXT,),
    "Talker": (Part.BEGIN, Part.CODES),
    "DiT": (Part.DIT,),
    "vocoder": (Part.VOCODER,),
    "copy to host": (Part.COPY,),
}
REST = "everything else on the host"


@dataclass(frozen=True)
class ReplyLength:
    """A spoken reply of so many seconds."""

    seconds: int

    @property
    def num_tokens(self) -> int:
        return TOKENS_PER_SECOND * self.seconds

    @property
    def num_codes(self) -> int:
        return CODES_PER_SECOND * self.seconds


@dataclass(frozen=True)
class PromptPlan:
    """What a prompt costs.

    Attributes:
      num_tokens: of it.
      audio_blocks: of two seconds that the encoder is called with, padding included.
      positions: of the chunks that it is prefilled in, padding included.
    """

    num_tokens: int
    audio_blocks: int
    positions: int


@dataclass(frozen=True)
class StreamPlan:
    """What the parts declare (``layers.streaming.Streaming``), and how much is done at a time (``ChunkSizes``).

    Attributes:
      first_tokens, tokens: in the first call of the Thinker, and in later ones.
      codes: in a call of the Talker at most.
      first_chunk_codes, chunk_codes: that Token2Wav waits for.
      block_codes: in a block of the DiT.
      code_frames: mel frames of a code.
      dit_look_ahead: codes.
      vocoder_look_ahead, vocoder_look_back: mel frames.
      first_look_ahead: of the vocoder in the first packet, where it is less.
    """

    first_tokens: int
    tokens: int
    codes: int
    first_chunk_codes: int
    chunk_codes: int
    block_codes: int
    code_frames: int
    dit_look_ahead: int
    vocoder_look_ahead: int
    vocoder_look_back: int
    first_look_ahead: int | None = None

    def chunks(self) -> tuple[int, ...]:
        """Codes of the chunks that the first packet with any sound is made from."""
        # what the networks look ahead is missing at the end; a small first chunk may give no sound at all
        chunks = [self.first_chunk_codes]
        while self._num_frames(chunks) <= 0:
            chunks.append(self.chunk_codes)
        return tuple(chunks)

    @property
    def first_packet_seconds(self) -> float:
        """Of the sound in it, for a reply that is longer."""
        return self._num_frames(self.chunks()) / (CODES_PER_SECOND * self.code_frames)

    def _num_frames(self, chunks: Sequence[int]) -> int:
        """Frames whose samples are out after these chunks."""
        look_ahead = self.vocoder_look_ahead
        if len(chunks) == 1 and self.first_look_ahead is not None:
            look_ahead = self.first_look_ahead
        return (sum(chunks) - self.dit_look_ahead) * self.code_frames - look_ahead

    def count_steps(self, length: ReplyLength) -> dict[str, int]:
        """Steps of Thinker and Talker until there are codes for the first packet, as they take turns.

        While the text goes on, two codes fewer than tokens can be decoded; when it has ended, all.

        Returns:
          Tokens until the Talker begins and after that, and codes.
        """
        # a short reply ends before its first packet would be full
        needed = min(sum(self.chunks()), length.num_codes)
        num_tokens = 0
        num_codes = 0
        before_talker = 0
        step = self.first_tokens
        while num_codes < needed:
            # a call of the Thinker
            num_tokens += min(step, length.num_tokens - num_tokens)
            step = self.tokens
            if num_tokens < 2:
                continue
            before_talker = before_talker or num_tokens
            # and one of the Talker, of the codes that there are rows of text for
            ready = length.num_codes if num_tokens == length.num_tokens else num_tokens - 2
            num_codes += min(ready - num_codes, length.num_codes - num_codes, self.codes)
        return {
            UNTIL_TALKER: before_talker,
            WHILE_TALKER_WAITS: num_tokens - before_talker,
            Part.CODES: num_codes,
        }

    def predict_work(self, length: ReplyLength, prompt: PromptPlan) -> dict[str, float]:
        """What every part has to do until the first packet of a reply that is longer."""
        chunks = self.chunks()
        # the newest block of codes waits for the next
        solved_codes = [chunks[0] - self.block_codes, *chunks[1:]]
        # the vocoder computes what it looks back and ahead at anew with every chunk
        window = self.vocoder_look_back + self.vocoder_look_ahead
        # but a first chunk that gives samples is computed alone
        if len(chunks) == 1:
            window = 0
        return {
            Part.INPUT: 1,
            Part.ENCODERS: prompt.audio_blocks,
            Part.PREFILL: prompt.positions,
            Part.SPEAKER: 1,
            Part.BEGIN: 1,
            **self.count_steps(length),
            Part.DIT: sum(solved_codes) / self.block_codes,  # blocks
            Part.VOCODER: sum(window + codes * self.code_frames for codes in solved_codes),  # frames
            Part.COPY: len(chunks),
        }


def calls_until(calls: Sequence[Call], moment: float) -> list[Call]:
    """Those that had ended by then."""
    return [call for call in calls if call.ended <= moment]


def name_calls(calls: Sequence[Call]) -> list[tuple[str, Call]]:
    """The calls with the names of their work, as in ``StreamPlan.predict_work``.

    The Talker may start when two tokens are there: the Thinker's calls until then have another name than those after.
    """
    named: list[tuple[str, Call]] = []
    num_tokens = 0.0  # before the call
    for call in calls:
        name: str = call.part
        if call.part is Part.TEXT:
            name = UNTIL_TALKER if num_tokens < 2 else WHILE_TALKER_WAITS
            num_tokens += call.work
        named.append((name, call))
    return named


def sum_work(calls: Sequence[Call]) -> dict[str, float]:
    """How much each part did, by the names of ``StreamPlan.predict_work``."""
    work: dict[str, float] = {}
    for name, call in name_calls(calls):
        if call.part is not Part.TALKER_PREFILL:  # of the same positions as the Thinker's
            work[name] = work.get(name, 0) + call.work
    return work


def unit_costs(calls: Iterable[Call]) -> dict[str, float]:
    """Seconds of one unit of each part's work. A token costs the same whoever waits for it."""
    seconds: dict[str, float] = {}
    work: dict[str, float] = {}
    for call in calls:
        # the Talker prefills what the Thinker has prefilled: two costs of the same positions
        part = Part.PREFILL if call.part is Part.TALKER_PREFILL else call.part
        seconds[part] = seconds.get(part, 0.0) + call.seconds
        work[part] = work.get(part, 0.0) + (0.0 if call.part is Part.TALKER_PREFILL else call.work)
    return {part: seconds[part] / work[part] for part in seconds}


def measured_budget(calls: Sequence[Call], moment: float) -> dict[str, float]:
    """The budget until then, in seconds, line by line; all lines together are ``moment``."""
    budget = dict.fromkeys(LINES, 0.0)
    for name, call in name_calls(calls):
        # text has two lines, by the names of its calls; any other part has one
        line = name
        if call.part is not Part.TEXT:
            line = next(line for line, parts in LINES.items() if call.part in parts)
        budget[line] += call.seconds
    # no call overlaps another, so what no call has taken is the host's
    budget[REST] = moment - sum(budget.values())
    return budget


def predicted_budget(work: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, float]:
    """The budget in seconds if each unit of work takes what it was measured to take, without the rest of the host."""
    budget = {}
    for line, parts in LINES.items():
        if line in (UNTIL_TALKER, WHILE_TALKER_WAITS):
            budget[line] = work[line] * costs[Part.TEXT]
            continue
        budget[line] = 0.0
        for part in parts:
            # the Talker's prefill has no work of its own: its cost is in that of the Thinker's positions
            if part in work:
                budget[line] += work[part] * costs[part]
    return budget


@dataclass(frozen=True)
class Playback:
    """What somebody hears who plays packets as they come, at normal speed from the first one on.

    Attributes:
      begins: when each packet is heard, in the time of the arrivals.
      gaps: the silences in seconds, one before each packet that came too late.
    """

    begins: tuple[float, ...]
    gaps: tuple[float, ...]


def play_packets(arrivals: Sequence[float], num_samples: Sequence[int], rate: int = SAMPLE_RATE) -> Playback:
    """Plays packets of so many samples that arrived then."""
    begins: list[float] = []
    gaps: list[float] = []
    end: float | None = None  # of what is being heard
    for arrived, count in zip(arrivals, num_samples, strict=True):
        # early packets wait for those before them; a late one is heard after a silence
        begin = arrived if end is None else max(arrived, end)
        if end is not None and arrived > end:
            gaps.append(arrived - end)
        begins.append(begin)
        end = begin + count / rate
    return Playback(tuple(begins), tuple(gaps))


def summarize_reply(reply: StreamedReply) -> dict[str, Any]:
    """The figures of a streamed reply, as they are written; the budget, where calls were timed."""
    playback = play_packets(reply.arrivals, reply.num_samples)
    num_seconds = [count / SAMPLE_RATE for count in reply.num_samples]
    # speech may begin with silence, so the first packet is not yet the first that is heard
    audible = None
    for begin, sample in zip(playback.begins, reply.first_audible, strict=True):
        if sample is not None:
            audible = begin + sample / SAMPLE_RATE
            break
    first_packet = reply.arrivals[0]
    # named as servers of such models name them, in seconds; audio_rtf is the time from the request to the last packet
    # for a second of sound
    figures: dict[str, Any] = {
        "ttft": reply.first_text,
        "audio_ttfp": first_packet,
        "first_packet_seconds": num_seconds[0],
        "first_audible": audible,
        "wall": reply.arrivals[-1],
        "audio_rtf": reply.arrivals[-1] / sum(num_seconds),
        "underruns": len(playback.gaps),
        "largest_gap": max(playback.gaps, default=0.0),
        "packets": list(zip(reply.arrivals, num_seconds, strict=True)),
    }
    # only our side has its calls timed, and counts what it compiles
    if reply.calls:
        calls = calls_until(reply.calls, first_packet)
        figures["budget"] = measured_budget(calls, first_packet)
        figures["work"] = sum_work(calls)
    if reply.compiled is not None and reply.compiled_to_first_packet is not None:
        figures["compilations"] = reply.compiled.count
        figures["compile_seconds"] = reply.compiled.seconds
        figures["compilations_to_first_packet"] = reply.compiled_to_first_packet.count
    return figures


def median_round(rounds: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """The round whose ``key`` is the median, the lower of two, so that its figures belong together."""
    median = statistics.median_low(figures[key] for figures in rounds)
    return next(figures for figures in rounds if figures[key] == median)
