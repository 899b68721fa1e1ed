"""Held-out rows of ``tools/make_world.py``, of all tasks in turn."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_jax.data.replies import LastReply, find_last_replies
from omni_jax.data.rows import row_values
from omni_jax.data.sources import open_rows
from omni_jax.errors import InputError
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT


def choose(rows: Path, count: int | None = None) -> list[tuple[str, LastReply]]:
    """So many rows with their tasks: the first of each task, then the second of each, and so on; None: all.

    Raises:
      InputError: if a row has no task, or none is a dialogue that ends in a reply.
    """
    by_task: dict[str, list[LastReply]] = {}
    for row in open_rows(str(rows)):
        task = row_values(row).get("task")
        if not isinstance(task, str):
            raise InputError(f"{row.name}: has no task; rows of tools/make_world.py have one")
        by_task.setdefault(task, []).extend(find_last_replies([row]))
    turns = itertools.zip_longest(*([(task, reply) for reply in own] for task, own in by_task.items()))
    chosen = [found for turn in turns for found in turn if found is not None][:count]
    if not chosen:
        raise InputError(f"{rows}: no row is a dialogue that ends in a reply")
    return chosen


def with_speech_prompt(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages after the system prompt of spoken replies; they have no other."""
    return [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, *messages]
