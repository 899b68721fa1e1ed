"""What was said in spoken answers, which later turns name by the id of their sound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

MAX_TRANSCRIPTS = 10_000


class Transcripts:
    """The latest transcripts, by id."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, str] = OrderedDict()

    def add(self, audio_id: str, text: str) -> None:
        """Keeps a transcript; the oldest one goes where there are too many."""
        self._texts[audio_id] = text
        if len(self._texts) > MAX_TRANSCRIPTS:
            self._texts.popitem(last=False)

    def fill_in(self, messages: Any) -> Any:
        """The messages of a body, where those of the assistant that name a sound have its transcript as well.

        Ids that are not known are left, for ``parse_messages`` to find.
        """
        return [self._fill_in(message) for message in messages] if isinstance(messages, list) else messages

    def _fill_in(self, message: Any) -> Any:
        audio = message.get("audio") if isinstance(message, Mapping) else None
        if not isinstance(audio, Mapping) or audio.get("transcript") is not None:
            return message
        audio_id = audio.get("id")
        text = self._texts.get(audio_id) if isinstance(audio_id, str) else None
        return message if text is None else {**message, "audio": {**audio, "transcript": text}}
