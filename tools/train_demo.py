"""Runs the stages of the Qwen2.5-Omni report at tiny size: pretraining 1, 2 and 3, then instruction tuning.

    python tools/train_demo.py out/train

Each stage begins where the one before has ended. The model begins with random parameters, the rows are about the few
files in tests/media. It takes some minutes on a CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checkpoint.convert import to_jax
from omni_jax.config import OmniConfig
from tools.make_checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MEDIA = ROOT / "tests" / "media"
STAGES = ("pretrain1", "pretrain2", "pretrain3", "thinker-sft")


def make_rows() -> list[dict[str, Any]]:
    """Pairs of a medium and a text, and texts alone."""

    def make_row(tag: str, kind: str, file: str, question: str, answer: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": f"<{tag}>{question}"}, {"from": "gpt", "value": answer}]
        return {"conversations": turns, kind: [str(MEDIA / file)]}

    rows = [
        make_row("image", "images", "picture.jpg", "What is it?", "A red disc and a yellow square."),
        make_row("image", "images", "picture.png", "What is it?", "A disc and a square that fade."),
        make_row("audio", "audios", "speech.wav", "What is said?", "The quick brown fox."),
        make_row("audio", "audios", "speech2.mp3", "What is asked?", "What is in the picture."),
        make_row("video", "videos", "silent.mp4", "What happens?", "The disc moves to the right."),
        make_row("video", "videos", "video.mp4", "What is seen and said?", "A disc, and a fox."),
    ]
    # documents, all of whose text is a target
    for n in range(1, 15):
        rows.append({"text": f"{n} and {n} is {2 * n}. " * 4})
    return rows


def write_rows(path: Path) -> Path:
    """Writes the rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()), encoding="utf-8")
    return path


def train(recipe: str, workdir: Path, *options: str) -> None:
    """Trains, as the command line does."""
    subprocess.run([sys.executable, str(ROOT / "train.py"), recipe, "--workdir", str(workdir), *options], check=True)


def main(out: tyro.conf.Positional[Path], steps: int = 20, options: Sequence[str] = ()) -> None:
    """Runs all stages.

    Args:
      out: where to; run again, it goes on where it was stopped, and skips the stages that are complete.
      steps: of each stage.
      options: for every stage, as train.py takes them.
    """
    data = write_rows(out / "rows.jsonl")
    init = out / "model"
    # it is there already when the command is run again
    if not init.exists():
        write_checkpoint(out / "published", OmniConfig.tiny())
        to_jax(out / "published", init)
    # a process for each, as on the command line; the checkpoint of one is where the next begins
    for stage in STAGES:
        print(f"\n{stage}", flush=True)
        train(
            f"{stage}-tiny",
            out / stage,
            "--init",
            str(init),
            "--data.train",
            str(data),
            "--data.media-root",
            str(MEDIA),
            "--steps",
            str(steps),
            *options,
        )
        init = out / stage


if __name__ == "__main__":
    tyro.cli(main)
