"""Prompts in few shapes, for generation: calls of the encoders, and chunks that are read one after the other.

A chunk holds a stretch of every row, the real tokens first. There are two widths of chunks, two sizes of calls for
sound, and one for pictures of about one size, so that few programs serve all prompts, whatever is in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flax import struct
from jaxtyping import Bool, Int

from omni_jax import mrope
from omni_jax.batch import Array, AudioBlocks, Spans, VisionFrames
from omni_jax.config import OmniConfig
from omni_jax.mrope import Span
from omni_jax.processing.collate import collate_media, media_index_of
from omni_jax.processing.layout import Prompt

NARROW, WIDE = 64, 256  # positions of a chunk
BLOCKS = 4  # of sound in a call, where there is more than one
WINDOWS = 32  # in a call of the vision encoder at least, if there are as many


@struct.dataclass
class Chunk:
    """A stretch of every row's tokens. The real ones come first; a row may have none."""

    tokens: Int[Array, "B C"]
    valid: Bool[Array, "B C"]
    spans: Spans  # of position ids, counted from the chunk's first position


@dataclass(frozen=True)
class Stretch:
    """A chunk, and the features of media in it."""

    chunk: Chunk
    media: np.ndarray  # bool [B, C]: whose embedding is a feature
    takes: Mapping[int, np.ndarray]  # a call's number -> int32 [B, C]: which of its features a position takes, or -1


@dataclass(frozen=True)
class Feed:
    """Everything that a batch of prompts has the Thinker read."""

    calls: tuple[AudioBlocks | VisionFrames, ...]  # of the encoders
    stretches: tuple[Stretch, ...]


def feed(prompts: Sequence[Prompt], spans: Sequence[Sequence[Span]], config: OmniConfig) -> Feed:
    """Cuts prompts, one a row.

    Args:
      prompts: some may be empty.
      spans: of each prompt's position ids, counted from its first token (``mrope.resolve``).
      config: gives the sizes of blocks and windows.
    """
    calls, begins, features = _calls(prompts, config)
    index = [media_index_of(p, [features[i, j] for j in range(len(p.media))]) for i, p in enumerate(prompts)]
    stretches, place = [], 0
    for width in widths(max(map(len, prompts), default=0)):
        stretches.append(_stretch(prompts, spans, index, begins, slice(place, place + width)))
        place += width
    return Feed(calls, tuple(stretches))


def widths(length: int) -> list[int]:
    """The widths of the chunks of a prompt."""
    out = []
    while length > 0:
        out.append(WIDE if length > 2 * NARROW else NARROW)
        length -= out[-1]
    return out


def frames_of_call(windows: int) -> int:
    """How many frames of so many windows go through the vision encoder in one call."""
    return max(1, WINDOWS // windows)


def _calls(
    prompts: Sequence[Prompt], config: OmniConfig
) -> tuple[tuple[AudioBlocks | VisionFrames, ...], np.ndarray, dict[tuple[int, int], np.ndarray]]:
    """The calls, where the features of each begin in the list of all of them, and where those of each item stand."""

    def rounded(n: int, unit: int) -> int:
        return -(-n // unit) * unit

    audio, vision, features = collate_media(
        prompts,
        config,
        blocks=lambda n: rounded(n, BLOCKS) if n > 1 else n,
        frames=lambda windows, n: rounded(n, frames_of_call(windows)),
    )
    c = config.thinker_config
    calls: list[AudioBlocks | VisionFrames] = []
    sizes: list[int] = []
    for begin in range(0, 0 if audio is None else len(audio.length), BLOCKS):
        assert audio is not None
        blocks = AudioBlocks(audio.mel[begin : begin + BLOCKS], audio.length[begin : begin + BLOCKS])
        calls.append(blocks)
        sizes.append(len(blocks.length) * c.audio_config.block_tokens)
    for group in vision:
        frames, windows = group.patches.shape[:2]
        each = frames_of_call(windows)
        for begin in range(0, frames, each):
            part = slice(begin, begin + each)
            calls.append(VisionFrames(group.patches[part], group.row[part], group.column[part], group.valid[part]))
            sizes.append(each * windows * c.vision_config.window_cells**2)
    return tuple(calls), np.cumsum([0, *sizes])[:-1], features


def _stretch(
    prompts: Sequence[Prompt],
    spans: Sequence[Sequence[Span]],
    index: Sequence[np.ndarray],
    begins: np.ndarray,
    part: slice,
) -> Stretch:
    shape = (len(prompts), part.stop - part.start)
    tokens, valid = np.zeros(shape, np.int32), np.zeros(shape, bool)
    feature = np.full(shape, -1, np.int32)
    for i, prompt in enumerate(prompts):
        own = prompt.tokens[part]
        tokens[i, : len(own)], valid[i, : len(own)] = own, True
        feature[i, : len(own)] = index[i][part]
    # a span holds at least one token, so a table as wide as the chunk is always enough
    table = mrope.stack([mrope.cut(row, part.start, part.stop) for row in spans], shape[1], width=shape[1])
    call = np.searchsorted(begins, feature, side="right") - 1  # -1 where there is no feature
    takes = {
        int(k): np.where(call == k, feature - begins[k], -1).astype(np.int32) for k in np.unique(call[feature >= 0])
    }
    return Stretch(Chunk(tokens, valid, table), feature >= 0, takes)
