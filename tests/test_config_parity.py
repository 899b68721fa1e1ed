"""The written config.json means the same model to transformers, and its own dump is read back."""

from __future__ import annotations

import pytest
from transformers import Qwen2_5OmniConfig

from omni_jax.config import OmniConfig
from tests.oracle import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name: str) -> None:
    config = CONFIGS[name]
    theirs = Qwen2_5OmniConfig(**config.to_dict())
    assert OmniConfig.from_dict(theirs.to_dict()) == config


def test_the_published_sizes() -> None:
    theirs = Qwen2_5OmniConfig(**OmniConfig.qwen2_5_omni_3b().to_dict())
    assert theirs.thinker_config.text_config.hidden_size == 2048
    assert theirs.thinker_config.vision_config.hidden_size == 1280
    assert theirs.talker_config.head_dim == 64
    assert theirs.token2wav_config.dit_config.num_hidden_layers == 22
