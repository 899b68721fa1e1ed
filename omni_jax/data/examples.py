"""Rows to examples: decoded, tokenised and cut into blocks and windows, ready to be copied into a batch.

It runs in worker processes; everything large in an example is an array, which grain passes on in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from flax import struct
from jaxtyping import Float, Int

from omni_jax import mrope
from omni_jax.batch import NO_FEATURE, AudioBlocks, Spans, VisionFrames
from omni_jax.checks import redact
from omni_jax.config import OmniConfig
from omni_jax.data.rows import Document, VideoSound, read_row
from omni_jax.data.sources import Row
from omni_jax.errors import InputError, TooLongError, UnknownVoiceError, WrongCodecError, WrongReferenceError
from omni_jax.processing.collate import CollatedMedia, collate_media, media_index_of
from omni_jax.processing.layout import Prompt, lay_out
from omni_jax.processing.processor import Processor
from omni_jax.processing.worker_pool import WorkerStartError

T = TypeVar("T")
TooLong: TypeAlias = Literal["split", "skip", "error"]
MAX_DOCUMENT_TOKENS = 2**24  # of a document that is split


@struct.dataclass
class Example:
    """What one row is trained on: T tokens, and the media they take features from.

    A block of sound or a frame is a unit. Units are counted block by block, then frame by frame in the order of
    ``vision``; only the first ``windows`` of a frame hold anything.
    """

    tokens: Int[np.ndarray, " T"]
    weights: Float[np.ndarray, " T"]  # of the loss of predicting this token
    unit: Int[np.ndarray, " T"]  # that the token takes its feature from, or NO_FEATURE
    feature: Int[np.ndarray, " T"]  # which of the unit's features
    spans: Spans  # of one row, its position ids counted from its first token
    audio: AudioBlocks | None
    vision: tuple[VisionFrames, ...]
    windows: Int[np.ndarray, " frames"]
    name: str = struct.field(pytree_node=False)  # of the row
    source: int = struct.field(pytree_node=False, default=0)  # of the row

    @property
    def num_blocks(self) -> int:
        return 0 if self.audio is None else len(self.audio.length)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_spans(self) -> int:
        return self.spans.begin.shape[1]

    def frames(self) -> Iterator[VisionFrames]:
        """Each frame by itself, its arrays without the leading axis."""
        for group in self.vision:
            for f in range(len(group.patches)):
                yield VisionFrames(group.patches[f], group.row[f], group.column[f], group.valid[f])


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used."""

    file: str
    number: int
    reason: str
    is_fatal: bool = False  # whether it ends the run

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.reason}"


def make_example(
    prompt: Prompt, weights: Float[np.ndarray, " T"], name: str, config: OmniConfig, source: int = 0
) -> Example:
    """Cuts a prompt's media into units and says which of them each token takes its feature from."""
    c = config.thinker_config
    # no padding of blocks and frames: they are copied into a batch, which has its own
    media = collate_media([prompt], config, blocks=_exact_blocks, frames=_exact_frames)

    # An index into all features of the prompt would be of no use in a batch, where its units lie between others'. So
    # each index becomes a unit, which packing knows the place of, and a feature within the unit.
    media_features = [media.features[0, i] for i in range(len(prompt.media))]
    index = media_index_of(prompt, media_features)  # [T]
    has_feature = index != NO_FEATURE  # [T]
    unit_starts = np.cumsum([0, *_features_per_unit(media, config)])  # [units + 1]
    # the unit of a feature is the last that begins at it or before
    unit = np.where(has_feature, np.searchsorted(unit_starts, index, side="right") - 1, NO_FEATURE)  # [T]
    # without a feature ``unit`` is -1 and finds the last start, which the condition drops
    feature = np.where(has_feature, index - unit_starts[unit], 0)  # [T]

    # a frame's windows that hold a patch come first, those of padding after them
    windows_per_frame = [group.valid.any(-1).sum(-1) for group in media.vision]  # [F, W, P] -> [F], of each group
    spans = mrope.resolve_spans(prompt.segments, c)
    return Example(
        tokens=prompt.tokens,
        weights=weights.astype(np.float32),
        unit=unit.astype(np.int32),
        feature=feature.astype(np.int32),
        spans=mrope.stack_spans([spans], len(prompt), width=len(spans)),
        audio=media.audio,
        vision=media.vision,
        # an example without frames has an empty array, which needs a dtype
        windows=np.concatenate([np.zeros(0, np.int64), *windows_per_frame]),
        name=name,
        source=source,
    )


def _exact_blocks(num_blocks: int) -> int:
    return num_blocks


def _exact_frames(num_windows: int, num_frames: int) -> int:
    return num_frames


def _features_per_unit(media: CollatedMedia, config: OmniConfig) -> list[int]:
    """How many features each unit has, with those of padding."""
    c = config.thinker_config
    # the encoders give features for padding too, so every block has as many, and every frame of a group
    sizes = []
    if media.audio is not None:
        sizes += [c.audio_config.block_tokens] * len(media.audio.length)
    for group in media.vision:
        num_frames, num_windows = group.patches.shape[:2]
        sizes += [num_windows * c.vision_config.window_cells**2] * num_frames
    return sizes


def examples_or_reject(read: Callable[[Row], list[T]], row: Row, too_long: TooLong) -> list[T] | Reject:
    """What ``read`` makes of a row; or, if anything is wrong with it, why it cannot be used.

    Args:
      read: raises InputError for a row that is not what it should be, TooLongError for one that no batch holds.
      row: it.
      too_long: whether the latter ends the run.

    Raises:
      WorkerStartError: if the processes that read its media cannot be started.
    """
    try:
        return read(row)
    except WorkerStartError:
        raise
    except TooLongError as e:
        is_fatal = too_long == "error"
        hint = ". data.too_long is error: split or skip such rows, or raise data.tokens" if is_fatal else ""
        return Reject(row.file, row.number, redact(str(e)) + hint, is_fatal)
    except (UnknownVoiceError, WrongCodecError, WrongReferenceError) as e:
        # the other rows are like it, and what they teach would be noise
        return Reject(row.file, row.number, redact(str(e)), is_fatal=True)
    except InputError as e:
        return Reject(row.file, row.number, redact(str(e)))
    except Exception as e:
        # A file may be broken in ways that no decoder foresees; the share of rejects is bounded.
        return Reject(row.file, row.number, redact(f"{type(e).__name__}: {e}"))


@dataclass(frozen=True)
class Prepare:
    """Reads a row and its media through the processor that inference uses."""

    processor: Processor
    max_length: int  # tokens
    check: Callable[[Example], None]  # raises InputError if it does not fit a batch
    use_audio_in_video: VideoSound = "auto"
    media_root: str | None = None  # that media must lie within; None: the folder of the row's file
    too_long: TooLong = "split"

    def __call__(self, row: Row) -> list[Example] | Reject:
        """The row's examples, several of a long document; or, if anything is wrong with it, why it cannot be used.

        Raises:
          WorkerStartError: if the processes that read its media cannot be started.
        """
        return examples_or_reject(self.examples, row, self.too_long)

    def examples(self, row: Row) -> list[Example]:
        """Of a document that is longer than a row of the batch several, of everything else one.

        Raises:
          InputError: if the row has no target, or is not what it should be.
          TooLongError: if it is longer than a row of the batch, and is not to be split or cannot be.
        """
        # the code that inference uses, so that a model is trained on the tokens that it will be given
        content = read_row(row, self.use_audio_in_video, self.media_root)
        if isinstance(content, Document):
            splits = self.too_long == "split"
            prompt = self.processor.document(
                content.text, max_length=MAX_DOCUMENT_TOKENS if splits else self.max_length
            )
            return [self._make(window, np.ones(len(window), np.float32), row) for window in self._split(prompt)]
        prompt, replies = self.processor.dialogue(content.messages, max_length=self.max_length)
        # a token that belongs to no reply has the number -1, and so the last weight, 0
        weights = np.array([*content.weights, 0.0], np.float32)[replies]
        # the first token is predicted by nothing, so its weight does not count
        if not weights[1:].any():
            raise InputError("it has no target tokens: no text of the assistant with a loss")
        return [self._make(prompt, weights, row)]

    def _split(self, document: Prompt) -> list[Prompt]:
        """Windows of a document that overlap by one token, so that each token but the first is predicted once."""
        if len(document) <= self.max_length:
            return [document]
        config = self.processor.config.thinker_config
        begins = range(0, len(document) - 1, self.max_length - 1)
        return [lay_out(document.tokens[i : i + self.max_length].tolist(), (), config) for i in begins]

    def _make(self, prompt: Prompt, weights: Float[np.ndarray, " T"], row: Row) -> Example:
        example = make_example(prompt, weights, row.name, self.processor.config, row.source)
        # here and not in packing: what fits no batch is a reject like any other, and never waits for a place
        self.check(example)
        return example
