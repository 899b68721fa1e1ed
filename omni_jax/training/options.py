"""What each objective can be told: the options of a recipe that are of one loss alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from omni_jax.checks import check_float, check_int

FLOAT_MAX = 3e38  # of float32


@dataclass(frozen=True)
class NextTokenOptions:
    """Cross-entropy of the next token."""

    chunk: int = 1024
    """Positions of a row whose logits exist at a time."""
    z_loss: float = 0.0
    """Factor of log(sum(exp(logits)))^2, which is added to the loss."""

    def check(self) -> None:
        """Raises InputError if a field is out of its range."""
        check_int("objective.chunk", self.chunk, 1)
        check_float("objective.z_loss", self.z_loss, 0, FLOAT_MAX)


@dataclass(frozen=True)
class FlowMatchingOptions:
    """The velocity of Token2Wav's flow from noise to the mel of codes."""

    utterances: int = 16
    """In a row of the batch, at most."""
    clip_frames: int = 512
    """Mel frames, 100 a second, of a clip of a voice, at most."""
    max_clip: float = 0.3
    """Share of an utterance that stands for its voice's clip, at most; the loss leaves it out."""
    drop_sound: float = 0.3
    """Share of the utterances that have codes, and neither a clip nor the vector of a voice."""
    drop_all: float = 0.2
    """Share of the utterances that have no codes either, which is what guidance subtracts."""

    def check(self) -> None:
        """Raises InputError if a field is out of its range."""
        check_int("objective.utterances", self.utterances, 1)
        check_int("objective.clip_frames", self.clip_frames, 16)
        # more than half could leave a short utterance without any frame that has a loss
        check_float("objective.max_clip", self.max_clip, 0, 0.5)
        check_float("objective.drop_sound", self.drop_sound, 0, 1)
        check_float("objective.drop_all", self.drop_all, 0, 1)


ObjectiveOptions: TypeAlias = NextTokenOptions | FlowMatchingOptions
