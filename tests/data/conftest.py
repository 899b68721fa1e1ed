"""A processor for the tiny model, files of rows, and a bucket that lives in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from omni_jax.config import OmniConfig
from omni_jax.processing.processor import Processor
from tools.tokenizer_files import write_tokenizer

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
    return Processor.load(folder, allow_urls=True)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON lines; a string stands as it is."""

    def write(*rows: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


class _Bucket(MemoryFileSystem):
    protocol = "gs"
    store = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").strip("/")


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Bucket]:
    """Stands in for gcsfs."""
    monkeypatch.setitem(import_module("fsspec.registry")._registry, "gs", _Bucket)
    bucket = _Bucket()
    yield bucket
    bucket.store.clear()
