"""A small world whose speech is tones, for tests without a synthesizer."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools import make_world
from tools.make_speech import Utterance


class ToneSpeaker:
    """Speaks every text as a tone, in place of a synthesizer."""

    def __init__(self, voices: tuple[str, ...]) -> None:
        self.voices = voices

    def write(self, utterance: Utterance, path: Path) -> None:
        samples = 8000 * np.sin(np.arange(8000) / 10)
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(samples.astype("<i2").tobytes())


def make_test_rows(folder: Path, tasks: tuple[str, ...], items: int = 1) -> Path:
    """Held-out rows of some tasks with their media; returns their file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_world, "Speaker", ToneSpeaker)
        options: dict[str, Any] = dict(items=items, split="test", tasks=tasks, voices=("slt",))
        make_world.make_world(make_world.Options(folder, **options))
    return folder / "test.jsonl"
