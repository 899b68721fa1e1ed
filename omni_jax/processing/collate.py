"""Prompts to an ``OmniBatch``: rows, blocks of sound and windows of frames, all of bucketed shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from omni_jax import mrope
from omni_jax.batch import AudioBlocks, OmniBatch, VisionFrames, bucket
from omni_jax.config import OmniConfig, VisionEncoderConfig
from omni_jax.errors import InputError
from omni_jax.processing.layout import AudioInput, Prompt, VisionInput

SMALLEST_ROW = 64  # text positions


def collate(prompts: Sequence[Prompt], config: OmniConfig, *, length: int | None = None) -> OmniBatch:
    """Stacks prompts, one a row, padded at the end.

    Args:
      prompts: at least one.
      config: gives the sizes of blocks and windows.
      length: S; the bucketed length of the longest prompt if None.

    Raises:
      InputError: if a prompt is longer than ``length``.
    """
    longest = max(map(len, prompts))
    length = bucket(longest, SMALLEST_ROW) if length is None else length
    if longest > length:
        raise InputError(f"a prompt has {longest} tokens, but the batch was asked to be {length} long")
    audio, vision, features = collate_media(prompts, config)

    shape = (len(prompts), length)
    tokens = np.full(shape, config.thinker_config.pad_token_id, np.int32)
    segment_ids, media_index = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    spans = []
    for i, prompt in enumerate(prompts):
        real = slice(len(prompt))
        tokens[i, real], segment_ids[i, real] = prompt.tokens, 1
        media_index[i, real] = media_index_of(prompt, [features[i, j] for j in range(len(prompt.media))])
        spans.append(mrope.resolve(prompt.segments, config.thinker_config))
    return OmniBatch(tokens, segment_ids, media_index, mrope.stack(spans, length), audio, vision)


def collate_media(
    prompts: Sequence[Prompt],
    config: OmniConfig,
    *,
    blocks: Callable[[int], int] = bucket,
    frames: Callable[[int, int], int] = lambda windows, frames: bucket(frames),
) -> tuple[AudioBlocks | None, tuple[VisionFrames, ...], dict[tuple[int, int], np.ndarray]]:
    """What the encoders are given.

    Args:
      prompts: whose media it is.
      config: gives the sizes of blocks and windows.
      blocks: how many blocks there are to be, for so many real ones.
      frames: how many frames there are to be in a group, for windows a frame and real frames.

    Returns:
      The sound, the groups of frames, and of each item, by its row and its place there, where its features stand
      in the list of all features.
    """
    audio, features, n_audio = _collate_audio(prompts, config, blocks)
    vision, places = _collate_vision(prompts, config.thinker_config.vision_config, n_audio, frames)
    return audio, vision, features | places


def media_index_of(prompt: Prompt, features: list[np.ndarray]) -> np.ndarray:
    """Where the feature of each token stands, given where those of each item stand. [T]"""
    index = np.full(len(prompt), -1, np.int32)
    for item, places in enumerate(features):
        own = prompt.media_item == item
        index[own] = places[prompt.media_token[own]]
    return index


def _items(prompts: Sequence[Prompt], kind: type) -> list[tuple[tuple[int, int], AudioInput | VisionInput]]:
    """The media of one kind, with their row and their place in it."""
    return [((i, j), m) for i, p in enumerate(prompts) for j, m in enumerate(p.media) if isinstance(m, kind)]


def _collate_audio(
    prompts: Sequence[Prompt], config: OmniConfig, rounded: Callable[[int], int]
) -> tuple[AudioBlocks | None, dict[tuple[int, int], np.ndarray], int]:
    """The blocks, the place of each item's features, and the number of features (with those of padding)."""
    sizes = config.thinker_config.audio_config
    frames = sizes.block_frames
    items = [(key, item.mel) for key, item in _items(prompts, AudioInput) if isinstance(item, AudioInput)]
    if not items:
        return None, {}, 0
    count = sum(-(-len(mel) // frames) for _, mel in items)
    blocks = np.zeros((rounded(count), frames, sizes.num_mel_bins), np.float32)
    lengths = np.zeros(len(blocks), np.int32)
    features, block = {}, 0
    for key, mel in items:
        features[key] = np.arange(-(-len(mel) // frames) * sizes.block_tokens) + block * sizes.block_tokens
        for begin in range(0, len(mel), frames):
            piece = mel[begin : begin + frames]
            blocks[block, : len(piece)], lengths[block] = piece, len(piece)
            block += 1
    return AudioBlocks(blocks, lengths), features, len(blocks) * sizes.block_tokens


@dataclass(frozen=True)
class _Windows:
    """How the merged cells of a frame are dealt out to windows."""

    count: int
    window: np.ndarray  # [cells], natural order: the window of a cell
    slot: np.ndarray  # [cells]: its place in the window
    row: np.ndarray  # [cells, patches a cell]: of its patches in the frame
    column: np.ndarray


@lru_cache(maxsize=256)
def _windows(height: int, width: int, side: int, merge: int) -> _Windows:
    """Windows of ``side x side`` cells row by row, the cells of a window row by row (spec 4.4).

    A window at the edge holds fewer cells; they take its first slots.
    """
    row, column = np.divmod(np.arange(height * width), width)
    across = -(-width // side)
    window = row // side * across + column // side
    order = np.lexsort((column, row, window))
    counts = np.bincount(window)
    slot = np.empty_like(order)
    slot[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    inner_row, inner_column = np.divmod(np.arange(merge * merge), merge)
    return _Windows(len(counts), window, slot, row[:, None] * merge + inner_row, column[:, None] * merge + inner_column)


def _collate_vision(
    prompts: Sequence[Prompt], sizes: VisionEncoderConfig, first_feature: int, rounded: Callable[[int, int], int]
) -> tuple[tuple[VisionFrames, ...], dict[tuple[int, int], np.ndarray]]:
    """Groups of frames of about one size, and the place of each item's features."""
    groups: dict[int, list[tuple[tuple[int, int], VisionInput, _Windows]]] = defaultdict(list)
    for key, item in _items(prompts, VisionInput):
        assert isinstance(item, VisionInput)
        cells = item.cells(sizes.spatial_merge_size)
        windows = _windows(cells.height, cells.width, sizes.window_cells, sizes.spatial_merge_size)
        groups[bucket(windows.count)].append((key, item, windows))
    vision, features = [], {}
    for width in sorted(groups):
        slots = rounded(width, sum(item.grid[0] for _, item, _ in groups[width]))
        frames, places = _collate_group(groups[width], slots, width, sizes)
        features.update({key: first_feature + place for key, place in places.items()})
        first_feature += frames.patches.shape[0] * width * sizes.window_cells**2
        vision.append(frames)
    return tuple(vision), features


def _collate_group(
    group: Sequence[tuple[tuple[int, int], VisionInput, _Windows]],
    frames: int,
    width: int,
    sizes: VisionEncoderConfig,
) -> tuple[VisionFrames, dict[tuple[int, int], np.ndarray]]:
    """One group of ``width`` windows a frame."""
    cells, merged = sizes.window_cells**2, sizes.spatial_merge_size**2
    shape = (frames, width, cells, merged)
    patches = np.zeros((*shape, sizes.patch_dim), np.float32)
    row, column, valid = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    places, frame = {}, 0
    for key, item, windows in group:
        t = item.grid[0]
        own = (slice(frame, frame + t), windows.window, windows.slot)
        patches[own] = item.patches.reshape(t, len(windows.window), merged, -1)
        row[own], column[own], valid[own] = windows.row, windows.column, True
        within = windows.window * cells + windows.slot
        places[key] = ((np.arange(frame, frame + t) * width * cells)[:, None] + within).reshape(-1)
        frame += t
    flat = (frames, width, cells * merged)
    patches = patches.reshape(*flat, sizes.patch_dim)
    return VisionFrames(patches, row.reshape(flat), column.reshape(flat), valid.reshape(flat)), places
