"""Spoken dialogues into batches of fixed shapes: rows of tokens for the Thinker, and of its streams for the Talker.

What the Talker reads of an example lies in the same row of the batch as what the Thinker does, so that a device has all
of it. Several examples share a row; each answer is a segment of the Talker's row. Nothing is truncated and nothing
leaks, as in ``packing``.

Letters: B rows, S positions of a row of the Thinker, P of the Talker, N spans of the latter, U utterances of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from omni_jax.batch import PADDING, Array, Spans, TrainBatch
from omni_jax.config import OmniConfig
from omni_jax.data.packing import Budget, Part, assemble, copy_spans, empty_spans, fill
from omni_jax.data.spoken_examples import PrepareSpoken, SpokenExample
from omni_jax.errors import TooLongError
from omni_jax.models.talker import NO_CODE
from omni_jax.models.talker_conditioning import NUM_SPECIAL, TEXT_PAD, TEXT_ROW, lay_out_stream, special_tokens

# positions may be sharded, as those of text
_POSITIONS = {"logical_axes": ("batch", "sequence")}


@struct.dataclass
class SpokenBatch:
    """What one step of the Talker is trained on."""

    dialogues: TrainBatch  # what the Thinker reads, with the targets of its own loss
    # TEXT_ROW, or which of the row's special tokens stands for the text
    part: Int[Array, "B P"] = struct.field(metadata=_POSITIONS)
    # position of the Thinker whose row stands for the text, where ``part`` is TEXT_ROW
    text_row: Int[Array, "B P"] = struct.field(metadata=_POSITIONS)
    codes: Int[Array, "B P"] = struct.field(metadata=_POSITIONS)  # that are read, or NO_CODE
    targets: Int[Array, "B P"] = struct.field(metadata=_POSITIONS)  # the next code
    weights: Float[Array, "B P"] = struct.field(metadata=_POSITIONS)  # of the loss; 0: not a target
    segment_ids: Int[Array, "B P"] = struct.field(metadata=_POSITIONS)  # 1 + number of the utterance
    spans: Spans  # of the Talker's position ids
    # ``talker_conditioning.special_tokens`` of each utterance
    special: Int[Array, "B U 3"] = struct.field(metadata={"logical_axes": ("batch", None, None)})


@dataclass(frozen=True)
class SpokenBudget:
    """What a stream may put into a step.

    Attributes:
      dialogues: what the Thinker reads.
      positions: of a row of the Talker.
      utterances: of a row of the Talker.
    """

    dialogues: Budget
    positions: int
    utterances: int

    def check(self, example: SpokenExample) -> None:
        """Raises InputError if the example would not even fit alone, saying which budget is too small."""
        num_tokens = 0
        num_spans = 0
        for part in example.thinker_examples:
            self.dialogues.check(part)
            num_tokens += len(part.tokens)
            num_spans += part.num_spans
        # what the Thinker reads of a clip stands in the same row
        _check(num_tokens, self.dialogues.tokens, "tokens", "data.tokens")
        spans = max(num_spans, example.num_spans * len(example.answers))
        _check(spans, self.dialogues.spans, "spans of position ids", "data.spans")
        _check(example.num_positions, self.positions, "positions of the Talker", "objective.positions")
        _check(len(example.answers), self.utterances, "utterances", "objective.utterances")


def _check(needed: int, limit: int, what: str, option: str) -> None:
    if needed > limit:
        raise TooLongError(f"it takes {needed} {what}, over the {limit} of a row ({option})")


@dataclass(frozen=True)
class PlacedSpoken:
    """An example, and where it stands in its stream's part of a batch."""

    example: SpokenExample
    row: int
    begins: tuple[int, ...]  # in the Thinker's row, of each of ``example.thinker_examples``
    begin: int  # in the Talker's row
    span: int  # first of its own in the row's table
    utterance: int  # number of the first of its own


class SpokenPart:
    """A stream's part of a batch in the making."""

    def __init__(self, budget: SpokenBudget) -> None:
        self.dialogues = Part(budget.dialogues)
        self.placed: list[PlacedSpoken] = []
        self._budget = budget
        # used so far, in each row of the Talker
        self._positions = [0] * budget.dialogues.rows
        self._spans = [0] * budget.dialogues.rows
        self._utterances = [0] * budget.dialogues.rows

    @property
    def full(self) -> bool:
        for positions, utterances in zip(self._positions, self._utterances, strict=True):
            if positions < self._budget.positions and utterances < self._budget.utterances:
                return self.dialogues.full
        return True

    @property
    def names(self) -> list[str]:
        """Of the rows whose examples were placed."""
        return [placed.example.name for placed in self.placed]

    def place(self, example: SpokenExample) -> bool:
        """Puts an example into the row with most tokens that it fits in; False if it fits in none."""
        parts = example.thinker_examples
        row = next(filter(lambda row: self._has_room(row, example), self.dialogues.rows_with_room(parts)), None)
        # only the media of the dialogue, which is the first, may find no place: a clip's text has none
        if row is None or not self.dialogues.place(parts[0], row):
            return False
        begins = [self.dialogues.placed[-1].begin]
        for part in parts[1:]:
            is_placed = self.dialogues.place(part, row)
            assert is_placed
            begins.append(self.dialogues.placed[-1].begin)
        place = (self._positions[row], self._spans[row], self._utterances[row])
        self.placed.append(PlacedSpoken(example, row, tuple(begins), *place))
        self._positions[row] += example.num_positions
        self._spans[row] += example.num_spans * len(example.answers)
        self._utterances[row] += len(example.answers)
        return True

    def _has_room(self, row: int, example: SpokenExample) -> bool:
        budget = self._budget
        num_answers = len(example.answers)
        return (
            self._positions[row] + example.num_positions <= budget.positions
            and self._spans[row] + example.num_spans * num_answers <= budget.dialogues.spans
            and self._utterances[row] + num_answers <= budget.utterances
        )


@dataclass(frozen=True)
class SpokenPacking:
    """Spoken dialogues into ``SpokenBatch``.

    Attributes:
      prepare: reads rows.
      budget: of one stream.
      config: of the model.
      media_dtype: that its encoders compute in.
    """

    prepare: PrepareSpoken
    budget: SpokenBudget
    config: OmniConfig
    media_dtype: DTypeLike = np.float32

    def new_part(self) -> SpokenPart:
        return SpokenPart(self.budget)

    def assemble(self, parts: Sequence[SpokenPart], *, first: int, streams: int) -> SpokenBatch:
        return assemble_spoken(
            parts, self.budget, self.config, first=first, streams=streams, media_dtype=self.media_dtype
        )

    def measure_fill(self, batch: SpokenBatch) -> dict[str, float]:
        found = fill(batch.dialogues)
        segment_ids = np.asarray(batch.segment_ids)
        return {
            "utterances": float(segment_ids.max(axis=1).sum()),
            "positions": float((segment_ids != PADDING).mean()),
            "codes": float((np.asarray(batch.weights) > 0).mean()),
            "tokens": found.tokens,
            "audio_blocks": found.audio_blocks,
            "windows": found.windows,
        }


def assemble_spoken(
    parts: Sequence[SpokenPart],
    budget: SpokenBudget,
    config: OmniConfig,
    *,
    first: int,
    streams: int,
    media_dtype: DTypeLike = np.float32,
) -> SpokenBatch:
    """Writes the batch of a process; see ``packing.assemble`` for the arguments."""
    own = [part.dialogues for part in parts]
    dialogues = assemble(own, budget.dialogues, config, first=first, streams=streams, media_dtype=media_dtype)
    batch = _make_empty(dialogues, budget, config, len(parts) * budget.dialogues.rows)
    for number, part in enumerate(parts):
        for placed in part.placed:
            _write(batch, config, placed, number * budget.dialogues.rows + placed.row)
    return batch


def _make_empty(dialogues: TrainBatch, budget: SpokenBudget, config: OmniConfig, num_rows: int) -> SpokenBatch:
    """Rows of padding."""
    shape = (num_rows, budget.positions)
    c = config.talker_config
    # a token that exists in every place: what stands for padding is read by nothing
    voice = np.full(num_rows * budget.utterances, c.tts_text_start_token_id, np.int32)
    return SpokenBatch(
        dialogues=dialogues,
        part=np.full(shape, TEXT_PAD, np.int32),
        text_row=np.zeros(shape, np.int32),
        codes=np.full(shape, NO_CODE, np.int32),
        targets=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
        segment_ids=np.full(shape, PADDING, np.int32),
        spans=empty_spans(num_rows, budget.dialogues.spans, budget.positions),
        special=special_tokens(c, voice).reshape(num_rows, budget.utterances, NUM_SPECIAL),
    )


def _write(batch: SpokenBatch, config: OmniConfig, placed: PlacedSpoken, row: int) -> None:
    """Copies an example to its place."""
    example = placed.example
    # where the Thinker's rows of the prompt and of the text stand
    dialogue = placed.begins[0]
    reply = dialogue + example.prompt_length
    text_rows = np.arange(reply, reply + example.num_reply_rows)
    if example.clip is not None:
        # the clip's dialogue ends with its text
        end = placed.begins[1] + len(example.clip.tokens)
        text_rows = np.concatenate([np.arange(end - example.num_clip_rows, end), text_rows])
    prompt_rows = np.arange(dialogue, reply)
    begin = placed.begin
    span = placed.span
    for utterance, codes in enumerate(example.answers, placed.utterance):
        stream = lay_out_stream(config.talker_config, prompt_rows, text_rows, codes, example.clip_codes)
        own = (row, slice(begin, begin + len(stream)))
        is_row = stream.part == TEXT_ROW
        batch.part[own] = np.where(is_row, TEXT_ROW, utterance * NUM_SPECIAL + stream.part)
        batch.text_row[own] = stream.row
        batch.codes[own] = stream.codes
        batch.targets[own] = stream.targets
        batch.weights[own] = stream.weights
        batch.segment_ids[own] = utterance + 1
        batch.special[row, utterance] = special_tokens(config.talker_config, np.array([example.voice_token]))[0]
        # those of the prompt; the last of them counts on through the speech
        copy_spans(batch.spans, row, span, example.dialogue.spans, example.num_spans, begin)
        begin += len(stream)
        span += example.num_spans
