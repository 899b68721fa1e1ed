"""What tests of several areas share."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_jax.config import OmniConfig
from tools.make_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the published layout with random numbers, in float32; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_checkpoint(folder, OmniConfig.tiny(), dtype="float32")
    return folder
