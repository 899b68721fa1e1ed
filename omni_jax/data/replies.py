"""The replies that rows of dialogues end with, and what a model is to answer in their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_jax.data.rows import Document, VideoSound, read_row
from omni_jax.data.sources import Row


@dataclass(frozen=True)
class LastReply:
    """The last reply of a dialogue.

    Attributes:
      row: name of the row.
      prompt: the messages before it.
      text: of the reply.
    """

    row: str
    prompt: Sequence[Mapping[str, Any]]
    text: str


def find_last_replies(
    rows: Iterable[Row], sound: VideoSound = "auto", media_root: str | None = None
) -> list[LastReply]:
    """The last reply of each dialogue; documents, and dialogues that answer nothing, are passed over.

    Args:
      rows: to be read; their media are not opened.
      sound, media_root: as of ``read_row``.

    Raises:
      InputError: if a row is not what it should be.
    """
    found = []
    for row in rows:
        content = read_row(row, sound, media_root)
        if isinstance(content, Document):
            continue
        messages = content.messages
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        # the first message of all answers nothing
        if replies and replies[-1] > 0:
            text = _text_of(messages[replies[-1]]["content"])
            found.append(LastReply(row.name, messages[: replies[-1]], text))
    return found


def _text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """Of a message's parts those that are text."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)
