"""The comparison with PyTorch that a conversion may end with, and that it notices a wrong model."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_jax.config import OmniConfig
from tools.make_checkpoint import write_checkpoint
from tools.verify import verify


def test_a_conversion_agrees(tiny_checkpoint: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(tiny_checkpoint, tiny_model)
    printed = capsys.readouterr().out
    assert all(f"{name}: logits differ by" in printed for name in ("text", "sound", "picture"))
    assert f"{tiny_model} agrees with PyTorch" in printed


def test_another_model_does_not(tmp_path: Path, tiny_model: Path) -> None:
    write_checkpoint(tmp_path, OmniConfig.tiny(), seed=7, dtype="float32")
    with pytest.raises(SystemExit, match="differs from PyTorch by"):
        verify(tmp_path, tiny_model)
