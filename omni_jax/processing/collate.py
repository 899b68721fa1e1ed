"""Prompts to an ``OmniBatch``: rows, blocks of sound and windows of frames, all of bucketed shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from omni_jax import positions
from omni_jax.batch import AudioBlocks, OmniBatch, VisionFrames, bucket
from omni_jax.config import OmniConfig, VisionEncoderConfig
from omni_jax.errors import InputError
from omni_jax.processing.layout import AudioInput, Prompt, VisionInput

SMALLEST_ROW = 64  # text positions


def collate(
    prompts: Sequence[Prompt], config: OmniConfig, *, length: int | None = None, pad_left: bool = True
) -> OmniBatch:
    """Stacks prompts, one a row.

    Args:
      prompts: at least one.
      config: gives the sizes of blocks and windows.
      length: S; the bucketed length of the longest prompt if None.
      pad_left: where a row's padding stands. Generation pads on the left, so that all rows end together.

    Raises:
      InputError: if a prompt is longer than ``length``.
    """
    longest = max(map(len, prompts))
    length = bucket(longest, SMALLEST_ROW) if length is None else length
    if longest > length:
        raise InputError(f"a prompt has {longest} tokens, but the batch was asked to be {length} long")
    audio, audio_features, n_audio = _collate_audio(prompts, config)
    vision, vision_features = _collate_vision(prompts, config.thinker_config.vision_config, n_audio)
    features = audio_features | vision_features

    shape = (len(prompts), length)
    tokens = np.full(shape, config.thinker_config.pad_token_id, np.int32)
    segment_ids, media_index = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    spans = []
    for i, prompt in enumerate(prompts):
        begin = length - len(prompt) if pad_left else 0
        real = slice(begin, begin + len(prompt))
        tokens[i, real], segment_ids[i, real] = prompt.tokens, 1
        media_index[i, real] = _media_index(prompt, [features[i, j] for j in range(len(prompt.media))])
        spans.append(positions.resolve(prompt.segments, config.thinker_config, begin=begin))
    return OmniBatch(tokens, segment_ids, media_index, positions.stack(spans, length), audio, vision)


def _media_index(prompt: Prompt, features: list[np.ndarray]) -> np.ndarray:
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
    prompts: Sequence[Prompt], config: OmniConfig
) -> tuple[AudioBlocks | None, dict[tuple[int, int], np.ndarray], int]:
    """The blocks, the place of each item's features, and the number of features (with those of padding)."""
    sizes = config.thinker_config.audio_config
    frames = sizes.block_frames
    items = [(key, item.mel) for key, item in _items(prompts, AudioInput) if isinstance(item, AudioInput)]
    if not items:
        return None, {}, 0
    count = sum(-(-len(mel) // frames) for _, mel in items)
    blocks = np.zeros((bucket(count), frames, sizes.num_mel_bins), np.float32)
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
    prompts: Sequence[Prompt], sizes: VisionEncoderConfig, first_feature: int
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
        frames, places = _collate_group(groups[width], width, sizes)
        features.update({key: first_feature + place for key, place in places.items()})
        first_feature += frames.patches.shape[0] * width * sizes.window_cells**2
        vision.append(frames)
    return tuple(vision), features


def _collate_group(
    group: Sequence[tuple[tuple[int, int], VisionInput, _Windows]], width: int, sizes: VisionEncoderConfig
) -> tuple[VisionFrames, dict[tuple[int, int], np.ndarray]]:
    """One group of ``width`` windows a frame."""
    frames = bucket(sum(item.grid[0] for _, item, _ in group))
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
