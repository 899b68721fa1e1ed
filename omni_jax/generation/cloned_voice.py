"""Voices that a request brings along: a clip of somebody, and what it says.

Token2Wav takes the timbre of the clip: its log-mel, and its speaker vector. Without the clip's text that is all. The
Talker then speaks in the manner of a voice of the checkpoint, whose token the speech begins with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from omni_jax.checkpoint.voices import Voice, choose
from omni_jax.checks import check_int, check_names, shown
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.processing.processor import Processor
from omni_jax.processing.speaker_vectors import SpeakerModel, normalize_vector
from omni_jax.processing.voice_clip import VoiceClip

MAX_TEXT = 2000  # characters of what a clip of at most 30 seconds says
MAX_CLIPS = 64  # whose voices are kept; each has up to a megabyte
_MAX_RATE = 384_000  # Hz


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
      like: the voice of the checkpoint whose token the speech begins with; the default voice if None.
      speaker_vector: of the speaker, scaled to length 1; made of the clip by the model's ``speaker_model`` if None.
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


class SpeakerTable:
    """Who a model can speak as: the voices of its checkpoint, and those of clips, of which the latest are kept."""

    def __init__(self, config: OmniConfig, speaker_model: SpeakerModel | None):
        """Takes what makes speaker vectors of clips, if there is something."""
        self._width = config.token2wav_config.dit_config.enc_emb_dim
        self._speaker_model = speaker_model
        self._kept: OrderedDict[tuple[Any, ...], Voice] = OrderedDict()

    def check(self, voices: Mapping[str, Voice], wanted: str | ClonedVoice | None) -> None:
        """Checks all of a voice but its clip.

        Args:
          voices: of the checkpoint.
          wanted: a name, a clip, or None for the default voice.

        Raises:
          InputError: for an unknown voice, a speaker vector that is none or that nothing can make, and a clip's text
            where there is no speech tokenizer.
        """
        if not isinstance(wanted, ClonedVoice):
            choose(voices, wanted)
            return
        choose(voices, wanted.like)
        if wanted.ref_text is not None:
            raise InputError(
                "voice: ref_text needs a speech tokenizer, which this checkpoint does not have; without ref_text the "
                "clip gives the timbre alone"
            )
        if wanted.speaker_vector is not None:
            self._read_vector(wanted.speaker_vector)
        elif self._speaker_model is None:
            raise InputError(
                "voice: there is no speaker vector; load the model with a speaker_model (--speaker-model), or give "
                f"speaker_vector, {self._width} numbers"
            )

    def choose(self, voices: Mapping[str, Voice], wanted: str | ClonedVoice | None, clip: VoiceClip | None) -> Voice:
        """The voice.

        Args:
          voices: of the checkpoint.
          wanted: that ``check`` has found right.
          clip: of it, from ``read_voice_clip``. For the same samples the voice is the same object, so that nothing is
            computed of it again.

        Raises:
          CheckpointError: if the speaker model fails.
        """
        if not isinstance(wanted, ClonedVoice):
            return choose(voices, wanted)
        assert clip is not None
        vector = None if wanted.speaker_vector is None else self._read_vector(wanted.speaker_vector)
        token = choose(voices, wanted.like).bos_token
        key = (clip.digest, token, None if vector is None else vector.tobytes())
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if vector is None:
            assert self._speaker_model is not None
            vector = self._speaker_model(clip.samples)
        voice = Voice(f"clip {clip.digest.hex()}", token, vector[None], clip.mel[None])
        self._kept[key] = voice
        if len(self._kept) > MAX_CLIPS:
            self._kept.popitem(last=False)
        return voice

    def _read_vector(self, value: Any) -> np.ndarray:
        try:
            return normalize_vector(value, self._width, "voice: speaker_vector")
        except (CheckpointError, ValueError, TypeError) as e:
            raise InputError(f"voice: speaker_vector is no list of {self._width} numbers: {e}") from e
