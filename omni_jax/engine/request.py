"""What the engine works on: a request, where it stands, and how many are worked on at a time."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.checkpoint.voices import Voice
from omni_jax.checks import check_int, check_names
from omni_jax.config import OmniConfig
from omni_jax.config_file import GENERATION_CONFIG_FILE
from omni_jax.engine.detokenizer import Detokenizer
from omni_jax.engine.outputs import Reply, Timings
from omni_jax.engine.prompt_key import PromptKey
from omni_jax.engine.sampling import SamplingParams, pop_sampling
from omni_jax.engine.talker_engine import SpeechClip, SpeechRequest
from omni_jax.engine.thinker_engine import TextRequest
from omni_jax.errors import CheckpointError, InputError
from omni_jax.mrope import Span
from omni_jax.plain_files import has_file, read_object
from omni_jax.processing.layout import Usage
from omni_jax.processing.prefill_plan import PromptPiece

INITIAL_REPLY = 512  # tokens or codes of a reply that caches have room for at first; they double when it is used up
BLOCK_SIZES = (16, 32, 64, 128)  # of lists of whole replies, in blocks of 0.24 s of speech


@dataclass(frozen=True)
class ChunkSizes:
    """How much is computed at a time while a reply is streamed.

    Less makes the first piece come sooner, more costs less.

    Attributes:
      first_tokens: text tokens in the first call of the Thinker.
      tokens: in each later one; as many codes follow in a call of the Talker. 2 + 3 * 12 tokens are what the 36 codes
        of a first piece need.
      codes: in a call of the Talker at most.
      first_chunk_codes: codes that the first piece of sound is made from. Token2Wav looks ahead, see docs/streaming.md;
        two blocks of 12 at least.
      chunk_codes: that each later piece adds.
      first_look_ahead: mel frames that the vocoder looks ahead to in the first piece; all that it depends on (34) if
        None. With 10 a first piece of 24 codes holds as much sound as one of 36 does otherwise, of which what is
        nearest to its end is not exact.
    """

    first_tokens: int = 2
    tokens: int = 12
    codes: int = 16
    first_chunk_codes: int = 36
    chunk_codes: int = 24
    first_look_ahead: int | None = None

    def __post_init__(self) -> None:
        for field_ in dataclasses.fields(self):
            if field_.name != "first_look_ahead":
                check_int(f"chunk_sizes.{field_.name}", getattr(self, field_.name), 1, 4096)
        if self.first_look_ahead is not None:
            check_int("chunk_sizes.first_look_ahead", self.first_look_ahead, 0, 4096)


@dataclass(frozen=True)
class SchedulerConfig:
    """How many requests are in each stage at once.

    Attributes:
      thinker_slots: requests whose text is decoded.
      talker_slots: requests whose speech is decoded.
      block_sizes: sizes of the lists of blocks, 0.24 seconds each, that whole replies are voiced in; a list waits until
        the largest is full or nothing else remains to be done. Without them all that remains is voiced at once.
      prefix_bytes: of the device's memory, in which prompts of streamed replies are kept for the next turns of their
        dialogues (``prefix_cache.PrefixCache``); 0 for none.
    """

    thinker_slots: int = 1
    talker_slots: int = 1
    block_sizes: tuple[int, ...] = ()
    prefix_bytes: int = 0


@dataclass(frozen=True)
class TalkerParams:
    """How a reply is spoken, with the published defaults (docs/reference.md, 7.4): text is greedy, speech is drawn."""

    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(0.9, 40, 0.8, 1.05))
    """How codes are drawn; without a seed, with the text's."""
    max_tokens: int = 4096
    """Codes, 50 a second, at most; the Talker's context may end the speech sooner."""

    @classmethod
    def load(cls, folder: Path) -> TalkerParams:
        """The defaults of a checkpoint: the published ones, but for what its ``generation_config.json`` has.

        The keys are named as arguments of the reference's ``generate``: ``talker_temperature``, ``talker_top_k``,
        ``talker_top_p`` and ``talker_repetition_penalty``.

        Raises:
          CheckpointError: for a value out of range.
        """
        path = folder / GENERATION_CONFIG_FILE
        if not has_file(path):
            return cls()
        values = read_object(path)
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        # null is what transformers writes where nothing is set
        given = {name: value for name in names if (value := values.get(f"talker_{name}")) is not None}
        try:
            return cls(pop_sampling(given, cls().sampling))
        except InputError as e:
            raise CheckpointError(f"{path}: talker_{e}") from e

    def override(self, options: Mapping[str, Any], config: OmniConfig) -> TalkerParams:
        """With a caller's ``talker={...}`` in place of these: the fields of ``SamplingParams``, and ``max_tokens``.

        Raises:
          InputError: for no dict, an unknown name, a value out of range, or more codes than Token2Wav takes at once.
        """
        if not isinstance(options, Mapping):
            raise InputError(f"talker is {options!r}; it must be a dict of options")
        # a copy: ``pop_sampling`` removes what it takes, and the dict is the caller's
        values = dict(options)
        check_names("talker option", values, [*SamplingParams.names(), "max_tokens"])
        dit = config.token2wav_config.dit_config
        try:
            sampling = pop_sampling(values, self.sampling)
            max_tokens = values.get("max_tokens", self.max_tokens)
            # the DiT takes so many mel frames at once, and a code is ``repeats`` of them
            check_int("max_tokens", max_tokens, 1, dit.max_position_embeddings // dit.repeats)
        except InputError as error:
            # both sets of options have these names, so the error says which one it means
            raise InputError(f"talker {error}") from error
        return TalkerParams(sampling, max_tokens)


@dataclass(frozen=True)
class SpeechParams:
    """Who speaks a reply, and how.

    Attributes:
      voice: of the checkpoint, or of a clip.
      talker: how its codes are drawn; the seed is a number.
      noise_seed: of the noise that Token2Wav starts from.
      clip: that the speech goes on from; None: it begins anew.
    """

    voice: Voice
    talker: TalkerParams
    noise_seed: int
    clip: SpeechClip | None = None

    @property
    def num_begin(self) -> int:
        """Positions that the Talker reads before its first code: the voice, the first token, and the clip's codes."""
        return 2 + (0 if self.clip is None else len(self.clip.codes))

    @property
    def num_clip_rows(self) -> int:
        """Rows of text that the Talker has before the reply's."""
        return 0 if self.clip is None else self.clip.num_rows

    @property
    def min_tokens(self) -> int:
        """Tokens that a reply which goes on must have before the Talker can begin.

        With a second one it is certain that the first one is not the last, which is never read.
        """
        return 2 if self.clip is None else self.clip.min_tokens


@dataclass(frozen=True)
class Request:
    """What is asked of the model.

    Attributes:
      pieces: of the prompt that have not been prefilled, in order.
      text: how the Thinker is to answer; holds the token ids of the whole prompt.
      stop: strings that end the reply.
      speech: how it is to be spoken, if it is.
      live: whether sound is to come as it is made; otherwise it comes with the reply.
      reply_span: of the two position ids that the Talker reads behind the prompt.
      usage: what the prompt is made of.
      adapter: of the Thinker's, by name, that is to answer; None: the model without one.
      key: by which what is prefilled of the prompt may be kept and found; None: it is not.
    """

    pieces: Sequence[PromptPiece]
    text: TextRequest
    stop: tuple[str, ...]
    speech: SpeechParams | None
    live: bool
    reply_span: Span
    usage: Usage
    adapter: str | None = None
    key: PromptKey | None = None

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.text.prompt)

    @property
    def initial_capacity(self) -> int:
        """Positions that caches should have room for at first."""
        # not max_tokens at once: most replies are shorter, and caches grow for the others
        reply = min(INITIAL_REPLY, self.text.max_tokens)
        if self.speech is not None:
            speech = self.speech
            reply = max(reply, min(INITIAL_REPLY, speech.talker.max_tokens + 2) + speech.num_begin - 2)
        return self.prompt_length + reply

    @property
    def num_begin(self) -> int:
        """Positions that the Talker reads before its first code."""
        return 0 if self.speech is None else self.speech.num_begin

    @property
    def num_clip_rows(self) -> int:
        """Rows of text that the Talker has before the reply's."""
        return 0 if self.speech is None else self.speech.num_clip_rows

    def speech_request(self, reply_tokens: int | None) -> SpeechRequest:
        """The same for a slot of the Talker's; ``reply_tokens`` are those of the reply, if it is complete."""
        speech = self.speech
        assert speech is not None
        return SpeechRequest(
            prompt_length=self.prompt_length,
            voice_token=speech.voice.bos_token,
            sampling=speech.talker.sampling,
            max_codes=speech.talker.max_tokens,
            span=self.reply_span,
            clip=speech.clip,
            reply_tokens=reply_tokens,
        )


class Stage(enum.Enum):
    """Where a request stands. A live one is spoken while its text is decoded, in ``TEXT`` already."""

    # no scheduler has started it
    WAITING = enum.auto()
    # its prompt is on its way into the caches
    PREFILL = enum.auto()
    # the Thinker decodes its text
    TEXT = enum.auto()
    # its text is complete; the Talker decodes its codes, or has no free slot yet
    SPEECH = enum.auto()
    # all codes of a reply that is not live are there; Token2Wav makes sound of them
    VOCODER = enum.auto()
    # its reply is made
    FINISHED = enum.auto()
    # an error has ended it
    FAILED = enum.auto()


# compared by identity, so that it can be a key: two equal requests are two requests
@dataclass(eq=False)
class RequestState:
    """A request on its way through the stages, and what has come of it.

    Attributes:
      request: what is asked.
      detokenizer: holds the reply's token ids and text.
      stage: where it stands.
      error: why there is no answer, if it failed.
      num_cached: tokens of the prompt that had been prefilled for another request.
      codes: of the speech, in the pieces that they came in.
      audio: its samples, likewise.
    """

    request: Request
    detokenizer: Detokenizer
    stage: Stage = Stage.WAITING
    error: Exception | None = None
    num_cached: int = 0
    codes: list[np.ndarray] = field(default_factory=list)
    audio: list[np.ndarray] = field(default_factory=list)

    @property
    def speaks(self) -> bool:
        return self.request.speech is not None

    @property
    def is_live(self) -> bool:
        """Whether somebody waits for sound as it is made."""
        return self.request.live and self.speaks

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.stage in (Stage.FINISHED, Stage.FAILED)

    @property
    def is_mute(self) -> bool:
        """Whether the text is complete and too short for the Talker, which needs two tokens."""
        return self.detokenizer.finished and self.detokenizer.num_spoken < 2

    @property
    def can_begin_speech(self) -> bool:
        """Whether there is text enough for what the Talker reads before its first code."""
        speech = self.request.speech
        assert speech is not None
        num_spoken = self.detokenizer.num_spoken
        # behind a complete text comes its end, and then padding, as much as there are codes
        return num_spoken >= 2 if self.detokenizer.finished else num_spoken >= speech.min_tokens

    @property
    def num_codes(self) -> int:
        return sum(map(len, self.codes))

    def all_codes(self) -> np.ndarray:
        """int32 [codes]."""
        # the empty array gives the dtype where there are no codes
        return np.concatenate([np.zeros(0, np.int32), *self.codes])

    def make_reply(self, timings: Timings) -> Reply:
        """The reply of a request whose stages are done."""
        detokenizer = self.detokenizer
        assert detokenizer.finish_reason is not None
        reply = Reply(
            text=detokenizer.text,
            token_ids=tuple(detokenizer.token_ids),
            finish_reason=detokenizer.finish_reason,
            usage=dataclasses.replace(self.request.usage, cached=self.num_cached),
            # a copy: the scheduler goes on adding to its own
            timings=dataclasses.replace(timings),
        )
        if not self.speaks:
            return reply
        audio = np.concatenate([np.zeros(0, np.float32), *self.audio])
        return dataclasses.replace(reply, codec_ids=tuple(self.all_codes().tolist()), audio=audio)
