"""A processor for the tiny model, and the small real media."""

from pathlib import Path

import pytest

from omni_jax.config import OmniConfig
from omni_jax.processing.processor import Processor
from omni_jax.processing.tokenizer_files import write_tokenizer

MEDIA = Path(__file__).parents[1] / "media"
CASES = Path(__file__).parents[1] / "cases"


@pytest.fixture(scope="session")
def config():
    return OmniConfig.tiny()


@pytest.fixture(scope="session")
def folder(config, tmp_path_factory):
    """A checkpoint folder without weights."""
    path = tmp_path_factory.mktemp("processor")
    write_tokenizer(path, config)
    config.save(path)
    return path


@pytest.fixture(scope="session")
def processor(folder):
    return Processor.load(folder)


@pytest.fixture(scope="session")
def ask(processor):
    """Processes one user message of the given parts."""

    def ask(*content, **options):
        return processor([{"role": "user", "content": list(content)}], **options)

    return ask
