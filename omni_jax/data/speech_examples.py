"""Rows of speech to examples: codes, the log-mel of their sound, and whose voice it is.

A row is ``{"codec_ids": [...], "audio": ...}``, with 50 codes for each second of the sound, and may have

* ``speaker``: the vector of the voice, numbers (``cond`` of a voice of a checkpoint); zeros where there is none;
* ``ref_audio``: another clip of the voice, which is scaled as clips are in use (``processing.voice_clip``). Without it
  a part of the sound itself is the clip, as loud as it is;
* ``codec``: the fingerprint of the codec that made the codes;
* ``text`` and ``voice``, which are there for the other objectives of speech.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from omni_jax.checks import check_int, shown
from omni_jax.config import DiTConfig
from omni_jax.data.examples import Reject, TooLong, examples_or_reject
from omni_jax.data.rows import row_values
from omni_jax.data.sounds import read_sound
from omni_jax.data.sources import Row
from omni_jax.errors import InputError, TooLongError, WrongCodecError
from omni_jax.processing.fetch import RemoteAccess
from omni_jax.processing.speech_mel import RATE, speech_log_mel
from omni_jax.processing.voice_clip import scale_clip

_KEYS = ("codec_ids", "audio", "speaker", "ref_audio", "codec", "text", "voice")
UNKNOWN_CODE = -1  # of sound whose codes nobody knows
_MAX_DIFFERENCE = 10  # frames, 0.1 s, that sound and codes may differ by: codecs round up to their own blocks


@dataclass(frozen=True)
class SpeechExample:
    """What one row is trained on.

    Attributes:
      codes: one for each ``repeats`` frames.
      mel: natural-log mel (``processing.speech_mel``).
      speaker: the vector of the voice.
      clip: log-mel of another clip of the voice; of no frames where there is none.
      name: of the row.
    """

    codes: Int[np.ndarray, " K"]
    mel: Float[np.ndarray, "frames M"]
    speaker: Float[np.ndarray, " enc_emb_dim"]
    clip: Float[np.ndarray, "T M"]
    name: str

    @property
    def num_tokens(self) -> int:
        return len(self.codes)


@dataclass(frozen=True)
class PrepareSpeech:
    """Reads a row and its sound.

    Attributes:
      config: of the DiT.
      max_frames: of an example, which a row of the batch must hold.
      shortest_clip: frames that a clip has at least.
      longest_clip: that it has at most.
      access: from where sound may be fetched.
      media_root: the folder that it must lie within; None: that of the row's file.
      too_long: whether a row that is too long ends the run ("error"). There is no splitting: it cannot be used.
      codec: fingerprint of the codec of the run; None: rows may have any.
    """

    config: DiTConfig
    max_frames: int
    shortest_clip: int
    longest_clip: int
    access: RemoteAccess
    media_root: str | None = None
    too_long: TooLong = "skip"
    codec: str | None = None

    def __call__(self, row: Row) -> list[SpeechExample] | Reject:
        """The row's example; or, if anything is wrong with it, why it cannot be used."""
        return examples_or_reject(lambda row: [self.example(row)], row, self.too_long)

    def example(self, row: Row) -> SpeechExample:
        """Of a row.

        Raises:
          InputError: if it is not what it should be.
          TooLongError: if it is longer than a row of the batch.
          WrongCodecError: if its codes are another codec's.
        """
        values = row_values(row)
        self.check_keys(values)
        return self.make(row, values, self.read_codes(values), self.read_samples(row, values, "audio"))

    def check_keys(self, values: Mapping[str, Any]) -> None:
        """Raises InputError if a row has other keys than it may have."""
        unknown = sorted(set(values) - set(_KEYS))
        if unknown:
            raise InputError(f"unknown keys {', '.join(map(shown, unknown))}; a row of speech has {', '.join(_KEYS)}")

    def make(
        self, row: Row, values: Mapping[str, Any], codes: Int[np.ndarray, " K"] | None, samples: Float[np.ndarray, " n"]
    ) -> SpeechExample:
        """The example of a row whose codes and sound were read; see ``example``.

        Args:
          row: it.
          values: of it.
          codes: of the sound; None: nobody knows them, and the example has UNKNOWN_CODE in their places.
          samples: of the sound, at ``speech_mel.RATE``.
        """
        mel = speech_log_mel(samples)
        if codes is None:
            codes = np.full(len(mel) // self.config.repeats, UNKNOWN_CODE, np.int32)
        codes, mel = self._align(codes, mel)
        clip = np.zeros((0, self.config.mel_dim), np.float32)
        if "ref_audio" in values:
            scaled, _ = scale_clip(self.read_samples(row, values, "ref_audio"))
            clip = speech_log_mel(scaled)
            check_int("the number of frames of ref_audio", len(clip), self.shortest_clip, self.longest_clip)
        return SpeechExample(codes, mel, self._read_speaker(values), clip, row.name)

    def read_codes(self, values: Mapping[str, Any]) -> Int[np.ndarray, " K"]:
        """The codes of a row.

        Raises:
          InputError: if it has none, or what is no code.
          WrongCodecError: if they are another codec's.
        """
        check_codec("codec", values, self.codec)
        codes = values.get("codec_ids")
        if not isinstance(codes, list) or not codes:
            raise InputError(f"codec_ids is {shown(codes)}; it must be a list of codes, 50 a second")
        # num_embeds is a code too: the table has one row more
        checked = [check_int("a code of codec_ids", code, 0, self.config.num_embeds) for code in codes]
        return np.array(checked, np.int32)

    def read_samples(self, row: Row, values: Mapping[str, Any], key: str) -> Float[np.ndarray, " n"]:
        """A sound of a row, at ``speech_mel.RATE``; raises InputError if it cannot be read."""
        return read_sound(row, values, key, RATE, self.access, self.media_root)

    def _read_speaker(self, values: Mapping[str, Any]) -> Float[np.ndarray, " enc_emb_dim"]:
        size = self.config.enc_emb_dim
        if "speaker" not in values:
            return np.zeros(size, np.float32)
        try:
            speaker = np.array(values["speaker"], np.float32)
        except (TypeError, ValueError) as e:
            raise InputError(f"speaker is {shown(values['speaker'])}; it must be a list of {size} numbers") from e
        if speaker.shape != (size,) or not np.isfinite(speaker).all():
            raise InputError(f"speaker has the shape {list(speaker.shape)}; it must be a list of {size} finite numbers")
        return speaker

    def _align(self, codes: np.ndarray, mel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes and mel of one length."""
        repeats = self.config.repeats
        if abs(len(mel) - len(codes) * repeats) > _MAX_DIFFERENCE:
            raise InputError(
                f"its sound has {len(mel)} frames, and its {len(codes)} codes stand for {len(codes) * repeats}; they "
                f"may differ by {_MAX_DIFFERENCE}"
            )
        num_codes = min(len(codes), len(mel) // repeats)
        num_frames = num_codes * repeats
        if num_frames > self.max_frames:
            raise TooLongError(
                f"it has {num_codes} codes, over the {self.max_frames // repeats} of a row (data.tokens); cut it"
            )
        # a clip is cut out of the sound, of which something must be left
        check_int("the number of frames of its sound", num_frames, 2 * self.shortest_clip, self.max_frames)
        return codes[:num_codes], mel[:num_frames]


def check_codec(where: str, values: Mapping[str, Any], codec: str | None) -> None:
    """Raises WrongCodecError if codes are of another codec than a run's.

    Args:
      where: the name of the fingerprint.
      values: that the codes stand among, and the fingerprint as ``codec``.
      codec: fingerprint of the run's; None: any will do.
    """
    if codec is not None and values.get("codec") != codec:
        raise WrongCodecError(
            f"{where} is {shown(values.get('codec'))}, and the codec of this run is {codec!r} (objective.codec); codes "
            "of another codec stand for other sounds"
        )
