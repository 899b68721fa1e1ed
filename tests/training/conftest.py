"""Rows, recipes and batches for tests of training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import RECIPES
from omni_jax.training.recipe import CheckpointConfig, Recipe
from tests.training import tones
from tools.train_demo import MEDIA, write_rows


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows with all media."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="session")
def tone_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows of sounds with their text."""
    return tones.write_rows(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="session")
def make_recipe(tiny_model: Path, rows: Path) -> Callable[..., Recipe]:
    """A tiny recipe that begins from ``tiny_model``; fields of its parts are given as dictionaries."""

    def make(name: str = "thinker-sft", **changes: Any) -> Recipe:
        recipe = dataclasses.replace(
            RECIPES[f"{name}-tiny"], init=tiny_model, steps=6, checkpoint=CheckpointConfig(every=2, keep=9)
        )
        changes["data"] = {"train": (str(rows),), "media_root": str(MEDIA), **changes.get("data", {})}
        for field, value in changes.items():
            if isinstance(value, dict):
                value = dataclasses.replace(getattr(recipe, field), **value)
            recipe = dataclasses.replace(recipe, **{field: value})
        return recipe

    return make


@pytest.fixture(scope="session")
def make_text_recipe(
    make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Recipe]:
    """The same for dialogues of text alone, whose step compiles in a third of the time."""
    file = tmp_path_factory.mktemp("text") / "rows.jsonl"
    lines = []
    for n in range(12):
        question = {"role": "user", "content": f"What is {n} and {n * n}?"}
        answer = {"role": "assistant", "content": f"It is {n + n * n}." * (1 + n % 3)}
        lines.append(json.dumps({"messages": [question, answer]}))
    file.write_text("\n".join(lines) + "\n")

    def make(name: str = "thinker-sft", **changes: Any) -> Recipe:
        data = {"train": (str(file),), "audio_blocks": 0, "canvases": 0, "rows": 1, **changes.pop("data", {})}
        return make_recipe(name, data=data, **changes)

    return make
