"""The text of a clip that gives a voice, as the Thinker reads it: in a dialogue of its own.

So the dialogue with the user, and with it the answer, is the same whoever speaks it. There is no turn of a user: the
system prompt that speech was trained with, and the text as the assistant's.
"""

from __future__ import annotations

from typing import NamedTuple

from omni_jax.errors import InputError
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.processing.layout import Prompt, lay_out
from omni_jax.processing.processor import Processor


class ClipText(NamedTuple):
    """What the Thinker reads, and where the text stands in it.

    Attributes:
      prompt: the dialogue, up to the last token of the text.
      first: token of the dialogue that the text begins with; it goes on to the end.
    """

    prompt: Prompt
    first: int

    @property
    def num_rows(self) -> int:
        """Of the text, for the Talker: one for each of its tokens."""
        return len(self.prompt) - self.first


def read_clip_text(processor: Processor, text: str, *, max_length: int | None = None) -> ClipText:
    """Reads what is said in a clip.

    Args:
      processor: of the model.
      text: it.
      max_length: tokens of the dialogue; the model's context if None.

    Raises:
      InputError: if it is empty or too long.
    """
    if not text.strip():
        raise InputError("the text of the clip is empty; it must be what is said in it")
    messages = [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, {"role": "assistant", "content": text}]
    prompt, replies = processor.dialogue(messages, max_length=max_length)
    own = (replies == 0).nonzero()[0]  # the token that ends the message among them, which has no row
    tokens = prompt.tokens[: own[-1]]
    return ClipText(lay_out(tokens.tolist(), (), processor.config.thinker_config), int(own[0]))
