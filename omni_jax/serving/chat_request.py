"""OpenAI's chat completions: the body of a request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omni_jax.checks import SEED_MAX, check_int, check_names, shown
from omni_jax.engine.sampling import SamplingParams
from omni_jax.errors import InputError
from omni_jax.generation.cloned_voice import ClonedVoice
from omni_jax.generation.options import Options
from omni_jax.processing.chat import MediaPart, Message, parse_messages
from omni_jax.serving.sound_formats import SOUND_FORMATS

MAX_PARTS = 32_768  # of all messages; the context has no room for more, and each takes memory of this process

# what changes nothing: there is one model, and nobody is billed
_IGNORED = (
    "model user metadata store service_tier safety_identifier prompt_cache_key stream_options parallel_tool_calls"
).split()
# what this model does not do, with the values that do not ask for it either
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "min_p": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
# what each part of sampling_params_list may have
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
_THINKER = (*_SAMPLING, "max_tokens", "stop", "stop_token_ids")
_TALKER = (*_SAMPLING, "max_tokens")
# of a clip as the voice; an array, which has a sampling rate, comes in no body
_CLIP = ("ref_audio", "ref_text", "like", "speaker_vector")
_MAX_VECTOR = 4096  # numbers
_STAGES = ("Thinker", "Talker", "Token2Wav")
# of mm_processor_kwargs, which media each option is for
_MEDIA_OPTIONS = {
    "image": ("min_pixels", "max_pixels"),
    "video": ("use_audio_in_video", "fps", "min_pixels", "max_pixels"),
}


@dataclass(frozen=True)
class ChatRequest:
    """A body that was found right.

    Attributes:
      messages: what is asked.
      options: how it is to be answered.
      audio_format: of the speech.
      return_token_ids: whether the answer is to hold the ids of text and speech.
      word_timestamps: whether it is to say when each word is spoken.
    """

    messages: tuple[Message, ...]
    options: Options
    audio_format: str = "wav"
    return_token_ids: bool = False
    word_timestamps: bool = False

    def with_options(self, options: Options) -> ChatRequest:
        """The same with other options."""
        return dataclasses.replace(self, options=options)


@dataclass
class _Fields:
    """What has been read of a body."""

    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of ``Options``
    media_options: dict[str, Any] = field(default_factory=dict)
    audio_format: str | None = None
    return_token_ids: bool = False
    word_timestamps: bool = False


def parse_body(body: Any) -> ChatRequest:
    """Reads the body of a chat completion.

    Args:
      body: OpenAI's ``messages``, ``modalities``, ``audio``, ``max_completion_tokens`` or ``max_tokens``,
        ``temperature``, ``top_p``, ``seed``, ``stop``; and of vLLM's ``top_k``, ``repetition_penalty``,
        ``stop_token_ids``, ``mm_processor_kwargs``, ``return_token_ids`` and ``sampling_params_list``, whose parts are
        for the Thinker, the Talker and Token2Wav; ``adapter``, the name of one that is loaded; and ``reply_text``, what
        is to be spoken in place of an answer. Of what else OpenAI and vLLM have, the values that ask for nothing are
        taken.

    Raises:
      InputError: for anything else, and for a value that cannot be used.
    """
    if not isinstance(body, Mapping):
        raise InputError(f"body must be an object, got {type(body).__name__}")
    # clients of OpenAI's send null for all that they do not set
    values = {name: value for name, value in body.items() if value is not None}
    # an unknown field is an error: a misspelt option must not be passed over
    check_names("field of the body", values, ["messages", *_READERS, *_IGNORED, *_NEUTRAL])
    if "messages" not in values:
        raise InputError("body: messages is missing")
    # what this model cannot do may still be sent with the value that does not ask for it
    for name, neutral in _NEUTRAL.items():
        if name in values:
            _check_neutral(name, values[name], neutral)
    fields = _Fields()
    for name, read in _READERS.items():  # in this order: sampling_params_list goes before what stands beside it
        if name in values:
            read(values[name], fields)
    messages = _add_media_options(parse_messages(values["messages"]), fields.media_options)
    _check_num_parts(messages)
    # checks the numbers, and fills in what the body does not have
    options = Options.create(**fields.options)
    if fields.audio_format is not None and not options.speaks:
        raise InputError('body: audio was given, but modalities does not have "audio"')
    audio_format = fields.audio_format or SOUND_FORMATS[0]
    return ChatRequest(messages, options, audio_format, fields.return_token_ids, fields.word_timestamps)


def _check_num_parts(messages: Sequence[Message]) -> None:
    """Counts messages without parts, parts, and the pictures that a video is given as."""
    num_parts = 0
    for message in messages:
        num_parts += 1 if isinstance(message.content, str) else len(message.content)
        for part in message.media:
            num_parts += len(part.source) if isinstance(part.source, list) else 0
    if num_parts > MAX_PARTS:
        raise InputError(f"body: messages have {num_parts} parts, over the limit of {MAX_PARTS}")


def _check_neutral(name: str, value: Any, neutral: Sequence[Any]) -> None:
    for one in neutral:
        # true is no 1, and false no 0, though Python takes them for equal
        if value == one and isinstance(value, bool) == isinstance(one, bool):
            return
    known = " or ".join(map(repr, neutral))
    raise InputError(f"body: {name} is {shown(value)}; only {known} is supported")


def _read_object(value: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    """The fields of an object that are not null."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be an object, got {type(value).__name__}")
    fields = {name: item for name, item in value.items() if item is not None}
    check_names(f"field of {where}", fields, known)
    return fields


def _read_sampling_params(value: Any, fields: _Fields) -> None:
    if not isinstance(value, list) or len(value) > len(_STAGES):
        raise InputError(f"body: sampling_params_list must be a list of up to three objects: {', '.join(_STAGES)}")
    # a shorter list, or null in place of a part, leaves a stage its defaults
    parts = []
    for i, known in enumerate((_THINKER, _TALKER, ("seed",))):
        part = value[i] if i < len(value) and value[i] is not None else {}
        parts.append(_read_object(part, f"sampling_params_list[{i}]", known))
    thinker, talker, token2wav = parts
    for name, item in thinker.items():
        fields.options[name] = _read_option(name, item)
    if talker:
        _check_talker(talker)
        fields.options["talker"] = talker
    if "seed" in token2wav:
        fields.options["noise_seed"] = check_int("sampling_params_list[2].seed", token2wav["seed"], 0, SEED_MAX)


def _check_talker(values: Mapping[str, Any]) -> None:
    """Checks the Talker's numbers as far as that can be done without a model, which limits max_tokens further."""
    sampling = {name: value for name, value in values.items() if name in _SAMPLING}
    try:
        SamplingParams(**sampling)
        if "max_tokens" in values:
            check_int("max_tokens", values["max_tokens"], 1)
    except InputError as e:
        raise InputError(f"sampling_params_list[1].{e}") from e


def _read_option(name: str, value: Any) -> Any:
    """An option of the Thinker in the form that ``Options`` takes; numbers are checked there."""
    # OpenAI takes one string or several
    if name == "stop":
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
            raise InputError(f"body: stop is {shown(value)}; it must be a string or a list of strings")
        return tuple(stops)
    if name == "stop_token_ids":
        if not isinstance(value, list):
            raise InputError(f"body: stop_token_ids is {shown(value)}; it must be a list of whole numbers")
        return tuple(value)
    return value


def _option_reader(option: str) -> Callable[[Any, _Fields], None]:
    def read(value: Any, fields: _Fields) -> None:
        fields.options[option] = _read_option(option, value)

    return read


def _read_modalities(value: Any, fields: _Fields) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f'body: modalities is {shown(value)}; it must be ["text"] or ["text", "audio"]')
    fields.options["modalities"] = tuple(value)


def _read_audio(value: Any, fields: _Fields) -> None:
    audio = _read_object(value, "audio", ("voice", "format", "word_timestamps"))
    audio_format = audio.get("format", SOUND_FORMATS[0])
    if audio_format not in SOUND_FORMATS:
        raise InputError(f"body: audio.format is {shown(audio_format)}; it must be one of {', '.join(SOUND_FORMATS)}")
    fields.audio_format = audio_format
    fields.word_timestamps = read_yes_or_no(audio.get("word_timestamps", False), "audio.word_timestamps")
    voice = parse_voice(audio.get("voice"), "audio.voice")
    if voice is not None:
        fields.options["voice"] = voice


def parse_voice(voice: Any, where: str) -> str | ClonedVoice | None:
    """A name, or as OpenAI has it for voices of one's own {"id": name}; or a clip. Names are checked by the model.

    Raises:
      InputError: for anything else, naming ``where``.
    """
    if isinstance(voice, Mapping) and "id" not in voice:
        values = _read_object(voice, where, _CLIP)
        source = values.get("ref_audio")
        if not isinstance(source, str):
            raise InputError(f"body: {where}.ref_audio is {shown(source)}; it must be a path or a URL")
        vector = values.get("speaker_vector", [])
        if not isinstance(vector, list) or len(vector) > _MAX_VECTOR:
            raise InputError(f"body: {where}.speaker_vector is {shown(vector)}; it must be a list of numbers")
        return ClonedVoice.create(values)
    if isinstance(voice, Mapping):
        voice = voice["id"]
    if voice is not None and not isinstance(voice, str):
        raise InputError(f"body: {where} is {shown(voice)}; it must be a name, or a clip with its ref_audio")
    return voice


def _read_media_options(value: Any, fields: _Fields) -> None:
    known = sorted(set().union(*_MEDIA_OPTIONS.values()))
    fields.media_options = _read_object(value, "mm_processor_kwargs", known)


def _read_return_token_ids(value: Any, fields: _Fields) -> None:
    fields.return_token_ids = read_yes_or_no(value, "return_token_ids")


def read_yes_or_no(value: Any, where: str) -> bool:
    """A field that is true or false.

    Raises:
      InputError: for anything else, naming ``where``.
    """
    if not isinstance(value, bool):
        raise InputError(f"body: {where} is {shown(value)}; it must be true or false")
    return value


# in the order in which they are read: what comes later replaces what came before, so a field of the body outweighs
# the first part of the list
_READERS: dict[str, Callable[[Any, _Fields], None]] = {
    "sampling_params_list": _read_sampling_params,
    "modalities": _read_modalities,
    "audio": _read_audio,
    "max_tokens": _option_reader("max_tokens"),
    "max_completion_tokens": _option_reader("max_tokens"),
    "temperature": _option_reader("temperature"),
    "top_k": _option_reader("top_k"),
    "top_p": _option_reader("top_p"),
    "repetition_penalty": _option_reader("repetition_penalty"),
    "seed": _option_reader("seed"),
    "stop": _option_reader("stop"),
    "stop_token_ids": _option_reader("stop_token_ids"),
    "mm_processor_kwargs": _read_media_options,
    "return_token_ids": _read_return_token_ids,
    "adapter": _option_reader("adapter"),
    "reply_text": _option_reader("reply_text"),
}


def _add_media_options(messages: Sequence[Message], options: Mapping[str, Any]) -> tuple[Message, ...]:
    """Gives every picture and video the options that the request has for all of them, unless it has its own."""
    if not options:
        return tuple(messages)
    checked: dict[str, Mapping[str, Any]] = {}
    for kind, names in _MEDIA_OPTIONS.items():
        # parsed as if they stood in a part, so that a wrong one is found
        own = {name: options[name] for name in names if name in options}
        (message,) = parse_messages([{"role": "user", "content": [{"type": kind, kind: "?", **own}]}])
        checked[kind] = message.media[0].options

    def add_options(part: MediaPart) -> MediaPart:
        return dataclasses.replace(part, options={**checked.get(part.kind, {}), **part.options})

    return map_media(messages, add_options)


def map_media(messages: Sequence[Message], change: Callable[[MediaPart], MediaPart]) -> tuple[Message, ...]:
    """The messages with every item of media changed."""
    # messages are frozen: what is changed is made anew
    changed = []
    for message in messages:
        if isinstance(message.content, str):
            changed.append(message)
            continue
        parts = [change(part) if isinstance(part, MediaPart) else part for part in message.content]
        changed.append(Message(message.role, tuple(parts)))
    return tuple(changed)
