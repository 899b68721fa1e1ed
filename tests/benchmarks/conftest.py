"""One tiny model and one side of each kind for all tests of the benchmarks; they work in the process of the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.models import write_model
from benchmarks.side import Side, SideProcess
from omni_jax.config import BigVGANConfig, DiTConfig, OmniConfig, TalkerConfig, Token2WavConfig

# the published codes: of fewer, the ends could come among the 40 likeliest
TALKER = TalkerConfig.tiny(
    vocab_size=8448,
    tts_codec_mask_token_id=8296,
    tts_codec_pad_token_id=8292,
    tts_codec_start_token_id=8293,
    tts_codec_end_token_id=8294,
)
TOKEN2WAV = Token2WavConfig(dit_config=DiTConfig.tiny(num_embeds=8193), bigvgan_config=BigVGANConfig.tiny())
CONFIG = OmniConfig.tiny(talker_config=TALKER, token2wav_config=TOKEN2WAV)

_sides: dict[tuple[type[Side], Path], Side] = {}


class InProcess(SideProcess[Any]):
    """Works here, with one side of a kind: a process for each test would take longer than the work."""

    def __init__(self, side: type[Side], folder: Path, *, one_core: bool = False):
        self._side = _sides.setdefault((side, folder), side(folder))
        self.memory = 10**9

    def __exit__(self, *_: object) -> None:
        """The side stays for the next test."""

    def run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return getattr(self._side, method.__name__)(*args, **kwargs)


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmarks")
    write_model(path, CONFIG)
    return path
