"""Whether PyTorch's reference answers as a trained model does: the model is exported and both answer held-out rows.

    python tools/compare_reference.py checkpoints/omni-tiny out/world/test.jsonl --items 50

Rows are taken from all tasks in turn. Both answer greedily in float32, from the same tokens and the same media. What
differs is printed with both answers, and the command ends with 1. Needs pip install -e '.[test]'.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import torch
import tyro
from rich.console import Console
from rich.progress import track
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import omni_jax
from omni_jax.checkpoint.export import to_hf
from omni_jax.checkpoint.store import components
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checks import check_int, printable
from omni_jax.data.replies import LastReply, find_last_replies
from omni_jax.data.rows import row_values
from omni_jax.data.sources import open_rows
from omni_jax.errors import CheckpointError, ConfigError, InputError
from tools.reference_inputs import reference_arguments


@dataclass(frozen=True)
class Options:
    """What is compared."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A checkpoint, or the folder of a training run."""
    rows: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Rows with a task, of tools/make_world.py."""
    items: int = 50
    """How many are answered."""
    max_tokens: int = 48
    """Of an answer."""


class Compared(NamedTuple):
    """A row's answers, ours and the reference's, as token ids and as text."""

    task: str
    row: str
    tokens: list[int]
    reference_tokens: list[int]
    text: str
    reference_text: str

    @property
    def is_same(self) -> bool:
        return self.tokens == self.reference_tokens


def choose(rows: Path, count: int) -> list[tuple[str, LastReply]]:
    """So many rows with their tasks: the first of each task, then the second of each, and so on.

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


def load_reference(folder: Path, is_thinker_alone: bool) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The reference's Thinker in float32, from an exported folder."""
    if is_thinker_alone:
        config = Qwen2_5OmniThinkerConfig.from_pretrained(folder)
        loaded = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, config=config)
        return loaded.float().eval()
    config = Qwen2_5OmniConfig.from_pretrained(folder)
    whole = Qwen2_5OmniForConditionalGeneration.from_pretrained(folder, config=config)
    return whole.thinker.float().eval()


def compare(options: Options) -> Iterator[Compared]:
    """Both answers to each row.

    Raises:
      CheckpointError, ConfigError, InputError: where there are none.
    """
    check_int("--items", options.items, 1)
    chosen = choose(options.rows, options.items)
    folder = resolve_checkpoint(options.model)
    model = omni_jax.load(folder, components=("thinker",), dtype="float32")
    with tempfile.TemporaryDirectory() as temporary:
        exported = Path(temporary) / "exported"
        to_hf(folder, exported)
        reference = load_reference(exported, is_thinker_alone=tuple(components(folder)) == ("thinker",))
    for task, reply in track(chosen, description="answering", console=Console(stderr=True)):
        ours = model.generate(reply.prompt, max_tokens=options.max_tokens, modalities=("text",))
        prompt = model.processor(reply.prompt)
        with torch.no_grad():
            generated = reference.generate(
                **reference_arguments(prompt),
                max_new_tokens=options.max_tokens,
                do_sample=False,
                eos_token_id=list(model.processor.stop_ids),
                pad_token_id=model.config.thinker_config.pad_token_id,
            )
        tokens = generated[0, len(prompt) :].tolist()
        text = model.processor.tokenizer.decode(tokens)
        yield Compared(task, reply.row, list(ours.token_ids), tokens, ours.text, text)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    try:
        # differences in the last bits decide between tokens that are as likely as each other
        with jax.default_matmul_precision("highest"):
            found = list(compare(options))
    except (CheckpointError, ConfigError, InputError) as e:
        raise SystemExit(f"error: {printable(str(e))}") from None
    for answer in found:
        if not answer.is_same:
            print(f"{answer.row} ({answer.task}): {answer.text!r}, and the reference {answer.reference_text!r}")
    same = sum(answer.is_same for answer in found)
    print(f"{same} of {len(found)} answers are the same tokens, of {len({answer.task for answer in found})} tasks")
    if same < len(found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
