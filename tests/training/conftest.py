"""Rows, recipes and batches for tests of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import RECIPES
from omni_jax.training.recipe import CheckpointConfig, Recipe
from tools.train_demo import MEDIA, write_rows


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows with all media."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


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
