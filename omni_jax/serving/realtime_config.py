"""The settings of a realtime session, as OpenAI's ``session.update`` has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omni_jax.checks import check_float, check_int, check_names, shown
from omni_jax.engine.sampling import SamplingParams
from omni_jax.errors import InputError
from omni_jax.generation.cloned_voice import ClonedVoice
from omni_jax.generation.options import Options
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.serving.chat_request import parse_voice
from omni_jax.serving.realtime_audio import RATES

MAX_TOKENS = 4096  # of a reply, where the session says "inf"
MAX_INSTRUCTIONS = 32_768  # characters
_MAX_MILLISECONDS = 60_000
_MODALITIES = (["audio"], ["text"])
# what asks for nothing that this model does not do
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "tracing": (None,),
    "include": ([], None),
    "prompt": (None,),
    "truncation": ("auto", "disabled"),
    "noise_reduction": (None,),
    "speed": (1,),
    "idle_timeout_ms": (None,),
    "parallel_tool_calls": (True, False),
    "reasoning": (None,),
}


@dataclass(frozen=True)
class TurnDetection:
    """When the server takes a turn by itself.

    Attributes:
      threshold: of the probability of voice, 0 to 1.
      prefix_padding_ms: of sound before the voice that belong to it.
      silence_duration_ms: after which somebody has ended.
      create_response: whether the server answers then.
      interrupt_response: whether it stops its answer when somebody begins.
    """

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500
    create_response: bool = True
    interrupt_response: bool = True

    @classmethod
    def create(cls, values: Mapping[str, Any]) -> TurnDetection:
        """From ``turn_detection``.

        Raises:
          InputError: for another kind, an unknown name, or a value out of range.
        """
        where = "session.audio.input.turn_detection"
        if values.get("type") != "server_vad":
            raise InputError(f"{where}.type is {shown(values.get('type'))}; it must be 'server_vad', or null for none")
        names = [f.name for f in dataclasses.fields(cls)]
        check_names(f"field of {where}", values, ["type", "idle_timeout_ms", *names])
        _check_neutral(where, values, ("idle_timeout_ms",))
        given = {name: values[name] for name in names if values.get(name) is not None}
        check_float(f"{where}.threshold", given.get("threshold", 0.5), 0, 1)
        for name in ("prefix_padding_ms", "silence_duration_ms"):
            check_int(f"{where}.{name}", given.get(name, 0), 0, _MAX_MILLISECONDS)
        for name in ("create_response", "interrupt_response"):
            if not isinstance(given.get(name, True), bool):
                raise InputError(f"{where}.{name} is {shown(given[name])}; it must be true or false")
        return cls(**given)


@dataclass(frozen=True)
class SessionConfig:
    """A session's settings; ``update`` makes the next ones.

    Attributes:
      instructions: the system prompt.
      output_modality: "audio", or "text" alone.
      input_format, output_format: of sound, one of ``RATES``.
      turn_detection: when the server takes turns; None: the client says so.
      transcribes: whether what is said is to be written down for the client.
      voice: who speaks; the checkpoint's default voice if None.
      max_tokens: of a reply.
      sampling: how the text's tokens are drawn; no field of OpenAI's.
      talker: how codes are drawn, likewise.
    """

    instructions: str = SPEECH_SYSTEM_PROMPT
    output_modality: str = "audio"
    input_format: str = "audio/pcm"
    output_format: str = "audio/pcm"
    turn_detection: TurnDetection | None = field(default_factory=TurnDetection)
    transcribes: bool = False
    voice: str | ClonedVoice | None = None
    max_tokens: int = MAX_TOKENS
    sampling: Mapping[str, Any] = field(default_factory=dict)
    talker: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> Options:
        """How replies are made.

        Raises:
          InputError: for a wrong number among those of sampling.
        """
        modalities = ("text", "audio") if self.output_modality == "audio" else ("text",)
        speech = {"voice": self.voice, "talker": dict(self.talker)} if self.output_modality == "audio" else {}
        return Options.create(modalities=modalities, max_tokens=self.max_tokens, **self.sampling, **speech)

    def update(self, values: Mapping[str, Any]) -> SessionConfig:
        """The settings after a ``session.update`` or the fields of a ``response.create``.

        Args:
          values: of OpenAI's object; what is not there stays.

        Raises:
          InputError: for what is unknown, or cannot be done.
        """
        known = ("type", "model", "instructions", "output_modalities", "audio", "max_output_tokens", "sampling")
        check_names("field of session", values, [*known, "talker", *_NEUTRAL])
        if values.get("type", "realtime") != "realtime":
            raise InputError(f"session.type is {shown(values['type'])}; it must be 'realtime'")
        _check_neutral("session", values, tuple(_NEUTRAL))
        changes: dict[str, Any] = {}
        if values.get("instructions") is not None:
            changes["instructions"] = _read_text("session.instructions", values["instructions"])
        if values.get("output_modalities") is not None:
            modalities = values["output_modalities"]
            if modalities not in _MODALITIES:
                raise InputError(f'session.output_modalities is {shown(modalities)}; it must be ["audio"] or ["text"]')
            changes["output_modality"] = modalities[0]
        if values.get("max_output_tokens") is not None:
            most = values["max_output_tokens"]
            changes["max_tokens"] = MAX_TOKENS if most == "inf" else check_int("max_output_tokens", most, 1)
        for name in ("sampling", "talker"):
            if values.get(name) is not None:
                changes[name] = _read_object(f"session.{name}", values[name], [*SamplingParams.names(), "max_tokens"])
        changes |= self._read_audio(values.get("audio"))
        changed = dataclasses.replace(self, **changes)
        _ = changed.options  # for its errors
        return changed

    def describe(self) -> dict[str, Any]:
        """OpenAI's object."""
        detection = None
        if self.turn_detection is not None:
            detection = {"type": "server_vad", **dataclasses.asdict(self.turn_detection)}
        audio = {
            "input": {
                "format": _describe_format(self.input_format),
                "turn_detection": detection,
                "transcription": {"model": "the same"} if self.transcribes else None,
                "noise_reduction": None,
            },
            "output": {
                "format": _describe_format(self.output_format),
                "voice": self.voice if isinstance(self.voice, str) else None,
                "speed": 1.0,
            },
        }
        return {
            "type": "realtime",
            "object": "realtime.session",
            "instructions": self.instructions,
            "output_modalities": [self.output_modality],
            "audio": audio,
            "max_output_tokens": self.max_tokens,
            "tools": [],
            "tool_choice": "auto",
        }

    def _read_audio(self, value: Any) -> dict[str, Any]:
        if value is None:
            return {}
        audio = _read_object("session.audio", value, ("input", "output"))
        changes: dict[str, Any] = {}
        known = ("format", "turn_detection", "transcription", "noise_reduction")
        # null counts here: it switches off
        given = value.get("input") or {}
        listened = _read_object("session.audio.input", given, known)
        _check_neutral("session.audio.input", given, ("noise_reduction",))
        if "format" in listened:
            changes["input_format"] = _read_format("session.audio.input.format", listened["format"])
        if "turn_detection" in given:
            detection = given["turn_detection"]
            changes["turn_detection"] = None
            if detection is not None:
                read = _read_object("session.audio.input.turn_detection", detection, None)
                changes["turn_detection"] = TurnDetection.create(read)
        if "transcription" in given:
            changes["transcribes"] = given["transcription"] is not None
        spoken = _read_object("session.audio.output", audio.get("output") or {}, ("format", "voice", "speed"))
        _check_neutral("session.audio.output", spoken, ("speed",))
        if "format" in spoken:
            changes["output_format"] = _read_format("session.audio.output.format", spoken["format"])
        if "voice" in spoken:
            changes["voice"] = parse_voice(spoken["voice"], "session.audio.output.voice")
        return changes


def _describe_format(audio_format: str) -> dict[str, Any]:
    rate = {"rate": RATES[audio_format]} if audio_format == "audio/pcm" else {}
    return {"type": audio_format, **rate}


def _read_format(where: str, value: Any) -> str:
    values = _read_object(where, value, ("type", "rate"))
    audio_format = values.get("type")
    if audio_format not in RATES:
        raise InputError(f"{where}.type is {shown(audio_format)}; it must be one of {', '.join(RATES)}")
    assert isinstance(audio_format, str)
    if values.get("rate", RATES[audio_format]) != RATES[audio_format]:
        raise InputError(f"{where}.rate is {shown(values['rate'])}; it must be {RATES[audio_format]}")
    return audio_format


def _read_text(where: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_INSTRUCTIONS:
        raise InputError(f"{where} is {shown(value)}; it must be a text of up to {MAX_INSTRUCTIONS} characters")
    return value


def _read_object(where: str, value: Any, known: Sequence[str] | None) -> dict[str, Any]:
    """The fields of an object that are not null."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be an object, got {type(value).__name__}")
    if known is not None:
        check_names(f"field of {where}", value, known)
    return {name: item for name, item in value.items() if item is not None}


def _check_neutral(where: str, values: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name in values and values[name] is not None and values[name] not in _NEUTRAL[name]:
            raise InputError(f"{where}.{name} is {shown(values[name])}, which this server does not do")
