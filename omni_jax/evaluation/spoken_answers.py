"""Texts of rows, spoken by a model: the Talker's answers to what the Thinker is given to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_jax.batch import bucket
from omni_jax.checks import check_int, shown
from omni_jax.data.replies import find_last_replies
from omni_jax.data.rows import relocate_row, row_values
from omni_jax.data.sources import Row
from omni_jax.engine.outputs import Reply
from omni_jax.engine.request import BLOCK_SIZES, RequestState, SchedulerConfig
from omni_jax.errors import InputError
from omni_jax.generation.model import OmniModel
from omni_jax.generation.options import Options
from omni_jax.processing.read_aloud import QUESTION, make_dialogue


@dataclass(frozen=True)
class SpokenText:
    """A row's text that is to be spoken.

    Attributes:
      name: of the row.
      values: of the row that is written, as far as it is known: ``messages``, and media.
      prompt: the messages before the text.
      text: the last message, which is the assistant's.
    """

    name: str
    values: Mapping[str, Any]
    prompt: Sequence[Mapping[str, Any]]
    text: str


def read_spoken_text(row: Row, out: Path, question: str = QUESTION, media_root: str | None = None) -> SpokenText:
    """The text of a row, ``{"text": ...}`` or a dialogue in ``messages`` that ends in a reply.

    Args:
      row: its media are not opened.
      out: the file that is written; paths of media become absolute where it lies in another folder.
      question: what is asked of a text; ``{text}`` stands for it.
      media_root: the folder that media must lie within; None: that of the row's file.

    Raises:
      InputError: naming the row, if it is neither, or no row at all.
    """
    try:
        return _read_text(row, out, question, media_root)
    except InputError as e:
        raise InputError(f"{row.name}: {e}") from e


def _read_text(row: Row, out: Path, question: str, media_root: str | None) -> SpokenText:
    values = row_values(row)
    if "messages" not in values:
        text = values.get("text")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"text is {shown(text)}; it must be what is to be spoken")
        messages = make_dialogue(text, question)
        return SpokenText(row.name, {"messages": messages}, messages[:-1], text)
    replies = find_last_replies([row], media_root=media_root)
    last = values["messages"][-1] if values["messages"] else None
    if not replies or not isinstance(last, Mapping) or last.get("role") != "assistant" or not replies[0].text.strip():
        raise InputError("messages must end in a reply with a text, which is what is to be spoken")
    return SpokenText(row.name, relocate_row(row, out), replies[0].prompt, replies[0].text)


def speak_texts(model: OmniModel, texts: Sequence[SpokenText], options: Sequence[Options]) -> list[Reply]:
    """Has a model speak texts, all of them at once.

    Args:
      model: that can speak.
      texts: what is spoken.
      options: how each is spoken; its ``reply_text`` is the text.

    Raises:
      InputError: naming the row, for what cannot be served, and whatever keeps a text from being spoken.
    """
    num_slots = bucket(len(texts))
    scheduler = model.scheduler(SchedulerConfig(num_slots, num_slots, BLOCK_SIZES))
    numbers: dict[RequestState, int] = {}
    for number, (text, chosen) in enumerate(zip(texts, options, strict=True)):
        try:
            numbers[model.submit(scheduler, model.processor(text.prompt), chosen)] = number
        except InputError as e:
            raise InputError(f"{text.name}: {e}") from e
    replies: dict[int, Reply] = {}
    for state, event in scheduler.run():
        if event.reply is not None:
            replies[numbers[state]] = event.reply
    ordered = [replies[number] for number in range(len(texts))]
    for text, reply in zip(texts, ordered, strict=True):
        if reply.error is not None:
            raise InputError(f"{text.name} is not spoken: {reply.error}")
    return ordered


def make_seed(seed: int, row: int, answer: int) -> int:
    """A seed of its own for each answer to each row; the same whatever is answered beside it."""
    check_int("seed", seed, 0)
    # of 32 bits, mixed so that neighbours have nothing in common
    mixed = (seed * 0x9E3779B1 + row * 0x85EBCA77 + answer * 0xC2B2AE3D) & 0xFFFFFFFF
    mixed ^= mixed >> 15
    return (mixed * 0x2C1B3C6D) & 0xFFFFFFFF
