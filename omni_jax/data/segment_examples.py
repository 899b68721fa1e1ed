"""Rows of sound to stretches of it, out of which a segment for the vocoder is cut at each step.

A row is ``{"audio": ...}``; other keys are passed over, so that rows of other objectives will do. Its sound is divided
evenly, so that an epoch shows all of it about once, and where in its part a segment begins is drawn when the batch is
there (``training.objectives.vocoder``): a row that comes again has other segments.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from omni_jax.data.examples import Reject, examples_or_reject
from omni_jax.data.rows import row_values
from omni_jax.data.sounds import read_sound
from omni_jax.data.sources import Row
from omni_jax.models.token2wav import SAMPLE_RATE
from omni_jax.processing.audio import resample
from omni_jax.processing.fetch import RemoteAccess
from omni_jax.processing.speech_mel import FRAME_RATE, RATE, speech_log_mel

FRAME_SAMPLES = SAMPLE_RATE // FRAME_RATE  # of a mel frame, at the vocoder's rate


@dataclass(frozen=True)
class SegmentExample:
    """Sound in which a segment of a fixed number of frames can begin at several places.

    Attributes:
      mel: log-mel (``processing.speech_mel``), with the frames of context on either side of all segments.
      samples: at the vocoder's rate, without those frames.
      places: frames at which a segment can begin, from the first that is no context on.
      segment: frames of it.
      name: of the row.
    """

    mel: Float[np.ndarray, "frames 80"]
    samples: Float[np.ndarray, " n"]
    places: int
    segment: int
    name: str

    @property
    def num_tokens(self) -> int:
        """Frames of the segment."""
        return self.segment


@dataclass(frozen=True)
class PrepareSegments:
    """Reads a row and its sound.

    Attributes:
      segment: mel frames of a segment.
      context: mel frames on either side of it.
      access: from where sound may be fetched.
      media_root: the folder that it must lie within; None: that of the row's file.
    """

    segment: int
    context: int
    access: RemoteAccess
    media_root: str | None = None

    def __call__(self, row: Row) -> list[SegmentExample] | Reject:
        """The row's examples; or, if anything is wrong with it, why it cannot be used."""
        return examples_or_reject(self.examples, row, "skip")

    def examples(self, row: Row) -> list[SegmentExample]:
        """As many as the sound has segments, rounded.

        Raises:
          InputError: if the row is not what it should be, or has no sound.
        """
        values = row_values(row)
        samples = read_sound(row, values, "audio", SAMPLE_RATE, self.access, self.media_root)
        num_frames = max(len(samples) // FRAME_SAMPLES, self.segment)
        mel, padded = pad_and_analyze(samples, num_frames, self.context)

        # every place where a segment can begin is in one example, of at most as many places as it has frames
        num_places = num_frames - self.segment + 1
        bounds = np.linspace(0, num_places, -(-num_places // self.segment) + 1).astype(int)
        examples = []
        for begin, end in itertools.pairwise(bounds.tolist()):
            # frames of the padded sound; the first segment has its context in front of it
            last = end - 1 + self.segment
            example = SegmentExample(
                mel=mel[begin : last + 2 * self.context],
                samples=padded[(begin + self.context) * FRAME_SAMPLES : (last + self.context) * FRAME_SAMPLES],
                places=end - begin,
                segment=self.segment,
                name=row.name,
            )
            examples.append(example)
        return examples


def pad_and_analyze(
    samples: Float[np.ndarray, " n"], num_frames: int, context: int
) -> tuple[Float[np.ndarray, "frames 80"], Float[np.ndarray, " n"]]:
    """Sound of a number of frames with silence on either side, and its mel.

    Args:
      samples: at the vocoder's rate; silence is put behind too few, and what is over is left out.
      num_frames: that they are to be.
      context: frames of silence on either side.

    Returns:
      the mel, a frame for each ``FRAME_SAMPLES`` samples; and these samples.
    """
    total = (num_frames + 2 * context) * FRAME_SAMPLES
    padded = np.zeros(total, np.float32)
    sound = samples[: num_frames * FRAME_SAMPLES]
    begin = context * FRAME_SAMPLES
    padded[begin : begin + len(sound)] = sound
    mel = speech_log_mel(resample(padded, SAMPLE_RATE, RATE))
    return mel, padded
