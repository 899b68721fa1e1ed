"""Prompts in few shapes, for generation: inputs of the encoders, and chunks that are prefilled one after the other.

A chunk holds the next tokens of every slot, the real ones first. There are two widths of chunks, two sizes of calls for
sound, and one for pictures of about one size, so that few programs serve all prompts, whatever is in them. In a batch
prompts are cut into blocks instead, narrow chunks of one prompt each, of which a call takes several: of one prompt or
of many, so that hardly any position of a call is padding.

Letters: B slots, C positions of a chunk or a block, R blocks of a call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from omni_jax import mrope
from omni_jax.batch import AudioBlocks, Spans, VisionFrames
from omni_jax.config import OmniConfig, ThinkerConfig
from omni_jax.mrope import Span
from omni_jax.processing.collate import collate_media, media_index_of
from omni_jax.processing.layout import Prompt, Usage

# two widths: wide chunks use the hardware well, narrow ones keep the padding of short prompts small
NARROW_CHUNK = 64  # positions
WIDE_CHUNK = 256
BLOCK_WIDTH = 32  # positions of a block
CALL_BLOCKS = (2, 8)  # blocks in a call: the fewest that suffice; the larger call is as large as a wide chunk
AUDIO_BLOCKS = 4  # of two seconds in a call of the audio encoder, where a prompt has more than one
VISION_WINDOWS = 32  # in a call of the vision encoder at least, if there are as many

NO_FEATURE = -1  # in place of a feature's index where a position takes the embedding of its token

EMPTY_PROMPT = Prompt(np.zeros(0, np.int32), (), (), np.zeros(0, np.int32), np.zeros(0, np.int32), Usage())


@dataclass(frozen=True)
class PromptPiece:
    """A prompt, or the next piece of one.

    Attributes:
      prompt: token ids and media.
      spans: of its position ids, counted from its first token (``mrope.resolve_spans``).
    """

    prompt: Prompt
    spans: Sequence[Span]


def cut_piece(piece: PromptPiece, start: int) -> PromptPiece:
    """What remains of a prompt behind its first ``start`` tokens, with the media that its tokens take features from."""
    prompt = piece.prompt
    media_item = prompt.media_item[start:]
    kept = np.unique(media_item[media_item >= 0])
    numbers = np.full(len(prompt.media) + 1, -1, np.int32)  # by the number in the prompt; the last is for no item
    numbers[kept] = np.arange(len(kept))
    rest = dataclasses.replace(
        prompt,
        tokens=prompt.tokens[start:],
        segments=(),  # position ids are those of the spans
        media=tuple(prompt.media[item] for item in kept),
        media_item=numbers[media_item],
        media_token=prompt.media_token[start:],
    )
    return PromptPiece(rest, mrope.cut_spans(piece.spans, start, len(prompt)))


@dataclass(frozen=True)
class PrefillChunk:
    """The next tokens of every slot, and where their embeddings come from.

    Attributes:
      tokens: int32 [B, C].
      valid: bool [B, C], which are real; a slot may have none.
      spans: of position ids, counted from the chunk's first position.
      is_media: bool [B, C], whose embedding is a feature of sound or pictures.
      feature_index: number of an encoder input -> int32 [B, C], which of its features a position takes, or
        ``NO_FEATURE``.
    """

    tokens: Int[np.ndarray, "B C"]
    valid: Bool[np.ndarray, "B C"]
    spans: Spans
    is_media: Bool[np.ndarray, "B C"]
    feature_index: Mapping[int, Int[np.ndarray, "B C"]]

    @property
    def num_tokens(self) -> int:
        """Real tokens of the slot that has most."""
        return int(self.valid.sum(axis=1).max())


@dataclass(frozen=True)
class PrefillPlan:
    """Everything that the Thinker computes to read a batch of prompts.

    Attributes:
      encoder_inputs: one for each call of an encoder.
      chunks: to be prefilled in this order.
    """

    encoder_inputs: tuple[AudioBlocks | VisionFrames, ...]
    chunks: tuple[PrefillChunk, ...]


@dataclass(frozen=True)
class PlacedBlock:
    """A block of a prompt on its way into a slot.

    Attributes:
      chunk: of one row.
      slot: of the prompt.
      start: index in the slot of its first position.
    """

    chunk: PrefillChunk
    slot: int
    start: int


@dataclass(frozen=True)
class PrefillBlocks:
    """The blocks of one call.

    Attributes:
      chunk: a row for each block. Rows without a valid position fill up the call.
      slot, start: int32 [R], as of ``PlacedBlock``.
    """

    chunk: PrefillChunk
    slot: Int[np.ndarray, " R"]
    start: Int[np.ndarray, " R"]


@dataclass(frozen=True)
class _EncoderInputs:
    """The calls of the encoders, and where their features are.

    Attributes:
      calls: as in ``PrefillPlan``.
      starts: of each call, the index of its first feature among those of all calls.
      features: (prompt, media item) -> indices of its features among those of all calls.
    """

    calls: tuple[AudioBlocks | VisionFrames, ...]
    starts: Int[np.ndarray, " calls"]
    features: Mapping[tuple[int, int], np.ndarray]


def plan_prefill(pieces: Sequence[PromptPiece], config: OmniConfig) -> PrefillPlan:
    """Cuts prompts, one for each slot, into chunks.

    Args:
      pieces: some may be empty.
      config: gives the sizes of blocks and windows.
    """
    prompts = [piece.prompt for piece in pieces]
    inputs = _plan_encoders(prompts, config)
    # of each prompt: the feature of each of its tokens, among those of all calls
    index = []
    for number, piece in enumerate(pieces):
        items = [inputs.features[number, item] for item in range(len(piece.prompt.media))]
        index.append(media_index_of(piece.prompt, items))
    # the longest prompt decides; in the last chunks those that are shorter have no valid positions
    longest = max(map(len, prompts), default=0)
    chunks = []
    start = 0
    for width in chunk_widths(longest):
        chunks.append(_cut_chunk(pieces, index, inputs.starts, slice(start, start + width)))
        start += width
    return PrefillPlan(inputs.calls, tuple(chunks))


class PromptPlan:
    """One prompt, to be cut into blocks or into chunks.

    Attributes:
      encoder_inputs: one for each call of an encoder.
      num_tokens: of the prompt.
    """

    def __init__(self, piece: PromptPiece, config: OmniConfig):
        inputs = _plan_encoders([piece.prompt], config)
        self.encoder_inputs = inputs.calls
        self.num_tokens = len(piece.prompt)
        self._piece = piece
        self._starts = inputs.starts
        items = [inputs.features[0, item] for item in range(len(piece.prompt.media))]
        # the feature of each token, among those of all calls
        self._index = media_index_of(piece.prompt, items)

    def cut_blocks(self, start: int, slot: int) -> list[PlacedBlock]:
        """The prompt from ``start`` on, in blocks that belong into this slot."""
        blocks = []
        for begin in range(start, self.num_tokens, BLOCK_WIDTH):
            blocks.append(PlacedBlock(self._cut(begin, BLOCK_WIDTH), slot, begin))
        return blocks

    def cut_chunks(self) -> list[PrefillChunk]:
        """All of the prompt, in the chunks of ``plan_prefill``."""
        chunks = []
        start = 0
        for width in chunk_widths(self.num_tokens):
            chunks.append(self._cut(start, width))
            start += width
        return chunks

    def _cut(self, start: int, width: int) -> PrefillChunk:
        return _cut_chunk([self._piece], [self._index], self._starts, slice(start, start + width))


def stack_blocks(blocks: Sequence[PlacedBlock], first_features: Sequence[int]) -> PrefillBlocks:
    """Blocks of one call; it is filled up with empty ones.

    Args:
      blocks: at most as many as the larger call has.
      first_features: of each block, which of the call's arrays of features is the first of its prompt's.
    """
    num_rows = next(size for size in CALL_BLOCKS if size >= len(blocks))
    num_empty = num_rows - len(blocks)
    rows = [block.chunk for block in blocks]
    # each call of an encoder has an index of its own, over all rows
    feature_index: dict[int, np.ndarray] = {}
    for row, (chunk, first) in enumerate(zip(rows, first_features, strict=True)):
        for number, index in chunk.feature_index.items():
            whole = feature_index.setdefault(first + number, np.full((num_rows, BLOCK_WIDTH), NO_FEATURE, np.int32))
            whole[row] = index[0]

    def fill_up(name: str) -> np.ndarray:
        stacked = np.concatenate([getattr(row, name) for row in rows])  # [blocks, C]
        return np.pad(stacked, ((0, num_empty), (0, 0)))  # [R, C]

    columns = []
    for field in dataclasses.fields(Spans):
        column = np.concatenate([getattr(row.spans, field.name) for row in rows])
        columns.append(np.pad(column, ((0, num_empty), (0, 0)), mode="edge"))
    chunk = PrefillChunk(fill_up("tokens"), fill_up("valid"), Spans(*columns), fill_up("is_media"), feature_index)
    places = np.zeros((2, num_rows), np.int32)
    places[0, : len(blocks)] = [block.slot for block in blocks]
    places[1, : len(blocks)] = [block.start for block in blocks]
    return PrefillBlocks(chunk, *places)


def chunk_widths(num_tokens: int) -> list[int]:
    """The widths of the chunks of a prompt: wide ones, and for the rest one or two narrow ones if they suffice."""
    widths = []
    while num_tokens > 0:
        # two narrow chunks compute half of what a wide one does
        width = WIDE_CHUNK if num_tokens > 2 * NARROW_CHUNK else NARROW_CHUNK
        widths.append(width)
        num_tokens -= width
    return widths


def frames_per_call(num_windows: int) -> int:
    """How many frames of so many windows go through the vision encoder in one call."""
    return max(1, VISION_WINDOWS // num_windows)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _round_blocks(num_blocks: int) -> int:
    # a single block has a program of its own: short sounds are common, and live sound comes block by block
    return _round_up(num_blocks, AUDIO_BLOCKS) if num_blocks > 1 else num_blocks


def _round_frames(num_windows: int, num_frames: int) -> int:
    return _round_up(num_frames, frames_per_call(num_windows))


def _plan_encoders(prompts: Sequence[Prompt], config: OmniConfig) -> _EncoderInputs:
    audio, vision, features = collate_media(prompts, config, blocks=_round_blocks, frames=_round_frames)
    calls: list[AudioBlocks | VisionFrames] = []
    if audio is not None:
        calls += _split_audio(audio)
    for group in vision:
        calls += _split_vision(group)
    # calls are cut in the order of collate_media's features, whose indices so become those of all calls
    counts = [_count_features(call, config.thinker_config) for call in calls]
    starts = np.cumsum([0, *counts])[:-1]  # [calls]
    return _EncoderInputs(tuple(calls), starts, features)


def _split_audio(audio: AudioBlocks) -> list[AudioBlocks]:
    calls = []
    for start in range(0, len(audio.length), AUDIO_BLOCKS):
        part = slice(start, start + AUDIO_BLOCKS)
        calls.append(AudioBlocks(audio.mel[part], audio.length[part]))
    return calls


def _split_vision(group: VisionFrames) -> list[VisionFrames]:
    num_frames, num_windows = group.patches.shape[:2]
    per_call = frames_per_call(num_windows)
    calls = []
    for start in range(0, num_frames, per_call):
        part = slice(start, start + per_call)
        calls.append(VisionFrames(group.patches[part], group.row[part], group.column[part], group.valid[part]))
    return calls


def _count_features(call: AudioBlocks | VisionFrames, config: ThinkerConfig) -> int:
    if isinstance(call, AudioBlocks):
        return len(call.length) * config.audio_config.block_tokens
    num_frames, num_windows = call.patches.shape[:2]
    return num_frames * num_windows * config.vision_config.window_cells**2


def _cut_chunk(
    pieces: Sequence[PromptPiece], index: Sequence[np.ndarray], starts: np.ndarray, part: slice
) -> PrefillChunk:
    width = part.stop - part.start
    shape = (len(pieces), width)
    tokens = np.zeros(shape, np.int32)  # [B, C]
    valid = np.zeros(shape, bool)  # [B, C]
    feature = np.full(shape, NO_FEATURE, np.int32)  # [B, C]
    spans = []
    for slot, piece in enumerate(pieces):
        # a slice past the end is shorter, or empty: the rest of the row stays padding
        own = piece.prompt.tokens[part]
        tokens[slot, : len(own)] = own
        valid[slot, : len(own)] = True
        feature[slot, : len(own)] = index[slot][part]
        spans.append(mrope.cut_spans(piece.spans, part.start, part.stop))
    # a span holds at least one token, so a table as wide as the chunk is always enough
    table = mrope.stack_spans(spans, width, width=width)
    return PrefillChunk(tokens, valid, table, feature >= 0, _split_features(feature, starts))


def _split_features(feature: Int[np.ndarray, "B C"], starts: np.ndarray) -> dict[int, np.ndarray]:
    """``PrefillChunk.feature_index`` from indices among the features of all calls."""
    call_of = np.searchsorted(starts, feature, side="right") - 1  # [B, C], -1 where there is no feature
    by_call = {}
    # a call that this chunk takes nothing from has no entry, so that its features need not be there
    for call in np.unique(call_of[feature >= 0]):
        in_call = np.where(call_of == call, feature - starts[call], NO_FEATURE)
        by_call[int(call)] = in_call.astype(np.int32)
    return by_call
