"""What a caller asks for and gets back, and the way from token ids to the text between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from omni_jax.checks import SEED_MAX, check_float, check_int
from omni_jax.engine.sampling import SamplingParams
from omni_jax.errors import InputError
from omni_jax.models.token2wav import SAMPLE_RATE
from omni_jax.processing.layout import Usage
from omni_jax.processing.processor import Processor
from omni_jax.processing.tokenizer import TextStream


@dataclass(frozen=True)
class Options:
    """The keyword arguments of ``OmniModel.generate``, ``stream`` and ``generate_batch``.

    Attributes:
      max_tokens: length of the reply in tokens, at most; the context may cut it shorter.
      temperature, top_k, top_p, repetition_penalty, seed: as in ``SamplingParams``; temperature 0 is greedy.
      stop: strings that end the reply; they are not part of it.
      stop_token_ids: token ids that end the reply, besides the checkpoint's own.
      assume_fps: take every video's frames to be this many a second, whatever rate they were really sampled at.
      modalities: ("text",), or ("text", "audio") to have the reply spoken too.
      voice: who speaks; the checkpoint's default voice if None.
      talker: how it is spoken, see ``TalkerParams``; its seed is that of the text unless it has one.
      noise_seed: of the noise that the sound is made from; ``seed`` if None.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    assume_fps: float | None = None
    modalities: tuple[str, ...] = ("text",)
    voice: str | None = None
    talker: Mapping[str, Any] = field(default_factory=dict)
    noise_seed: int | None = None

    @classmethod
    def create(cls, **given: Any) -> Options:
        """From a caller's keyword arguments.

        Raises:
          InputError: for an unknown name or a value out of range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise InputError(f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        options = cls(**given)
        check_int("max_tokens", options.max_tokens, 1)
        for token in options.stop_token_ids:
            check_int("stop_token_ids", token, 0)
        if options.assume_fps is not None:
            check_float("assume_fps", options.assume_fps, 0, 1000, above=True)
        if any(not isinstance(s, str) or not s for s in options.stop):
            raise InputError(f"stop is {options.stop!r}; each must be a string of at least one character")
        if isinstance(options.modalities, str) or not set(options.modalities) <= {"text", "audio"}:
            raise InputError(f'modalities is {options.modalities!r}; it must be ["text"] or ["text", "audio"]')
        if not isinstance(options.talker, Mapping):
            raise InputError(f"talker is {options.talker!r}; it must be a dict of options")
        if options.noise_seed is not None:
            check_int("noise_seed", options.noise_seed, 0, SEED_MAX)
        _ = options.sampling
        return options

    @classmethod
    def names(cls) -> list[str]:
        """The names of the keyword arguments."""
        return [f.name for f in dataclasses.fields(cls)]

    @property
    def speaks(self) -> bool:
        return "audio" in self.modalities

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed)


@dataclass
class Timings:
    """Where a request's time went, in seconds."""

    prepare: float = 0.0  # decoding media, tokens, patches, log-mel
    encode: float = 0.0  # the encoders
    prefill: float = 0.0  # reading the prompt
    decode: float = 0.0  # the reply, token by token
    talk: float = 0.0  # its codes, one by one
    wave: float = 0.0  # codes to samples


@dataclass(frozen=True)
class Reply:
    """The answer to one request.

    Attributes:
      text: without the end mark and without the stop string.
      token_ids: all tokens that were made, the end mark included.
      finish_reason: "stop" at an end mark or a stop string, "length" at ``max_tokens`` or the end of the context.
      usage: what the prompt was made of.
      timings: of the batch the request was in.
      codec_ids: the codes of the speech, 50 a second; none for a reply of one token or none.
      audio: float32 [samples] from -1 to 1, 480 for each code; None if no speech was asked for.
      sample_rate: of ``audio``.
      error: why there is no answer; only ``generate_batch`` returns such a reply, the others raise.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "error"]
    usage: Usage
    timings: Timings = field(default_factory=Timings, compare=False)
    codec_ids: tuple[int, ...] = ()
    audio: np.ndarray | None = field(default=None, compare=False)
    sample_rate: int = SAMPLE_RATE
    error: str | None = None

    @classmethod
    def failed(cls, error: Exception) -> Reply:
        return cls("", (), "error", Usage(), error=str(error))


@dataclass(frozen=True)
class Event:
    """A piece of a reply as it comes; the texts of all events add up to the reply's, and so does the sound."""

    text: str | None
    audio: np.ndarray | None = None  # float32 [samples]
    reply: Reply | None = None  # in the last event


class ReplyWriter:
    """Turns one row's tokens into text: whole characters only, and nothing of a stop string."""

    def __init__(self, processor: Processor, options: Options):
        self.ids: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._text, self._cut = "", False  # and whether a stop string was cut off
        self._stream: TextStream = processor.text_stream()
        self._stop_ids = stop_ids(processor, options)
        self._stop = options.stop
        self._emitted = 0
        self._begins: list[int] = []  # where in the text each token's share begins

    def push(self, tokens: Iterable[int]) -> str:
        """Takes tokens; returns the text that is now certain. Tokens after the end are passed over."""
        for token in tokens:
            if self.finish_reason is None and token >= 0:
                self.ids.append(int(token))
                self._begins.append(len(self._text))
                if token in self._stop_ids:
                    self._finish("stop")
                else:
                    self._write(self._stream.push(int(token)))
        return self._certain()

    def end(self) -> str:
        """Says that no token follows; returns the rest of the text."""
        if self.finish_reason is None:
            self._finish("length")
        return self._certain()

    @property
    def text(self) -> str:
        return self._text[: self._emitted]

    @property
    def spoken(self) -> int:
        """How many of the tokens the Talker is given: those of the text, and the one after them, which ends it.

        Of a stop string nothing is spoken but what shares a token with the text.
        """
        within = sum(begin < len(self._text) for begin in self._begins)
        return min(within + 1, len(self.ids)) if self._cut else len(self.ids)

    @property
    def settled(self) -> int:
        """How many tokens are given to the Talker whatever follows: those that no stop string can cut off any more."""
        return sum(begin < self._emitted for begin in self._begins) if self._stop else len(self.ids)

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self._write(self._stream.flush())
        self.finish_reason = self.finish_reason or reason

    def _write(self, piece: str) -> None:
        self._text += piece
        places = [place for s in self._stop if (place := self._text.find(s)) >= 0]
        if places:
            self._text, self._cut = self._text[: min(places)], True
            self.finish_reason = "stop"

    def _certain(self) -> str:
        end = len(self._text)
        if self.finish_reason is None:  # what may be the beginning of a stop string has to wait
            end -= max((_overlap(self._text, s) for s in self._stop), default=0)
        piece = self._text[self._emitted : max(end, self._emitted)]
        self._emitted += len(piece)
        return piece


def stop_ids(processor: Processor, options: Options) -> tuple[int, ...]:
    """The ids that end a reply: the checkpoint's and the request's."""
    return tuple(dict.fromkeys((*processor.stop_ids, *options.stop_token_ids)))


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
