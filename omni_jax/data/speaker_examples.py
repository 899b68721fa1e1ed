"""Rows of sound with the name of its voice, to examples and batches for the network of speaker vectors.

A row is ``{"audio": ..., "voice": "Ada"}``; other keys are passed over. Its sound is cut into clips. Few voices become
many by perturbation: pitch and formants of a sound are moved by one of a few fixed pairs of factors, and what results
counts as another speaker, as sounds that are played faster do elsewhere (https://arxiv.org/abs/2009.14153).

Letters: B clips, T frames of a clip at most, M mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flax import struct
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.checks import shown
from omni_jax.data.examples import Reject, examples_or_reject
from omni_jax.data.rows import row_values
from omni_jax.data.single_packing import SinglePart
from omni_jax.data.sounds import read_sound
from omni_jax.data.sources import Row
from omni_jax.errors import UnknownVoiceError
from omni_jax.processing.fetch import RemoteAccess
from omni_jax.processing.speaker_mel import cut_segments, speaker_log_mel
from omni_jax.processing.speech_mel import NUM_BINS, RATE
from omni_jax.processing.voice_perturbation import perturb_voice

# of pitch and formants; far enough from each other and from 1 that the voices are told apart
PERTURBATIONS = ((1.35, 1.0), (1 / 1.35, 1.0), (1.0, 1.25), (1.0, 1 / 1.25), (1.3, 1.2), (1 / 1.3, 1 / 1.2))


@struct.dataclass
class SpeakerBatch:
    """Clips, zeros behind their ends."""

    mel: Float[Array, "B T M"] = struct.field(metadata={"logical_axes": ("batch", None, None)})
    # frames; 0: padding
    length: Int[Array, " B"] = struct.field(metadata={"logical_axes": ("batch",)})
    speaker: Int[Array, " B"] = struct.field(metadata={"logical_axes": ("batch",)})


@dataclass(frozen=True)
class SpeakerExample:
    """A clip.

    Attributes:
      mel: log-mel (``processing.speech_mel``).
      speaker: its number.
      name: of the row.
    """

    mel: Float[np.ndarray, "frames 80"]
    speaker: int
    name: str

    @property
    def num_tokens(self) -> int:
        """Frames."""
        return len(self.mel)


@dataclass(frozen=True)
class PrepareSpeakers:
    """Reads a row and its sound.

    Attributes:
      speakers: names of the voices.
      perturbations: how many of ``PERTURBATIONS`` make further speakers of each.
      max_frames: of a clip.
      access: from where sound may be fetched.
      media_root: the folder that it must lie within; None: that of the row's file.
    """

    speakers: tuple[str, ...]
    perturbations: int
    max_frames: int
    access: RemoteAccess
    media_root: str | None = None

    def __call__(self, row: Row) -> list[SpeakerExample] | Reject:
        """The row's examples; or, if anything is wrong with it, why it cannot be used."""
        return examples_or_reject(self.examples, row, "skip")

    def examples(self, row: Row) -> list[SpeakerExample]:
        """Clips of a row's sound as it is, and of each perturbation of it.

        Raises:
          UnknownVoiceError: if its voice is none of the speakers.
          InputError: if the row is not what it should be, or its sound is silent or too short.
        """
        values = row_values(row)
        voice = values.get("voice")
        if voice not in self.speakers:
            known = ", ".join(self.speakers[:10])
            raise UnknownVoiceError(f"voice is {shown(voice)}, which objective.speakers does not have: {known}")
        samples = read_sound(row, values, "audio", RATE, self.access, self.media_root)
        found = []
        factors = ((1.0, 1.0), *PERTURBATIONS[: self.perturbations])
        for number, (pitch, formant) in enumerate(factors):
            perturbed = samples if number == 0 else perturb_voice(samples, RATE, pitch, formant)
            speaker = number * len(self.speakers) + self.speakers.index(voice)
            for segment in cut_segments(speaker_log_mel(perturbed), self.max_frames):
                found.append(SpeakerExample(segment, speaker, row.name))
        return found


@dataclass(frozen=True)
class SpeakerPacking:
    """Clips into ``SpeakerBatch``.

    Attributes:
      prepare: reads rows.
      rows: of a stream's part of a batch.
    """

    prepare: PrepareSpeakers
    rows: int

    def new_part(self) -> SinglePart[SpeakerExample]:
        return SinglePart(self.rows)

    def assemble(self, parts: Sequence[SinglePart[SpeakerExample]], *, first: int, streams: int) -> SpeakerBatch:
        """The batch of a process; nothing in it depends on which streams these are."""
        batch = make_empty_speakers(len(parts) * self.rows, self.prepare.max_frames)
        for number, part in enumerate(parts):
            for row, example in enumerate(part.examples, start=number * self.rows):
                batch.mel[row, : len(example.mel)] = example.mel
                batch.length[row] = len(example.mel)
                batch.speaker[row] = example.speaker
        return batch

    def measure_fill(self, batch: SpeakerBatch) -> dict[str, float]:
        return {"clips": float((np.asarray(batch.length) > 0).sum())}


def make_empty_speakers(num_rows: int, max_frames: int) -> SpeakerBatch:
    """Rows of padding."""
    return SpeakerBatch(
        mel=np.zeros((num_rows, max_frames, NUM_BINS), np.float32),
        length=np.zeros(num_rows, np.int32),
        speaker=np.zeros(num_rows, np.int32),
    )
