"""Voices that a request brings along: a clip of somebody, and what it says.

Token2Wav takes the timbre of the clip: its log-mel, and its speaker vector. With the clip's text the Talker goes on
where the clip stops (``models.talker_conditioning``). Without it the Talker speaks in the manner of a voice of the
checkpoint, whose token the speech begins with.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Int

from omni_jax.checkpoint.voices import Voice, choose
from omni_jax.checks import check_int, check_names, shown
from omni_jax.engine.prefill import Engines
from omni_jax.engine.speech_clips import check_clip_text, make_speech_clip
from omni_jax.engine.talker_engine import SpeechClip
from omni_jax.engine.warmup import WarmUpJob
from omni_jax.errors import CheckpointError, InputError
from omni_jax.processing.clip_text import read_clip_text
from omni_jax.processing.processor import Processor
from omni_jax.processing.speaker_vectors import SpeakerModel, normalize_vector
from omni_jax.processing.speech_mel import RATE
from omni_jax.processing.voice_clip import PEAK, VoiceClip

MAX_TEXT = 2000  # characters of what a clip of at most 30 seconds says
MAX_CLIPS = 64  # whose voices are kept; each has up to a megabyte of the host's memory
MAX_SPEECH_CLIPS = 16  # whose texts are kept as the Thinker has read them; each has two megabytes of the device's
_MAX_RATE = 384_000  # Hz

T = TypeVar("T")


# compared by identity: its arrays may be large
@dataclass(frozen=True, eq=False)
class ClonedVoice:
    """The voice of a clip, for ``voice=`` of a request; a dict with these keys is taken too.

    Whose voice may be used: docs/responsible-use.md.

    Attributes:
      ref_audio: the clip, 1 to 30 seconds: a path, a URL, the bytes of a file, or an array with its ``sampling_rate``.
      ref_text: what it says, word for word. The reply then goes on in its manner of speaking too; the checkpoint must
        have a speech tokenizer. Without it the clip gives the timbre alone.
      sampling_rate: of an array.
      like: the voice of the checkpoint whose token the speech begins with. If None, that of the default voice; with
        ``ref_text`` that of no voice.
      speaker_vector: of the speaker, scaled to length 1; made of the clip by the model's ``speaker_model`` if None.
        Without such a model it is zeros, if those of the checkpoint's voices are too.
    """

    ref_audio: Any
    ref_text: str | None = None
    sampling_rate: int | None = None
    like: str | None = None
    speaker_vector: Any = None

    @classmethod
    def create(cls, values: Mapping[str, Any]) -> ClonedVoice:
        """From a caller's dict.

        Raises:
          InputError: for an unknown key, a value of another type, or a dict without ``ref_audio``.
        """
        check_names("key of voice", values, [f.name for f in fields(cls)])
        if values.get("ref_audio") is None:
            raise InputError(f"voice has no ref_audio, the clip of the voice; it has {', '.join(values) or 'nothing'}")
        return cls(**values)

    def without_text(self) -> ClonedVoice:
        """The timbre alone."""
        return replace(self, ref_text=None)

    def __post_init__(self) -> None:
        if self.ref_text is not None:
            if not isinstance(self.ref_text, str) or not self.ref_text.strip():
                raise InputError(f"voice: ref_text is {shown(self.ref_text)}; it must be what the clip says")
            if len(self.ref_text) > MAX_TEXT:
                raise InputError(f"voice: ref_text has {len(self.ref_text)} characters; at most {MAX_TEXT} are taken")
        if self.sampling_rate is not None:
            check_int("voice: sampling_rate", self.sampling_rate, 1, _MAX_RATE)
        if self.like is not None and not isinstance(self.like, str):
            raise InputError(f"voice: like is {shown(self.like)}; it must be the name of a voice")


def read_voice_clip(voice: str | ClonedVoice | None, processor: Processor) -> VoiceClip | None:
    """The clip of a voice that brings one along.

    Raises:
      InputError: if it cannot be read.
    """
    if not isinstance(voice, ClonedVoice):
        return None
    return processor.read_clip(voice.ref_audio, voice.sampling_rate)


class SpeechTokenizer(Protocol):
    """Makes codes of sound."""

    def encode(self, sounds: Sequence[Float[np.ndarray, " n"]]) -> list[Int[np.ndarray, " J"]]:
        """The codes of each sound, 50 a second; mono samples at 16 kHz."""
        ...


class Speaker(NamedTuple):
    """Who speaks a reply.

    Attributes:
      voice: of the checkpoint, or of a clip.
      clip: that the speech goes on from; None: it begins anew.
    """

    voice: Voice
    clip: SpeechClip | None = None


class SpeakerTable:
    """Who a model can speak as: the voices of its checkpoint, and those of clips, of which the latest are kept."""

    def __init__(
        self,
        engines: Engines,
        processor: Processor,
        speaker_model: SpeakerModel | None,
        speech_tokenizer: SpeechTokenizer | None,
    ):
        """Takes what makes speaker vectors and codes of clips, where there is something."""
        self._engines = engines
        self._processor = processor
        self._speaker_model = speaker_model
        self._speech_tokenizer = speech_tokenizer
        self._width = engines.config.token2wav_config.dit_config.enc_emb_dim
        self._kept_voices = _Latest[Voice](MAX_CLIPS)
        self._kept_clips = _Latest[SpeechClip](MAX_SPEECH_CLIPS)

    @property
    def reads_text(self) -> bool:
        """Whether the Talker can go on from a clip whose text is given."""
        return self._speech_tokenizer is not None

    def warmup_jobs(self) -> list[WarmUpJob]:
        """What compiles the speech tokenizer and the network of speaker vectors."""
        jobs = []
        if self._speech_tokenizer is not None:
            jobs.append(WarmUpJob(functools.partial(_encode_silence, self._speech_tokenizer)))
        if self._speaker_model is not None:
            jobs.append(WarmUpJob(functools.partial(_embed_noise, self._speaker_model)))
        return jobs

    def check(self, voices: Mapping[str, Voice], wanted: str | ClonedVoice | None) -> None:
        """Checks all of a voice but its clip.

        Args:
          voices: of the checkpoint.
          wanted: a name, a clip, or None for the default voice.

        Raises:
          InputError: for an unknown voice, a speaker vector that is none or that nothing can make, and a clip's text
            where there is no speech tokenizer, or that is too long.
        """
        if not isinstance(wanted, ClonedVoice):
            choose(voices, wanted)
            return
        choose(voices, wanted.like)
        if wanted.ref_text is not None:
            if not self.reads_text:
                raise InputError(
                    "voice: ref_text needs a speech tokenizer, which this checkpoint does not have; without ref_text "
                    "the clip gives the timbre alone"
                )
            check_clip_text(read_clip_text(self._processor, wanted.ref_text))
        if wanted.speaker_vector is not None:
            self._read_vector(wanted.speaker_vector)
        elif self._speaker_model is None and _have_vectors(voices):
            raise InputError(
                "voice: there is no speaker vector; load the model with a speaker_model (--speaker-model), or give "
                f"speaker_vector, {self._width} numbers"
            )

    def choose(
        self,
        voices: Mapping[str, Voice],
        wanted: str | ClonedVoice | None,
        clip: VoiceClip | None,
        adapter: str | None = None,
    ) -> Speaker:
        """The voice, and what the Talker is to go on from.

        Args:
          voices: of the checkpoint.
          wanted: that ``check`` has found right.
          clip: of it, from ``read_voice_clip``. For the same samples the voice is the same object, so that nothing is
            computed of it again.
          adapter: of the Thinker's, that the request has chosen.

        Raises:
          CheckpointError: if the speaker model fails.
        """
        if not isinstance(wanted, ClonedVoice):
            return Speaker(choose(voices, wanted))
        assert clip is not None
        vector = None if wanted.speaker_vector is None else self._read_vector(wanted.speaker_vector)
        token = choose(voices, wanted.like).bos_token
        if wanted.ref_text is not None and wanted.like is None:
            # as in training: the clip says how to speak, and no voice's token does
            token = self._engines.config.talker_config.tts_text_start_token_id
        key = (clip.digest, token, None if vector is None else vector.tobytes())
        voice = self._kept_voices.get(key, lambda: self._make_voice(clip, token, vector))
        text = wanted.ref_text
        if text is None:
            return Speaker(voice)
        return Speaker(
            voice, self._kept_clips.get((clip.digest, text, adapter), lambda: self._make_clip(clip, text, adapter))
        )

    def _make_voice(self, clip: VoiceClip, token: int, vector: np.ndarray | None) -> Voice:
        if vector is None:
            # ``check`` has seen that a Token2Wav without a speaker model was trained without vectors
            zeros = np.zeros(self._width, np.float32)
            vector = zeros if self._speaker_model is None else self._speaker_model(clip.samples)
        return Voice(f"clip {clip.digest.hex()}", token, vector[None], clip.mel[None])

    def _make_clip(self, clip: VoiceClip, text: str, adapter: str | None) -> SpeechClip:
        assert self._speech_tokenizer is not None
        # as loud as the sounds of training were
        (codes,) = self._speech_tokenizer.encode([clip.recording])
        return make_speech_clip(self._engines, read_clip_text(self._processor, text), codes, adapter)

    def _read_vector(self, value: Any) -> np.ndarray:
        try:
            return normalize_vector(value, self._width, "voice: speaker_vector")
        except (CheckpointError, ValueError, TypeError) as e:
            raise InputError(f"voice: speaker_vector is no list of {self._width} numbers: {e}") from e


def _have_vectors(voices: Mapping[str, Voice]) -> bool:
    """Whether any voice has a speaker vector: not so where Token2Wav was trained on rows without them."""
    return any(np.any(voice.cond) for voice in voices.values())


def _encode_silence(tokenizer: SpeechTokenizer) -> None:
    tokenizer.encode([np.zeros(RATE, np.float32)])


def _embed_noise(model: SpeakerModel) -> None:
    # silence has no speaker, and may have no vector
    model(np.random.default_rng(0).uniform(-PEAK, PEAK, RATE).astype(np.float32))


class _Latest(Generic[T]):
    """The latest of what has been made, by key."""

    def __init__(self, size: int):
        self._size = size
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept under a key; or what is made now, in place of what has not been asked for the longest."""
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]
