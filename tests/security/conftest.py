"""A processor without weights, which is all that strangers' media and requests reach before a model does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from omni_jax.config import OmniConfig
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.processing.processor import Processor
from omni_jax.processing.tokenizer_files import write_tokenizer
from omni_jax.processing.worker_pool import MediaLimits

MEDIA = Path(__file__).parents[1] / "media"


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tmp_path_factory.mktemp("processor")
    config = OmniConfig.tiny()
    write_tokenizer(folder, config)
    config.save(folder)
    return Processor.load(folder)


@pytest.fixture(scope="session")
def workers() -> Iterator[MediaWorkers]:
    """One that looks into media that are to be embedded; it starts when it is first asked."""
    with MediaWorkers(None, 1, MediaLimits(seconds=8.0, gigabytes=2.0)) as pool:
        yield pool


@pytest.fixture
def published(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of a published folder that may be changed."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "published"))


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of one of ours that may be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "stranger" / "model"))
