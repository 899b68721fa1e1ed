"""One model and one pool of media processes for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import omni_jax
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.processing.processor import Processor
from omni_jax.processing.worker_pool import MediaLimits

MEDIA_SECONDS = 8.0  # that a request's media may take


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> omni_jax.OmniModel:
    return omni_jax.load(tiny_model)


@pytest.fixture(scope="session")
def media_workers(tiny_model: Path) -> Iterator[MediaWorkers]:
    with MediaWorkers(Processor.load(tiny_model), 2, MediaLimits(MEDIA_SECONDS, 2.0)) as pool:
        yield pool
