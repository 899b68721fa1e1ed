"""Rows of spoken dialogues to examples: what the Thinker reads, and the codes of its last reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from flax import struct
from jaxtyping import Float, Int

from omni_jax.config import OmniConfig
from omni_jax.data.examples import Example, Reject, TooLong, examples_or_reject, make_example
from omni_jax.data.rows import Document, VideoSound, read_row, row_values
from omni_jax.data.sources import Row
from omni_jax.data.spoken_rows import Clip, Speech, SpeechReader
from omni_jax.errors import InputError
from omni_jax.models.talker_conditioning import stream_length
from omni_jax.processing.clip_text import read_clip_text
from omni_jax.processing.layout import Prompt
from omni_jax.processing.processor import Processor


@struct.dataclass
class SpokenExample:
    """A dialogue whose last reply is spoken.

    The Thinker reads the dialogue, and the text of a clip in a dialogue of its own; tokens are counted in each.
    """

    dialogue: Example
    clip: Example | None  # what the Thinker reads of a clip's text, which ends with the last token of the text
    answers: tuple[Int[np.ndarray, " K"], ...]  # codes that the reply may be spoken with, without an end
    clip_codes: Int[np.ndarray, " J"]  # of the clip; none without one
    reference: Float[np.ndarray, " answers"]  # log-probability that each has by a reference; 0 where there is none
    prompt_length: int = struct.field(pytree_node=False)  # L, tokens of the dialogue before the reply
    num_reply_rows: int = struct.field(pytree_node=False)  # of the text: tokens of the reply but its last
    num_clip_rows: int = struct.field(pytree_node=False)  # of the text: the last so many tokens of the clip's dialogue
    voice_token: int = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)  # of the row

    @property
    def num_tokens(self) -> int:
        return self.num_positions

    @property
    def thinker_examples(self) -> list[Example]:
        """What the Thinker reads, the dialogue first."""
        return [self.dialogue] if self.clip is None else [self.dialogue, self.clip]

    @property
    def num_spans(self) -> int:
        """Of the Talker's position ids of one answer: those of the prompt, the last of which goes on in the speech."""
        return int((np.asarray(self.dialogue.spans.begin[0]) < self.prompt_length).sum())

    @property
    def num_positions(self) -> int:
        """Of the Talker's streams, one for each answer."""
        total = 0
        for codes in self.answers:
            total += stream_length(self.prompt_length, len(self.clip_codes) + len(codes))
        return total


@dataclass(frozen=True)
class PrepareSpoken:
    """Reads a row and its media.

    Attributes:
      processor: that inference uses.
      max_length: tokens that a row of the Thinker has.
      check: raises InputError if an example does not fit a batch.
      voices: names, and the token that speech in each begins with.
      codec: fingerprint that rows must have; None: any.
      use_audio_in_video, media_root: as of ``read_row``.
      too_long: whether a row that is too long ends the run ("error"). There is no splitting: it cannot be used.
    """

    processor: Processor
    max_length: int
    check: Callable[[SpokenExample], None]
    voices: Mapping[str, int]
    codec: str | None = None
    use_audio_in_video: VideoSound = "auto"
    media_root: str | None = None
    too_long: TooLong = "skip"

    def __call__(self, row: Row) -> list[SpokenExample] | Reject:
        """The row's example; or, if anything is wrong with it, why it cannot be used.

        Raises:
          WorkerStartError: if the processes that read its media cannot be started.
        """
        return examples_or_reject(lambda row: [self.example(row)], row, self.too_long)

    @property
    def _config(self) -> OmniConfig:
        return self.processor.config

    def example(self, row: Row) -> SpokenExample:
        """Of a row.

        Raises:
          InputError: if it is not what it should be.
          TooLongError: if it is longer than a row of the batch.
          WrongCodecError: if its codes are another codec's.
        """
        # before the media are opened
        return self._make(row, self._reader.read(row_values(row)))

    @property
    def _reader(self) -> SpeechReader:
        # every code that Token2Wav has a row for
        return SpeechReader(self._config.token2wav_config.dit_config.num_embeds, self.codec)

    def _make(self, row: Row, speech: Speech) -> SpokenExample:
        voice_token = self._find_voice(speech.voice)
        content = read_row(row, self.use_audio_in_video, self.media_root)
        messages = () if isinstance(content, Document) else content.messages
        if isinstance(content, Document) or not messages or messages[-1]["role"] != "assistant":
            raise InputError("speech is of the last message, which must be the assistant's")
        prompt, replies = self.processor.dialogue(messages, max_length=self.max_length)
        # the weights of its text, as when the Thinker is trained on the row
        weights = np.array([*content.weights, 0.0], np.float32)[replies]
        first, num_rows = _find_last_reply(prompt, replies)
        clip, num_clip_rows = self._read_clip(speech.clip, row)
        example = SpokenExample(
            make_example(prompt, weights, row.name, self._config, row.source),
            clip,
            speech.answers,
            np.zeros(0, np.int32) if speech.clip is None else speech.clip.codes,
            np.zeros(len(speech.answers), np.float32),
            prompt_length=first,
            num_reply_rows=num_rows,
            num_clip_rows=num_clip_rows,
            voice_token=voice_token,
            name=row.name,
        )
        # here and not in packing: what fits no batch is a reject like any other, and never waits for a place
        self.check(example)
        return example

    def _find_voice(self, name: str | None) -> int:
        if name is None:
            # what the reference begins with where it knows no voice
            return self._config.talker_config.tts_text_start_token_id
        if name not in self.voices:
            known = ", ".join(self.voices) or "none"
            raise InputError(
                f"speech.voice {name!r} is unknown; there are {known}; a new one needs a token (objective.voices)"
            )
        return self.voices[name]

    def _read_clip(self, clip: Clip | None, row: Row) -> tuple[Example | None, int]:
        if clip is None:
            return None, 0
        text = read_clip_text(self.processor, clip.text, max_length=self.max_length)
        no_targets = np.zeros(len(text.prompt), np.float32)
        return make_example(text.prompt, no_targets, row.name, self._config, row.source), text.num_rows


def _find_last_reply(prompt: Prompt, replies: Int[np.ndarray, " T"]) -> tuple[int, int]:
    """The first token of the last reply, and how many of its tokens have a row: all but its end."""
    own = np.flatnonzero(replies == replies.max())
    first = int(own[0])
    if (prompt.media_item[first:] >= 0).any():
        raise InputError("its last message, which is spoken, holds media")
    num_rows = len(own) - 1
    if not num_rows:
        raise InputError("its last message has no text that could be spoken")
    return first, num_rows
