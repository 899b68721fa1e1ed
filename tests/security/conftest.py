"""A processor without weights, which is all that strangers' media and requests reach before a model does."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_jax.config import OmniConfig
from omni_jax.processing.processor import Processor
from tools.tokenizer_files import write_tokenizer

MEDIA = Path(__file__).parents[1] / "media"


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tmp_path_factory.mktemp("processor")
    config = OmniConfig.tiny()
    write_tokenizer(folder, config)
    config.save(folder)
    return Processor.load(folder)
