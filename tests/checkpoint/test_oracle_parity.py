"""The published names, shapes and configuration that we write are those that PyTorch's implementation loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni_jax.config import OmniConfig
from tests import oracle
from tools.make_checkpoint import write_checkpoint


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_pytorch_loads_every_tensor(name: str, tmp_path: Path) -> None:
    config = oracle.CONFIGS[name]
    write_checkpoint(tmp_path, config, dtype="float32", shard_bytes=250_000)
    model = oracle.load(tmp_path)  # strict: neither missing nor unexpected names, no other shape
    assert all(bool(torch.isfinite(p).all()) and bool(p.std() > 0) for p in model.parameters() if p.numel() > 1)
    text = model.config.thinker_config.text_config
    assert text.num_key_value_heads == config.thinker_config.text_config.num_key_value_heads


def test_thinker_alone_gives_the_logits_of_the_whole(tiny_checkpoint: Path) -> None:
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        whole = oracle.load(tiny_checkpoint).thinker(input_ids=ids).logits
        alone = oracle.load_thinker(tiny_checkpoint, "sdpa")(input_ids=ids).logits
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-5)


def test_a_fresh_configuration_reads_what_pytorch_writes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    oracle.Qwen2_5OmniConfig.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    assert OmniConfig.load(tmp_path) == OmniConfig.tiny()
