"""Libraries that read what strangers write have least versions: those in which the holes that are known are mended."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "setup.cfg"
LEAST = {"jinja2": (3, 1, 6), "pillow": (12, 1, 1), "av": (17,), "tokenizers": (0, 22)}


def read_requirements() -> dict[str, tuple[int, ...]]:
    """The least version of each package that an installation brings; () where there is none."""
    config = configparser.ConfigParser()
    config.read(SETUP, encoding="utf-8")
    found = {}
    for line in config["options"]["install_requires"].splitlines():
        match = re.match(r"([A-Za-z0-9_-]+)(?:>=([0-9.]+))?$", line.strip())
        if match:
            found[match[1]] = tuple(map(int, match[2].split("."))) if match[2] else ()
    return found


@pytest.mark.parametrize("name", LEAST)
def test_least_versions(name: str) -> None:
    assert read_requirements()[name] >= LEAST[name]


def test_nothing_that_runs_code_of_files_is_installed() -> None:
    """PyTorch reads spk_dict.pt with pickle's machine, and is for tests alone, as safetensors is."""
    assert not {"torch", "transformers", "safetensors"} & set(read_requirements())
