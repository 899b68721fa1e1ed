"""Random Thinkers in both implementations, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.make_checkpoint import write_checkpoint


@pytest.fixture(
    scope="session", params=[("tiny", 0), ("seven", 1), ("one", 2), ("tiny", 3)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    from tests.models.pairs import load_pair
    from tests.oracle import CONFIGS

    name, seed = request.param
    folder: Path = tmp_path_factory.mktemp("pair")
    write_checkpoint(folder, CONFIGS[name], seed=seed, dtype="float32")
    return load_pair(folder)
