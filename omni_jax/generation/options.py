"""The keyword arguments of ``OmniModel.generate``, ``stream`` and ``generate_batch``, checked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from omni_jax.checks import INT32_MAX, SEED_MAX, check_float, check_int, check_names, shown
from omni_jax.engine.sampling import SamplingParams, pop_sampling
from omni_jax.errors import InputError
from omni_jax.generation.cloned_voice import ClonedVoice
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT

Messages: TypeAlias = Sequence[Mapping[str, Any]]

MAX_STOP = 64  # stop strings, and stop ids, that a request may have
MAX_FPS = 1000.0


@dataclass(frozen=True)
class Options:
    """How one dialogue is to be answered. ``create`` makes and checks it from flat keyword arguments.

    Attributes:
      sampling: how the text's tokens are drawn; temperature 0 is greedy.
      max_tokens: length of the reply in tokens, at most; the context may end it sooner.
      stop: strings that end the reply; they are not part of it.
      stop_token_ids: token ids that end the reply, besides the checkpoint's own.
      assume_fps: take every video's frames to be this many a second, whatever rate they were really sampled at.
      modalities: ("text",), or ("text", "audio") to have the reply spoken too.
      voice: who speaks: a voice of the checkpoint by name, or one that a clip brings along; the checkpoint's default
        voice if None.
      talker: how it is spoken, see ``TalkerParams.override``; its seed is that of the text unless it has one.
      noise_seed: of the noise that the sound is made from; the text's seed if None.
      adapter: which of the loaded adapters answers, by name; None: the model without one.
      reply_text: what the reply is, in place of what the model would answer: what it is to speak, as text to speech.
        ``max_tokens`` does not hold for it.
    """

    sampling: SamplingParams = SamplingParams()  # noqa: RUF009, frozen
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    assume_fps: float | None = None
    modalities: tuple[str, ...] = ("text",)
    voice: str | ClonedVoice | None = None
    talker: Mapping[str, Any] = field(default_factory=dict)
    noise_seed: int | None = None
    adapter: str | None = None
    reply_text: str | None = None

    @classmethod
    def names(cls) -> list[str]:
        """The keyword arguments that ``create`` takes."""
        # the fields of ``sampling`` are given flat, beside the others
        others = [f.name for f in fields(cls) if f.name != "sampling"]
        return [*others, *SamplingParams.names()]

    @classmethod
    def create(cls, **options: Any) -> Options:
        """From a caller's keyword arguments.

        Raises:
          InputError: for an unknown name, a value of another type, or one out of range.
        """
        # an unknown name would otherwise be a TypeError of the dataclass's
        check_names("option", options, cls.names())
        sampling = pop_sampling(options, SamplingParams())
        options["stop"] = _check_stop(options.get("stop", ()))
        options["stop_token_ids"] = _check_stop_ids(options.get("stop_token_ids", ()))
        if isinstance(options.get("voice"), Mapping):
            options["voice"] = ClonedVoice.create(options["voice"])
        return cls(sampling=sampling, **options)

    def __post_init__(self) -> None:
        # here and not in ``create``, so that ``dataclasses.replace`` is checked too
        check_int("max_tokens", self.max_tokens, 1)
        if self.assume_fps is not None:
            check_float("assume_fps", self.assume_fps, 0, MAX_FPS, above=True)
        if self.noise_seed is not None:
            check_int("noise_seed", self.noise_seed, 0, SEED_MAX)
        if self.voice is not None and not isinstance(self.voice, str | ClonedVoice):
            raise InputError(f"voice is {shown(self.voice)}; it must be a name, or a clip: {{'ref_audio': ...}}")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise InputError(f"adapter is {shown(self.adapter)}; it must be a name")
        if self.reply_text is not None and (not isinstance(self.reply_text, str) or not self.reply_text):
            raise InputError(f"reply_text is {shown(self.reply_text)}; it must be a text that is not empty")
        # what is in it is checked against the model, which knows its limits (``OmniModel.check``)
        if not isinstance(self.talker, Mapping):
            raise InputError(f"talker is {shown(self.talker)}; it must be a dict of options")
        _check_modalities(self.modalities)

    @property
    def speaks(self) -> bool:
        return "audio" in self.modalities


def _is_list_of_strings(value: Any) -> bool:
    # a string is itself a sequence of strings, and would pass for a list of its characters
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    return all(isinstance(item, str) for item in value)


def _check_modalities(modalities: Any) -> None:
    if not _is_list_of_strings(modalities) or not set(modalities) <= {"text", "audio"}:
        raise InputError(f'modalities is {shown(modalities)}; it must be ["text"] or ["text", "audio"]')


def _check_stop(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    # an empty string is found in any text, and would end each reply before it begins
    if not _is_list_of_strings(strings) or not all(strings):
        raise InputError(f"stop is {shown(stop)}; each must be a string of at least one character")
    if len(strings) > MAX_STOP:
        raise InputError(f"stop has {len(strings)} strings; it may have at most {MAX_STOP}")
    return tuple(strings)


def _check_stop_ids(ids: Any) -> tuple[int, ...]:
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise InputError(f"stop_token_ids is {shown(ids)}; it must be a list of whole numbers")
    if len(ids) > MAX_STOP:
        raise InputError(f"stop_token_ids has {len(ids)} ids; it may have at most {MAX_STOP}")
    # the vocabulary is not known here; ``OmniModel.check`` compares with it
    return tuple(check_int("stop_token_ids", number, 0, INT32_MAX) for number in ids)


def warn_untrained(options: Options, conversations: Sequence[Messages], stacklevel: int = 3) -> None:
    """Warns of a system prompt that speech was not trained with, at the caller that many calls up."""
    if options.speaks and not all(map(_has_speech_prompt, conversations)):
        warnings.warn(
            "speech was trained with the system prompt omni_jax.SPEECH_SYSTEM_PROMPT alone; under another one, or "
            "without one, the model may speak badly or not at all",
            stacklevel=stacklevel,
        )


def _has_speech_prompt(messages: Messages) -> bool:
    """Whether a dialogue begins with the system prompt that speech was trained with."""
    first = messages[0] if messages else {}
    if not isinstance(first, Mapping):
        return False
    content = first.get("content")
    # a message's content is a string, or a list of parts, here of one part of text
    if isinstance(content, list | tuple) and len(content) == 1 and isinstance(content[0], Mapping):
        content = content[0].get("text")
    return first.get("role") == "system" and content == SPEECH_SYSTEM_PROMPT
