"""Sounds with their text twice: for the speech tokenizer, and as dialogues in which a Thinker writes the text down.

The dialogue has the user's sound with an instruction, and the text as the assistant's answer. The features of the sound
are the tokenizer's, so the Thinker's own encoder reads nothing, and its sound is not in the batch a second time. Both
stand in the same row of the batch, so that a device has all of an utterance.

Letters: B rows, S positions of the Thinker, and those of ``transcribed_packing``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flax import struct
from jaxtyping import Float

from omni_jax.batch import NO_FEATURE, TrainBatch
from omni_jax.config import OmniConfig
from omni_jax.data.examples import Example, Reject, examples_or_reject, make_example
from omni_jax.data.packing import Budget, Part, assemble, fill
from omni_jax.data.rows import row_values
from omni_jax.data.sources import Row
from omni_jax.data.speech_packing import SpeechBudget, SpeechPart
from omni_jax.data.transcribed_examples import PrepareTranscribed, TranscribedExample
from omni_jax.data.transcribed_packing import TranscribedBatch, TranscribedPacking, make_empty_batch
from omni_jax.processing.processor import Processor
from omni_jax.processing.speech_mel import RATE
from omni_jax.speech_tokenizer_config import SpeechTokenizerConfig


@struct.dataclass
class DialogueBatch:
    """What the tokenizer takes, and what a Thinker reads of its output."""

    speech: TranscribedBatch
    dialogues: TrainBatch  # without media; ``media_index`` counts the outputs of the tokenizer, block by block


@dataclass(frozen=True)
class DialogueExample:
    """What one row is trained on.

    Attributes:
      speech: for the tokenizer.
      dialogue: without its media, and with the number of each feature of its sound in ``feature``.
    """

    speech: TranscribedExample
    dialogue: Example

    @property
    def name(self) -> str:
        """Of the row."""
        return self.speech.name

    @property
    def num_tokens(self) -> int:
        """Codes."""
        return self.speech.num_tokens


@dataclass(frozen=True)
class PrepareDialogues:
    """Reads a row and its sound.

    Attributes:
      speech: for the tokenizer.
      processor: of the Thinker.
      instruction: what the user asks for.
      budget: that an example must fit in alone.
    """

    speech: PrepareTranscribed
    processor: Processor
    instruction: str
    budget: Budget

    def __call__(self, row: Row) -> list[DialogueExample] | Reject:
        """The row's example; or, if anything is wrong with it, why it cannot be used."""
        return examples_or_reject(lambda row: [self.example(row)], row, self.speech.too_long)

    def example(self, row: Row) -> DialogueExample:
        """Of a row.

        Raises:
          InputError, TooLongError: as ``PrepareTranscribed.example``; or if the dialogue is too long.
        """
        values = row_values(row)
        samples = self.speech.read_samples(row, values)
        speech = self.speech.make(row, values, samples)
        dialogue = self._make_dialogue(samples, values["text"], row)
        self.budget.check(dialogue)
        return DialogueExample(speech, dialogue)

    def _make_dialogue(self, samples: Float[np.ndarray, " n"], text: str, row: Row) -> Example:
        sound = {"type": "audio", "audio": samples, "sampling_rate": RATE}
        question = {"role": "user", "content": [sound, {"type": "text", "text": self.instruction}]}
        messages = [question, {"role": "assistant", "content": text}]
        prompt, replies = self.processor.dialogue(messages, max_length=self.budget.tokens)
        weights = (replies >= 0).astype(np.float32)
        found = make_example(prompt, weights, row.name, self.processor.config, row.source)
        is_sound = found.unit != NO_FEATURE
        # the tokenizer's blocks may be others than the Thinker's, so features are counted through the sound
        feature = np.where(is_sound, np.cumsum(is_sound) - 1, NO_FEATURE).astype(np.int32)
        no_unit = np.full_like(found.unit, NO_FEATURE)
        return dataclasses.replace(found, unit=no_unit, feature=feature, audio=None)


class DialoguePart:
    """A stream's part of a batch in the making."""

    def __init__(self, speech: SpeechPart, dialogues: Part) -> None:
        self.speech = speech
        self.dialogues = dialogues

    @property
    def full(self) -> bool:
        return self.speech.full or self.dialogues.full

    @property
    def names(self) -> list[str]:
        """Of the rows whose examples were placed."""
        return self.speech.names

    def place(self, example: DialogueExample) -> bool:
        """Puts an example into the row with most sound that it fits in; False if it fits in none."""
        with_room = self.dialogues.rows_with_room([example.dialogue])
        for row in self.speech.rows_with_room(example.speech):
            if row in with_room:
                return self.speech.place(example.speech, row) and self.dialogues.place(example.dialogue, row)
        return False


@dataclass(frozen=True)
class DialoguePacking:
    """Utterances into ``DialogueBatch``.

    Attributes:
      prepare: reads rows.
      speech: of the tokenizer's part.
      budget: of one stream, for the Thinker; without media.
      config: of the model.
    """

    prepare: PrepareDialogues
    speech: TranscribedPacking
    budget: Budget
    config: OmniConfig

    def new_part(self) -> DialoguePart:
        return DialoguePart(self.speech.new_part(), Part(self.budget))

    def assemble(self, parts: Sequence[DialoguePart], *, first: int, streams: int) -> DialogueBatch:
        """The batch of a process; only ``media_index`` depends on which streams these are."""
        speech = self.speech.assemble([part.speech for part in parts], first=first, streams=streams)
        own = [part.dialogues for part in parts]
        dialogues = assemble(own, self.budget, self.config, first=first, streams=streams)
        media_index = np.asarray(dialogues.inputs.media_index)
        row_features = self.speech.budget.blocks * self.speech.config.audio_config.block_tokens
        for number, part in enumerate(parts):
            for placed, spoken in zip(part.dialogues.placed, part.speech.placed, strict=True):
                local_row = number * self.budget.rows + placed.row
                features = placed.example.feature
                is_sound = features != NO_FEATURE
                # rows of the streams of earlier processes come before
                begin = (first * self.budget.rows + local_row) * row_features
                begin += spoken.begin * self.speech.config.audio_config.block_tokens
                positions = slice(placed.begin, placed.begin + len(features))
                media_index[local_row, positions][is_sound] = begin + features[is_sound]
        return DialogueBatch(speech, dialogues)

    def measure_fill(self, batch: DialogueBatch) -> dict[str, float]:
        found = fill(batch.dialogues)
        return {**self.speech.measure_fill(batch.speech), "tokens": found.tokens, "target_tokens": found.target_tokens}


def make_empty_dialogues(
    tokenizer: SpeechTokenizerConfig, config: OmniConfig, speech: SpeechBudget, dialogues: Budget, max_labels: int
) -> DialogueBatch:
    """One row of padding.

    Args:
      tokenizer: its sizes.
      config: of the model.
      speech: of a row.
      dialogues: of one row.
      max_labels: of an utterance.
    """
    text = assemble([Part(dialogues)], dialogues, config, first=0, streams=1)
    return DialogueBatch(make_empty_batch(tokenizer, speech, 1, max_labels), text)
