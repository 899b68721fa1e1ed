"""What comes out of the engine: events, replies, where the time went, and how much of the work was padding."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

from omni_jax.models.token2wav import SAMPLE_RATE
from omni_jax.processing.layout import Usage
from omni_jax.processing.word_times import Word, find_word_times

FinishReason = Literal["stop", "length", "error"]


@dataclass
class Timings:
    """Where the time went, in seconds."""

    prepare: float = 0.0  # media to features, text to tokens
    encode: float = 0.0  # the encoders
    prefill: float = 0.0  # of Thinker and Talker, where that prefills along
    decode: float = 0.0  # the Thinker's tokens
    talker: float = 0.0  # the Talker's codes, and its prefill where the text comes first
    token2wav: float = 0.0  # codes to samples


@dataclass(frozen=True)
class Reply:
    """The answer to one request.

    Attributes:
      text: without the end mark and without the stop string.
      token_ids: all tokens that were decoded, the end mark included.
      finish_reason: "stop" at an end mark or a stop string, "length" at ``max_tokens`` or the end of the context.
      usage: what the prompt was made of.
      timings: of the scheduler that answered, until this reply was complete.
      codec_ids: the codes of the speech, 50 a second; none for a reply of one token or none.
      audio: float32 [samples] from -1 to 1, 480 for each code; None if no speech was asked for.
      sample_rate: of ``audio``, in Hz.
      error: why there is no answer; only ``generate_batch`` returns such a reply, the others raise.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    # not compared: equal replies may take different times
    timings: Timings = field(default_factory=Timings, compare=False)
    codec_ids: tuple[int, ...] = ()
    # not compared: two arrays have no single truth value
    audio: Float[np.ndarray, " samples"] | None = field(default=None, compare=False)
    sample_rate: int = SAMPLE_RATE
    error: str | None = None

    @functools.cached_property
    def words(self) -> tuple[Word, ...]:
        """Words of the text and when ``audio`` speaks them (``find_word_times``); none without sound.

        They are found when they are asked for, in some milliseconds for each second of speech.
        """
        return () if self.audio is None else find_word_times(self.text, self.audio, self.sample_rate)

    @classmethod
    def from_error(cls, error: Exception) -> Reply:
        """The reply of a request that has none."""
        # some exceptions have no message; their name still says something
        return cls("", (), "error", Usage(), error=str(error) or type(error).__name__)


@dataclass(frozen=True)
class Event:
    """A piece of a reply as it comes. The texts of all events add up to the reply's, and so do the samples.

    Attributes:
      text: that is new, or None.
      audio: float32 [samples] that are new, or None.
      reply: the whole reply, in the last event alone.
      hold_back: seconds that a player had better wait with the first sound, so that it does not run dry before the
        second; from the pace of the last streams, and None where there were none. In the event of the first sound.
    """

    text: str | None = None
    audio: Float[np.ndarray, " samples"] | None = None
    reply: Reply | None = None
    hold_back: float | None = None


@dataclass
class SlotUse:
    """How much of what was computed was used."""

    # in the unit of the stage: positions, tokens or codes
    used: int = 0
    computed: int = 0

    def add(self, used: int, computed: int) -> None:
        self.used += used
        self.computed += computed


@dataclass
class Utilization:
    """What a scheduler has computed, and how much of it was not padding."""

    prefill: SlotUse = field(default_factory=SlotUse)  # positions of prompts
    text: SlotUse = field(default_factory=SlotUse)  # tokens: slots times steps
    speech: SlotUse = field(default_factory=SlotUse)  # codes: slots times steps
    vocoder: SlotUse = field(default_factory=SlotUse)  # codes that became sound
