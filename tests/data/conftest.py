"""A processor for the tiny model, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omni_jax.config import OmniConfig
from omni_jax.processing.processor import Processor
from omni_jax.processing.tokenizer_files import write_tokenizer

MEDIA = Path(__file__).parents[1] / "media"
PICTURE, WAV, VIDEO = str(MEDIA / "picture.jpg"), str(MEDIA / "speech.wav"), str(MEDIA / "video.mp4")


@pytest.fixture(scope="session")
def config() -> OmniConfig:
    return OmniConfig.tiny()


@pytest.fixture(scope="session")
def processor(config: OmniConfig, tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tmp_path_factory.mktemp("processor")
    write_tokenizer(folder, config)
    config.save(folder)
    return Processor.load(folder)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON lines; a string stands as it is."""

    def write(*rows: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return write
