"""Rows of ``tools/make_world.py`` by their task."""

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


def read_by_task(rows: Path) -> dict[str, list[LastReply]]:
    """The last replies of dialogues, by their row's task.

    Raises:
      InputError: if a row has no task, or none is a dialogue that ends in a reply.
    """
    by_task: dict[str, list[LastReply]] = {}
    for row in open_rows(str(rows)):
        task = row_values(row).get("task")
        if not isinstance(task, str):
            raise InputError(f"{row.name}: has no task; rows of tools/make_world.py have one")
        by_task.setdefault(task, []).extend(find_last_replies([row]))
    if not any(by_task.values()):
        raise InputError(f"{rows}: no row is a dialogue that ends in a reply")
    return by_task


def choose_in_turn(rows: Path, count: int | None = None) -> list[tuple[str, LastReply]]:
    """So many replies with their tasks: the first of each task, then the second of each, and so on; None: all.

    Raises:
      InputError: see ``read_by_task``.
    """
    turns = itertools.zip_longest(*([(task, reply) for reply in own] for task, own in read_by_task(rows).items()))
    return [found for turn in turns for found in turn if found is not None][:count]


def with_speech_prompt(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages after the system prompt of spoken replies; they have no other."""
    return [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, *messages]
