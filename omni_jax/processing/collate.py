"""Prompts to an ``OmniBatch``: rows, blocks of sound and windows of frames, all of bucketed shapes.

Letters as in ``omni_jax.batch``; T tokens of a prompt, t frames of a medium.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

from omni_jax import mrope
from omni_jax.batch import NO_FEATURE, PADDING, AudioBlocks, OmniBatch, VisionFrames, bucket, bucket_windows
from omni_jax.config import OmniConfig, VisionEncoderConfig
from omni_jax.processing.layout import AudioInput, Prompt, VisionInput

SMALLEST_ROW = 64  # text positions

_Media = TypeVar("_Media", AudioInput, VisionInput)

# a medium by its place: number of the prompt, number in the prompt
MediaKey: TypeAlias = tuple[int, int]


class CollatedMedia(NamedTuple):
    """What the encoders are given, and where their features stand."""

    audio: AudioBlocks | None
    vision: tuple[VisionFrames, ...]  # groups of frames, the smallest first
    features: dict[MediaKey, np.ndarray]  # of each medium: indices into the list of all features


def collate(prompts: Sequence[Prompt], config: OmniConfig) -> OmniBatch:
    """Stacks prompts, one a row, padded at the end to the bucketed length of the longest.

    Args:
      prompts: at least one.
      config: gives the sizes of blocks and windows.
    """
    length = bucket(max(map(len, prompts)), SMALLEST_ROW)
    media = collate_media(prompts, config)
    shape = (len(prompts), length)
    tokens = np.full(shape, config.thinker_config.pad_token_id, np.int32)  # [B, S]
    segment_ids = np.full(shape, PADDING, np.int32)  # [B, S]
    media_index = np.full(shape, NO_FEATURE, np.int32)  # [B, S]
    spans = []
    for i, prompt in enumerate(prompts):
        # rows are padded at the end, so that real tokens and their position ids begin at 0
        real = slice(len(prompt))
        tokens[i, real] = prompt.tokens
        segment_ids[i, real] = 1
        features = [media.features[i, j] for j in range(len(prompt.media))]
        media_index[i, real] = media_index_of(prompt, features)
        spans.append(mrope.resolve_spans(prompt.segments, config.thinker_config))
    return OmniBatch(tokens, segment_ids, media_index, mrope.stack_spans(spans, length), media.audio, media.vision)


def _bucket_frames(num_windows: int, num_frames: int) -> int:
    return bucket(num_frames)


def collate_media(
    prompts: Sequence[Prompt],
    config: OmniConfig,
    *,
    blocks: Callable[[int], int] = bucket,
    frames: Callable[[int, int], int] = _bucket_frames,
) -> CollatedMedia:
    """Cuts the media of prompts into the inputs of the encoders.

    Args:
      prompts: whose media it is.
      config: gives the sizes of blocks and windows.
      blocks: from the number of real blocks to that of all, padding included.
      frames: from windows a frame and the number of real frames in a group to that of all, padding included.
    """
    audio, audio_features = _collate_audio(prompts, config, blocks)
    # one list holds the features of all: first the blocks' with their padding, then the frames'
    block_tokens = config.thinker_config.audio_config.block_tokens
    num_audio_features = 0 if audio is None else len(audio.length) * block_tokens
    vision, vision_features = _collate_vision(prompts, config.thinker_config.vision_config, num_audio_features, frames)
    return CollatedMedia(audio, vision, audio_features | vision_features)


def media_index_of(prompt: Prompt, features: Sequence[np.ndarray]) -> np.ndarray:
    """Where the feature of each token stands, given where those of each medium of the prompt stand. [T]"""
    index = np.full(len(prompt), NO_FEATURE, np.int32)
    for item, item_features in enumerate(features):
        own = prompt.media_item == item  # [T]
        index[own] = item_features[prompt.media_token[own]]
    return index


def _find_media(prompts: Sequence[Prompt], kind: type[_Media]) -> list[tuple[MediaKey, _Media]]:
    """The media of one kind, each with its key."""
    found = []
    for i, prompt in enumerate(prompts):
        for j, medium in enumerate(prompt.media):
            if isinstance(medium, kind):
                found.append(((i, j), medium))
    return found


def _collate_audio(
    prompts: Sequence[Prompt], config: OmniConfig, round_blocks: Callable[[int], int]
) -> tuple[AudioBlocks | None, dict[MediaKey, np.ndarray]]:
    """The blocks, and the indices of each medium's features."""
    sizes = config.thinker_config.audio_config
    media = _find_media(prompts, AudioInput)
    if not media:
        return None, {}
    num_blocks = 0
    for _, medium in media:
        num_blocks += -(-len(medium.mel) // sizes.block_frames)
    mel = np.zeros((round_blocks(num_blocks), sizes.block_frames, sizes.num_mel_bins), np.float32)  # [A, T, M]
    lengths = np.zeros(len(mel), np.int32)
    features = {}
    block = 0
    for key, medium in media:
        # every clip begins a block of its own: the encoder's blocks are counted from its beginning
        first = block
        for begin in range(0, len(medium.mel), sizes.block_frames):
            piece = medium.mel[begin : begin + sizes.block_frames]
            mel[block, : len(piece)] = piece
            lengths[block] = len(piece)
            block += 1
        # the features behind those of a short last block are padding, which no token takes
        features[key] = np.arange(first * sizes.block_tokens, block * sizes.block_tokens)
    return AudioBlocks(mel, lengths), features


@dataclass(frozen=True)
class _WindowLayout:
    """Where the merged cells of a frame stand in its entries, each as large as a whole window."""

    num_entries: int
    entry: np.ndarray  # [cells], natural order: that holds the window of a cell
    slot: np.ndarray  # [cells]: the cell's place in the entry
    row: np.ndarray  # [cells, patches a cell]: of its patches in the frame
    column: np.ndarray


@lru_cache(maxsize=256)
def _lay_out_windows(height: int, width: int, side: int, merge: int) -> _WindowLayout:
    """Windows of ``side x side`` cells, the cells of a window row by row (docs/reference.md, 4).

    Windows at the edges hold fewer cells; as many of them share an entry as have room there.
    """
    row, column = np.divmod(np.arange(height * width), width)  # [cells]
    windows_in_a_row = -(-width // side)
    window = row // side * windows_in_a_row + column // side  # [cells]
    # sorted by window, then by row and column; a cell's rank is how far it is behind the first of its window
    order = np.lexsort((column, row, window))  # [cells]
    counts = np.bincount(window)  # [windows]
    first_of_window = np.repeat(np.cumsum(counts) - counts, counts)  # [cells], in the sorted order
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - first_of_window
    entries, first_slots = _share_entries(counts, side * side)
    # the patches of a cell stand side by side, row by row
    inner_row, inner_column = np.divmod(np.arange(merge * merge), merge)
    return _WindowLayout(
        num_entries=int(entries.max()) + 1,
        entry=entries[window],
        slot=first_slots[window] + rank,
        row=row[:, None] * merge + inner_row,
        column=column[:, None] * merge + inner_column,
    )


def _share_entries(counts: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """First fit, the largest windows first: the entry of each window, and its first slot there.

    Args:
      counts: cells of each window.
      capacity: cells of an entry.
    """
    entries = np.zeros_like(counts)
    first_slots = np.zeros_like(counts)
    # whole windows come first and leave no room
    num_whole = int((counts == capacity).sum())
    used = [capacity] * num_whole
    for number, window in enumerate(np.argsort(-counts, kind="stable")):
        if number < num_whole:
            entries[window] = number
            continue
        room = (i for i in range(num_whole, len(used)) if used[i] + counts[window] <= capacity)
        entry = next(room, len(used))
        if entry == len(used):
            used.append(0)
        entries[window], first_slots[window] = entry, used[entry]
        used[entry] += int(counts[window])
    return entries, first_slots


class _LaidOutMedium(NamedTuple):
    key: MediaKey
    medium: VisionInput
    layout: _WindowLayout


def _collate_vision(
    prompts: Sequence[Prompt],
    sizes: VisionEncoderConfig,
    first_feature: int,
    round_frames: Callable[[int, int], int],
) -> tuple[tuple[VisionFrames, ...], dict[MediaKey, np.ndarray]]:
    """Groups of frames of about one size, and the indices of each medium's features."""
    groups: dict[int, list[_LaidOutMedium]] = defaultdict(list)
    for key, medium in _find_media(prompts, VisionInput):
        cells = medium.cells(sizes.spatial_merge_size)
        layout = _lay_out_windows(cells.height, cells.width, sizes.window_cells, sizes.spatial_merge_size)
        # frames of about as many windows share an array; in one for all, small frames would be mostly padding
        groups[bucket_windows(layout.num_entries)].append(_LaidOutMedium(key, medium, layout))
    vision = []
    features = {}
    for num_windows in sorted(groups):
        group = groups[num_windows]
        num_real_frames = sum(item.medium.grid[0] for item in group)
        num_frames = round_frames(num_windows, num_real_frames)
        frames, places = _collate_group(group, num_frames, num_windows, sizes)
        for key, place in places.items():
            features[key] = first_feature + place
        # padding has features too: the encoder computes them with the others
        first_feature += num_frames * num_windows * sizes.window_cells**2
        vision.append(frames)
    return tuple(vision), features


def _collate_group(
    group: Sequence[_LaidOutMedium], num_frames: int, num_windows: int, sizes: VisionEncoderConfig
) -> tuple[VisionFrames, dict[MediaKey, np.ndarray]]:
    """One group of ``num_windows`` a frame, and where each medium's features stand among the group's."""
    cells = sizes.window_cells**2
    merged = sizes.spatial_merge_size**2
    shape = (num_frames, num_windows, cells, merged)
    patches = np.zeros((*shape, sizes.patch_dim), np.float32)  # [F, W, cells, patches of a cell, C]
    row = np.zeros(shape, np.int32)
    column = np.zeros(shape, np.int32)
    valid = np.zeros(shape, bool)
    places = {}
    frame = 0
    for key, medium, layout in group:
        t = medium.grid[0]
        # a video's frames are all of one size, so one layout deals out the cells of each: [t, cells, ...]
        own = (slice(frame, frame + t), layout.entry, layout.slot)
        patches[own] = medium.patches.reshape(t, len(layout.entry), merged, -1)
        row[own] = layout.row
        column[own] = layout.column
        valid[own] = True
        # features stand frame by frame, in each entry by entry and slot by slot, empty slots included
        within_frame = layout.entry * cells + layout.slot  # [cells]
        frame_starts = np.arange(frame, frame + t) * num_windows * cells  # [t]
        places[key] = (frame_starts[:, None] + within_frame).reshape(-1)
        frame += t
    flat = (num_frames, num_windows, cells * merged)  # [F, W, P]
    frames = VisionFrames(
        patches.reshape(*flat, sizes.patch_dim), row.reshape(flat), column.reshape(flat), valid.reshape(flat)
    )
    return frames, places
