"""What the parts of a realtime session see of it."""

from __future__ import annotations

from typing import Any, Protocol

from omni_jax.serving.conversation import Conversation, Item
from omni_jax.serving.realtime_config import SessionConfig
from omni_jax.serving.service import Service


class Session(Protocol):
    """A session.

    Attributes:
      service: that answers.
      config: its settings.
      conversation: so far.
    """

    service: Service
    config: SessionConfig
    conversation: Conversation

    async def send(self, kind: str, **values: Any) -> None:
        """Sends an event."""
        ...

    async def add_item(self, item: Item, previous_id: str | None = None) -> None:
        """Puts an item into the conversation, and tells the client."""
        ...
