"""What a prompt is known by, so that what was prefilled of it can be found again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from omni_jax.config import ThinkerConfig
from omni_jax.mrope import Span, cut_spans, resolve_spans
from omni_jax.processing.layout import Prompt


@dataclass(frozen=True, eq=False)
class PromptKey:
    """All that what is prefilled of a prompt depends on.

    Attributes:
      tokens: int32 [T].
      media_item, media_token: of the prompt.
      media: a digest of each of its media.
      spans: of its position ids.
      adapter: of the Thinker's, that reads it.
    """

    tokens: Int[np.ndarray, " T"]
    media_item: Int[np.ndarray, " T"]
    media_token: Int[np.ndarray, " T"]
    media: tuple[bytes, ...]
    spans: tuple[Span, ...]
    adapter: str | None

    @classmethod
    def create(cls, prompt: Prompt, adapter: str | None, config: ThinkerConfig) -> PromptKey:
        """Of a whole prompt. Its media are read through, which takes a while where they are long."""
        media = tuple(item.digest for item in prompt.media)
        spans = tuple(resolve_spans(prompt.segments, config))
        return cls(prompt.tokens, prompt.media_item, prompt.media_token, media, spans, adapter)

    def __len__(self) -> int:
        return len(self.tokens)

    def begins(self, other: PromptKey) -> bool:
        """Whether another prompt begins with this one, and has more tokens."""
        length = len(self)
        if length >= len(other) or self.adapter != other.adapter:
            return False
        for mine, its in ((self.tokens, other.tokens), (self.media_item, other.media_item)):
            if not np.array_equal(mine, its[:length]):
                return False
        if not np.array_equal(self.media_token, other.media_token[:length]):
            return False
        # media stand in the order of their tokens
        same_media = self.media == other.media[: len(self.media)]
        return same_media and list(self.spans) == cut_spans(other.spans, 0, length)

    def equals(self, other: PromptKey) -> bool:
        """Whether another prompt is the same."""
        same = (self.adapter, self.media, self.spans) == (other.adapter, other.media, other.spans)
        return same and np.array_equal(self.tokens, other.tokens)
