"""From messages to a prompt, and from a reply's tokens to text: what a checkpoint folder says about both."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeAlias

import numpy as np
from PIL import Image

from omni_jax.checks import shown
from omni_jax.config import OmniConfig
from omni_jax.config_file import GENERATION_CONFIG_FILE
from omni_jax.errors import CheckpointError, InputError, TooLongError
from omni_jax.plain_files import has_file, read_object
from omni_jax.processing import media
from omni_jax.processing.audio import audio_input, min_samples
from omni_jax.processing.chat import (
    REPLY_HEADER,
    ChatTemplate,
    MediaPart,
    Message,
    TextPart,
    parse_messages,
    split_at_replies,
)
from omni_jax.processing.fetch import NO_ACCESS, RemoteAccess, fetch_source
from omni_jax.processing.images import read_image
from omni_jax.processing.layout import (
    AudioInput,
    Item,
    Prompt,
    TokenBudget,
    VisionInput,
    lay_out,
    media_tokens,
)
from omni_jax.processing.processor_config import ProcessorConfig
from omni_jax.processing.sources import describe_source, is_located
from omni_jax.processing.tokenizer import TextStream, TextTokenizer
from omni_jax.processing.vision import FrameResizer, image_input, pack_frames
from omni_jax.processing.voice_clip import VoiceClip, read_clip
from omni_jax.processing.worker_pool import WorkerStartError

LiveKind: TypeAlias = Literal["audio", "video"]  # media that may come while a prompt is read

_MAX_STOP_IDS = 100


class MediaReader(Protocol):
    """What reads media for a processor in other processes, see ``media_workers``."""

    def read_media(
        self, settings: ProcessorConfig, part: MediaPart, assume_fps: float | None, budget: TokenBudget
    ) -> Item:
        """What ``Processor.read_media`` makes of an item with these settings."""
        ...

    def read_picture(self, source: Any) -> Image.Image:
        """What ``images.read_image`` makes of a source."""
        ...

    def read_clip(self, source: Any, rate: int | None) -> VoiceClip:
        """What ``Processor.read_clip`` makes of a source."""
        ...


class Processor:
    """Turns messages into prompts, and tokens into text.

    Attributes:
      stop_ids: tokens that end a reply.
      folder: of the files that it was loaded from, if it was.
    """

    def __init__(
        self,
        config: OmniConfig,
        tokenizer: TextTokenizer,
        template: ChatTemplate,
        settings: ProcessorConfig,
        *,
        stop_ids: Sequence[int],
        access: RemoteAccess = NO_ACCESS,
    ) -> None:
        settings.check(config)
        self.config = config
        self.settings = settings
        self.tokenizer = tokenizer
        self.stop_ids = tuple(stop_ids)
        self._template = template
        self._access = access
        self._media_reader: MediaReader | None = None
        self.folder: Path | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, access: RemoteAccess = NO_ACCESS) -> Self:
        """Reads a checkpoint folder: config, tokenizer, chat template, preprocessor and generation configs.

        Args:
          folder: with ``config.json``, ``tokenizer.json`` and ``preprocessor_config.json``; the others may be missing.
          access: from which hosts and buckets media may be fetched.

        Raises:
          CheckpointError: if a file is missing or broken.
          ConfigError: if a file says what the model is not made for.
        """
        path = Path(folder)
        config = OmniConfig.load(path)
        tokenizer = TextTokenizer.load(path)
        # a tokenizer of Qwen2.5-VL has the same ids under other names, and would split the template's tokens
        _check_special_tokens(tokenizer, config, path)
        template = ChatTemplate.load(path)
        settings = ProcessorConfig.load(path)
        stop_ids = _load_stop_ids(path, config)
        processor = cls(config, tokenizer, template, settings, stop_ids=stop_ids, access=access)
        processor.folder = path
        return processor

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Message],
        *,
        assume_fps: float | None = None,
        add_generation_prompt: bool = True,
        max_length: int | None = None,
    ) -> Prompt:
        """Reads messages and their media.

        Args:
          messages: see ``omni_jax.processing.chat``.
          assume_fps: the rate that videos are taken to be sampled at, as the reference's processor has it (2 by default
            there); None: the rate that they are in truth.
          add_generation_prompt: whether to end with the beginning of a reply.
          max_length: how many tokens are allowed; the model's context if None.

        Raises:
          InputError: for anything in the request that cannot be served, naming its place.
        """
        parsed = parse_messages(messages)
        pieces = self._template.render(parsed, add_generation_prompt=add_generation_prompt)
        return self._build_prompt(parsed, self.tokenizer.encode(pieces), assume_fps, max_length)

    def dialogue(
        self, messages: Sequence[Mapping[str, Any]], *, max_length: int | None = None
    ) -> tuple[Prompt, np.ndarray]:
        """Reads a dialogue for training.

        Args:
          messages: see ``omni_jax.processing.chat``.
          max_length: how many tokens are allowed; the model's context if None.

        Returns:
          The dialogue, and of each token which of the assistant's messages it is of, the token that ends the message
          among them; -1 for headers, other messages and placeholders. int32 [T]

        Raises:
          InputError: for anything in it that cannot be used, naming its place.
        """
        parsed = parse_messages(messages)
        # cut behind each header, for a reply that is generated begins at a token of its own
        parts = split_at_replies(self._template.render(parsed, add_generation_prompt=False))
        ids: list[int] = []
        for part in parts:
            ids += self.tokenizer.encode(part)
        prompt = self._build_prompt(parsed, ids, None, max_length)
        replies = self._find_replies(prompt)
        # replies that another template writes in another way are not found, and training would learn nothing of them
        num_found = replies.max(initial=-1) + 1
        num_replies = sum(message.role == "assistant" for message in parsed)
        if num_found != num_replies:
            raise InputError(
                f"the chat template wrote {num_found} replies as ChatML has them "
                f"({REPLY_HEADER!r} to '<|im_end|>'), but the messages hold {num_replies}"
            )
        return prompt, replies

    def document(self, text: str, *, max_length: int | None = None) -> Prompt:
        """A text without roles, and the token that ends it; names of special tokens in it are plain letters.

        Raises:
          InputError: if it is empty or too long.
        """
        if not text:
            raise InputError("the text is empty")
        ids = self.tokenizer.encode([(text, False), ("<|endoftext|>", True)])
        prompt = lay_out(ids, (), self.config.thinker_config)
        self._check_length(prompt, (), (), max_length)
        return prompt

    def encode_reply(self, text: str) -> tuple[int, ...]:
        """The tokens of a reply of this text, with the one that ends it; as in ``dialogue``."""
        return tuple(self.tokenizer.encode([(text, False), ("<|im_end|>", True)]))

    def before_media(self, messages: Sequence[Message], kind: LiveKind, *, assume_fps: float | None = None) -> Prompt:
        """What stands before media that are still to come, in a last message of the user's.

        Args:
          messages: that come before, see ``parse_messages``; maybe none.
          kind: of the media. Their begin token is not part of the result.
          assume_fps: see ``__call__``.

        Raises:
          InputError: for anything in the messages that cannot be served, naming its place.
        """
        return self._build_prompt(messages, self._around_media(messages, kind, "")[0], assume_fps, None)

    def after_media(self, messages: Sequence[Message], kind: LiveKind, text: str) -> list[int]:
        """The ids that follow the end token of these media: more text of the user's, and the beginning of a reply."""
        return self._around_media(messages, kind, text)[1]

    def with_pixels(self, **changes: float) -> Self:
        """The same processor with other ``PixelSettings``, as their ``with_changes`` makes them."""
        other = copy.copy(self)
        other.settings = dataclasses.replace(self.settings, pixels=self.settings.pixels.with_changes(changes))
        return other

    def with_access(self, access: RemoteAccess) -> Self:
        """The same processor with other hosts and buckets that media may be fetched from."""
        other = copy.copy(self)
        other._access = access
        return other

    def with_media_reader(self, media_reader: MediaReader) -> Self:
        """The same processor, whose media are read by another, see ``media_workers.isolate``."""
        other = copy.copy(self)
        other._media_reader = media_reader
        return other

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a reply; special tokens give none."""
        return self.tokenizer.decode(ids)

    def text_stream(self) -> TextStream:
        """Takes a reply's tokens one by one and gives its text in complete characters."""
        return TextStream(self.tokenizer)

    def _around_media(self, messages: Sequence[Message], kind: LiveKind, text: str) -> tuple[list[int], list[int]]:
        """The ids before the begin token and after the end token of media in a last message."""
        c = self.config.thinker_config
        begin, placeholder, end = {
            "audio": (c.audio_start_token_id, c.audio_token_index, c.audio_end_token_id),
            "video": (c.vision_start_token_id, c.video_token_index, c.vision_end_token_id),
        }[kind]
        content: tuple[MediaPart | TextPart, ...] = (MediaPart(kind, None, "the media to come"),)
        if text:
            content = (*content, TextPart(text))
        ids = self.tokenizer.encode(self._template.render((*messages, Message("user", content))))
        # the last placeholder: earlier messages may have media of the same kind
        places = [i for i, token in enumerate(ids) if token == placeholder]
        place = places[-1] if places else 0
        if ids[max(place - 1, 0) : place + 2] != [begin, placeholder, end]:
            raise InputError(f"the chat template must put {kind} of a user between a begin and an end token")
        return ids[: place - 1], ids[place + 2 :]

    def _build_prompt(
        self, messages: Sequence[Message], ids: Sequence[int], assume_fps: float | None, max_length: int | None
    ) -> Prompt:
        """Reads the media of messages, and puts them in the places that the template has left."""
        parts = [part for message in messages for part in message.media]
        items: list[Item] = []
        budget = TokenBudget(self._max_length(max_length))
        for part in parts:
            item = self._read_item(part, assume_fps, budget)
            items.append(item)
            budget = dataclasses.replace(budget, used=budget.used + self._count_tokens(item))
        prompt = lay_out(ids, items, self.config.thinker_config)
        self._check_length(prompt, parts, items, max_length)
        return prompt

    def _find_replies(self, prompt: Prompt) -> np.ndarray:
        """Which reply each token is of, see ``dialogue``. Users cannot write the tokens that are looked for."""
        header = np.asarray(self.tokenizer.encode([(REPLY_HEADER, True)]))  # [tokens of the header]
        replies = np.full(len(prompt), -1, np.int32)
        ends = np.flatnonzero(prompt.tokens == self.tokenizer.special_id("<|im_end|>"))
        number = 0
        # the header's first token begins messages of all roles, so the rest of it is compared too
        for begin in np.flatnonzero(prompt.tokens == header[0]).tolist():
            if not np.array_equal(prompt.tokens[begin : begin + len(header)], header):
                continue
            ends_after = ends[ends > begin]
            if not len(ends_after):
                break
            replies[begin + len(header) : ends_after[0] + 1] = number
            number += 1
        # a template could put media into a reply, and placeholders are no targets
        return np.where(prompt.media_item < 0, replies, -1).astype(np.int32)

    def _read_item(self, part: MediaPart, assume_fps: float | None, budget: TokenBudget) -> Item:
        """Reads one item of media, here or in another process.

        Raises:
          InputError: if it cannot be read, naming its place and the file.
          WorkerStartError: if the processes that read it cannot be started.
        """
        try:
            if self._media_reader is not None:
                return self._media_reader.read_media(self.settings, part, assume_fps, budget)
            return self.read_media(part, assume_fps, budget)
        except WorkerStartError:  # no fault of this item
            raise
        except InputError as e:
            raise InputError(f"{_describe_part(part)}: {e}") from e
        except MemoryError:  # of the whole process, or of a worker, which says what its limit is
            raise
        except Exception as e:  # whatever a library makes of a file of a stranger's
            raise InputError(f"{_describe_part(part)}: cannot read it: {type(e).__name__}: {e}") from e

    def read_media(self, part: MediaPart, assume_fps: float | None, budget: TokenBudget) -> Item:
        """Reads one item of media in this process.

        Args:
          part: of a message.
          assume_fps: see ``__call__``.
          budget: over which it is refused, before it takes memory where that can be told.

        Raises:
          InputError: if it cannot be read.
        """
        part = dataclasses.replace(part, source=self._fetch(part))
        if part.kind == "image":
            return image_input(read_image(part.source), self.settings.pixels, part.options, budget)
        if part.kind == "audio":
            sound = self._read_audio(part)
            # one sound is bounded in seconds; many of them are by this
            budget.check(sound.tokens)
            return sound
        return self._read_video(part, assume_fps, budget)

    def read_picture(self, source: Any) -> Image.Image:
        """A picture that comes alone, decoded where media are; see ``images.read_image``, also for what is raised."""
        # pixels are no file of a stranger's
        if self._media_reader is None or isinstance(source, np.ndarray):
            return read_image(source)
        return self._media_reader.read_picture(source)

    def read_clip(self, source: Any, rate: int | None = None) -> VoiceClip:
        """A recording of a voice; see ``voice_clip.read_clip``, also for what is raised."""
        if self._media_reader is not None:  # whose processor names the clip in its errors
            return self._media_reader.read_clip(source, rate)
        try:
            return read_clip(fetch_source(source, self._access), rate)
        except InputError as e:
            raise InputError(f"voice: ref_audio ({describe_source(source)}): {e}") from e

    def _fetch(self, part: MediaPart) -> Any:
        """The source, fetched if it is on the web or in a bucket; of a list of frames each when it is asked for."""
        if part.kind == "video" and isinstance(part.source, list | tuple):
            return _FetchedFrames(part.source, self._access)
        return fetch_source(part.source, self._access)

    def _read_audio(self, part: MediaPart) -> AudioInput:
        mel = self.settings.mel
        options = part.options
        begin = options.get("audio_start", 0.0)
        end = options.get("audio_end", math.inf)
        if is_located(part.source):
            if "sampling_rate" in options:
                raise InputError("sampling_rate is for an array of samples; a file knows its own")
            sound = media.read_sound(part.source, mel, begin=begin, end=end)
            return audio_input(sound.samples, mel, sound.num_bad_packets)
        if not isinstance(part.source, np.ndarray):
            raise InputError(f"a sound must be a path, a URL, bytes or an array, got {type(part.source).__name__}")
        if "sampling_rate" not in options:
            raise InputError("an array of samples needs its sampling_rate beside it")
        samples = media.array_audio(part.source, options["sampling_rate"], mel, begin=begin, end=end)
        return audio_input(samples, mel)

    def _read_video(self, part: MediaPart, assume_fps: float | None, budget: TokenBudget) -> Item:
        options = part.options
        pixels = self.settings.pixels
        wants_sound = options.get("use_audio_in_video", "auto")
        video = media.read_video(
            part.source,
            pixels,
            options,
            mel=self.settings.mel if wants_sound else None,
            resize=FrameResizer(pixels, options, budget),
        )
        # of a list of pictures, they are read only now, one by one
        frames = list(video.frames)
        vision = pack_frames(frames, assume_fps or video.fps, pixels, video.num_bad_packets)
        if wants_sound is True and not video.has_audio:
            raise InputError('use_audio_in_video is true, but it has no sound; "auto" hears a video only if it has')
        # a request that asks for sound by name must not lose it silently; "auto" takes what there is
        sound = video.sound
        if not wants_sound or not video.has_audio:
            return vision
        if sound is None or len(sound.samples) < min_samples(self.settings.mel):
            if wants_sound is True:
                raise InputError('use_audio_in_video is true, but its sound is not in this range; "auto" allows it')
            return vision
        return vision, audio_input(sound.samples, self.settings.mel, sound.num_bad_packets)

    def _check_length(
        self, prompt: Prompt, parts: Sequence[MediaPart], items: Sequence[Item], max_length: int | None
    ) -> None:
        limit = self._max_length(max_length)
        if len(prompt) <= limit:
            return
        usage = prompt.usage
        kinds = ", ".join(f"{getattr(usage, kind)} {kind}" for kind in ("text", "image", "video", "audio"))
        message = f"the prompt has {len(prompt)} tokens, over the limit of {limit} ({kinds})"
        # what is too long is mostly one medium, so the error names the largest
        sizes = [self._count_tokens(item) for item in items]
        if sizes:
            largest = int(np.argmax(sizes))
            message += f"; the largest item is {_describe_part(parts[largest])} with {sizes[largest]}"
        raise TooLongError(
            f"{message}; shorten it, or let media take fewer tokens (max_pixels, fps, nframes, a time range)"
        )

    def _max_length(self, max_length: int | None) -> int:
        return self.config.thinker_config.text_config.max_position_embeddings if max_length is None else max_length

    def _count_tokens(self, item: Item) -> int:
        parts: tuple[AudioInput | VisionInput, ...] = item if isinstance(item, tuple) else (item,)
        return sum(media_tokens(part, self.config.thinker_config) for part in parts)


class _FetchedFrames(Sequence[Any]):
    """Frames of a video, some of which may have to be fetched: one is in memory at a time."""

    def __init__(self, frames: Sequence[Any], access: RemoteAccess) -> None:
        self._frames = frames
        self._access = access

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: Any) -> Any:
        try:
            return fetch_source(self._frames[index], self._access)
        except InputError as e:
            raise InputError(f"frame {index}: {e}") from e


def _describe_part(part: MediaPart) -> str:
    return f"{part.where} ({part.kind} {describe_source(part.source)})"


def _check_special_tokens(tokenizer: TextTokenizer, config: OmniConfig, folder: Path) -> None:
    """Raises CheckpointError unless the media tokens of the config have a name in the tokenizer."""
    thinker = config.thinker_config
    wanted = {
        "<|AUDIO|>": thinker.audio_token_index,
        "<|IMAGE|>": thinker.image_token_index,
        "<|VIDEO|>": thinker.video_token_index,
        "<|audio_bos|>": thinker.audio_start_token_id,
        "<|audio_eos|>": thinker.audio_end_token_id,
        "<|vision_bos|>": thinker.vision_start_token_id,
        "<|vision_eos|>": thinker.vision_end_token_id,
    }
    for name, token in wanted.items():
        if tokenizer.special_id(name) != token:
            found = tokenizer.special_id(name)
            raise CheckpointError(
                f"{folder / 'tokenizer.json'}: {name} is token {found}, but config.json has it as {token}; "
                "the tokenizer is of another model"
            )


def _load_stop_ids(folder: Path, config: OmniConfig) -> tuple[int, ...]:
    """What ends a reply: the generation config's end tokens, else the model config's."""
    path = folder / GENERATION_CONFIG_FILE
    stop = read_object(path).get("eos_token_id") if has_file(path) else None
    if stop is None:
        stop = config.thinker_config.eos_token_id
    ids = stop if isinstance(stop, list) else [stop]
    vocab_size = config.thinker_config.text_config.vocab_size
    if len(ids) > _MAX_STOP_IDS or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(
            f"{path}: eos_token_id must be a token under {vocab_size} or up to {_MAX_STOP_IDS} of them, "
            f"got {shown(stop)}"
        )
    return tuple(ids)
