"""Rows to examples: decoded, tokenised and cut into blocks and windows, ready to be copied into a batch.

It runs in worker processes; everything large in an example is an array, which grain passes on in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flax import struct
from jaxtyping import Float, Int

from omni_jax import mrope
from omni_jax.batch import AudioBlocks, Spans, VisionFrames
from omni_jax.config import OmniConfig
from omni_jax.data.rows import Document, VideoSound, read_row
from omni_jax.data.sources import Row
from omni_jax.errors import InputError
from omni_jax.processing.collate import collate_media, media_index_of
from omni_jax.processing.layout import Prompt
from omni_jax.processing.processor import Processor


@struct.dataclass
class Example:
    """What is learnt from one row: T tokens, and the media they take features from.

    A block of sound or a frame is a unit. Units are counted block by block, then frame by frame in the order of
    ``vision``; only the first ``windows`` of a frame hold anything.
    """

    tokens: Int[np.ndarray, " T"]
    weights: Float[np.ndarray, " T"]  # of the loss of predicting this token
    unit: Int[np.ndarray, " T"]  # that the token takes its feature from; -1: none
    feature: Int[np.ndarray, " T"]  # of the unit's features, which
    spans: Spans  # of one row, its position ids counted from its first token
    audio: AudioBlocks | None
    vision: tuple[VisionFrames, ...]
    windows: Int[np.ndarray, " frames"]
    name: str = struct.field(pytree_node=False)  # of the row

    @property
    def blocks(self) -> int:
        return 0 if self.audio is None else len(self.audio.length)


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used."""

    file: str
    number: int
    reason: str


def make_example(prompt: Prompt, weights: Float[np.ndarray, " T"], name: str, config: OmniConfig) -> Example:
    """Cuts a prompt's media into units and says which of them each token takes its feature from."""
    c = config.thinker_config
    audio, vision, features = collate_media([prompt], config, blocks=lambda n: n, frames=lambda windows, n: n)
    index = media_index_of(prompt, [features[0, i] for i in range(len(prompt.media))])
    # how many features each unit has, with those that stand empty
    sizes = [c.audio_config.block_tokens] * (0 if audio is None else len(audio.length))
    for group in vision:
        frames, windows = group.patches.shape[:2]
        sizes += [windows * c.vision_config.window_cells**2] * frames
    begins = np.cumsum([0, *sizes])
    unit = np.where(index < 0, -1, np.searchsorted(begins, index, side="right") - 1)
    feature = np.where(index < 0, 0, index - begins[unit])
    counts = [group.valid.any(-1).sum(-1) for group in vision]
    spans = mrope.resolve(prompt.segments, c)
    return Example(
        tokens=prompt.tokens,
        weights=weights.astype(np.float32),
        unit=unit.astype(np.int32),
        feature=feature.astype(np.int32),
        spans=mrope.stack([spans], len(prompt), width=len(spans)),
        audio=audio,
        vision=vision,
        windows=np.concatenate([np.zeros(0, np.int64), *counts]),
        name=name,
    )


@dataclass(frozen=True)
class Prepare:
    """Reads a row and its media through the processor that inference uses."""

    processor: Processor
    max_length: int  # tokens
    check: Callable[[Example], None]  # raises InputError if it does not fit a batch
    use_audio_in_video: VideoSound = "auto"

    def __call__(self, row: Row) -> Example | Reject:
        """The example; or, if anything is wrong with the row, why it cannot be used."""
        try:
            return self.example(row)
        except InputError as e:
            return Reject(row.file, row.number, str(e))
        except Exception as e:  # a file may be broken in ways that no decoder foresees; the share of rejects is bounded
            return Reject(row.file, row.number, f"{type(e).__name__}: {e}")

    def example(self, row: Row) -> Example:
        """Raises InputError if nothing can be learnt from the row."""
        content = read_row(row, self.use_audio_in_video)
        if isinstance(content, Document):
            prompt = self.processor.document(content.text, max_length=self.max_length)
            weights = np.ones(len(prompt), np.float32)
        else:
            prompt, replies = self.processor.dialogue(content.messages, max_length=self.max_length)
            weights = np.array([*content.weights, 0.0], np.float32)[replies]  # -1 is the last
        if not weights[1:].any():
            raise InputError("there is nothing to learn in it: it has no words of the assistant")
        example = make_example(prompt, weights, row.name, self.processor.config)
        self.check(example)
        return example
