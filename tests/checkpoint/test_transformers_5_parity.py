"""transformers 4.57 reads what comes back of a folder of version 5, and of a Thinker that it saved alone itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from omni_jax.checkpoint import convert, export
from tests.checkpoint.test_export import CONSTANT
from tests.checkpoint.test_export_parity import loading_info
from tests.oracle import load
from tests.transformers_5 import rewrite_as_transformers_5

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "What is <|im_end|> here?"}]}]


def assert_same_processor(folder: Path, published: Path) -> None:
    """The processors make the same text and ids, and have the same limits of pictures and sound."""
    ours, expected = (Qwen2_5OmniProcessor.from_pretrained(path) for path in (folder, published))
    text = expected.apply_chat_template(MESSAGES, tokenize=False)
    assert ours.apply_chat_template(MESSAGES, tokenize=False) == text
    assert ours.tokenizer(text).input_ids == expected.tokenizer(text).input_ids
    for name in ("image_mean", "image_std", "merge_size", "patch_size", "size", "min_pixels", "max_pixels"):
        assert getattr(ours.image_processor, name) == getattr(expected.image_processor, name), name
    for name in ("feature_size", "hop_length", "n_fft", "sampling_rate"):
        assert getattr(ours.feature_extractor, name) == getattr(expected.feature_extractor, name), name


def test_a_folder_of_version_5_comes_back_for_version_4(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "version_5"))
    rewrite_as_transformers_5(source)
    convert.to_jax(source, tmp_path / "jax")
    export.to_hf(tmp_path / "jax", tmp_path / "back")
    info = loading_info(tmp_path / "back")
    assert not any(info.values()), info
    ours, expected = load(tmp_path / "back").state_dict(), load(tiny_checkpoint).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    # the frequencies that version 5 left out are those that PyTorch computes
    fresh = Qwen2_5OmniForConditionalGeneration._from_config(Qwen2_5OmniConfig.from_pretrained(tiny_checkpoint))
    torch.testing.assert_close(ours[CONSTANT], fresh.state_dict()[CONSTANT], rtol=2e-7, atol=0)
    assert_same_processor(tmp_path / "back", tiny_checkpoint)


@pytest.mark.parametrize("max_shard_size", ["5GB", "300KB"])
def test_a_thinker_alone_there_and_back(tiny_checkpoint: Path, tmp_path: Path, max_shard_size: str) -> None:
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype="auto")
    thinker.save_pretrained(tmp_path / "alone", max_shard_size=max_shard_size)
    Qwen2_5OmniProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "alone")
    convert.to_jax(tmp_path / "alone", tmp_path / "jax")
    export.to_hf(tmp_path / "jax", tmp_path / "back")
    before: dict = {}
    for file in (tmp_path / "alone").glob("*.safetensors"):
        before |= load_file(file)
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: x.tobytes() for name, x in after.items()} == {name: x.tobytes() for name, x in before.items()}
    again, info = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        tmp_path / "back", dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    for name, tensor in thinker.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert_same_processor(tmp_path / "back", tiny_checkpoint)
