"""PyTorch loads what we write: checkpoints that went through ours and back, and files of voices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen2_5OmniForConditionalGeneration

from omni_jax.checkpoint import voices
from tests import oracle
from tests.checkpoint.test_export import assert_same_tensors, round_trip
from tools.make_checkpoint import write_checkpoint


def loading_info(folder: Path) -> dict[str, Any]:
    """What PyTorch says of its loading; the model's own method would take the answer for a model and give it voices."""
    _, info = PreTrainedModel.from_pretrained.__func__(
        Qwen2_5OmniForConditionalGeneration, folder, dtype="auto", output_loading_info=True
    )
    return info


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_pytorch_loads_what_comes_back(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "torch", oracle.CONFIGS[name], seed=4)
    back = round_trip(tmp_path / "torch", tmp_path, shard_bytes=250_000)
    assert_same_tensors(tmp_path / "torch", back)
    info = loading_info(back)
    assert {key: list(value) for key, value in info.items()} == {
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [],
        "error_msgs": [],
    }
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(back, dtype=torch.float32)
    expected = oracle.load(tmp_path / "torch").state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert list(model.speaker_map) == ["Chelsie", "Ethan"]


def test_pytorch_misses_what_is_not_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """So that the test above would see it."""
    from safetensors.torch import load_file, save_file

    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["talker.extra"] = tensors.pop("talker.model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    info = loading_info(tmp_path)
    assert list(info["missing_keys"]) == ["talker.model.norm.weight"]
    assert list(info["unexpected_keys"]) == ["talker.extra"]


def test_torch_reads_our_voices(tiny_checkpoint: Path) -> None:
    ours = voices.read_spk_dict(tiny_checkpoint / "spk_dict.pt")
    theirs = torch.load(tiny_checkpoint / "spk_dict.pt", weights_only=True)
    assert list(theirs) == list(ours)
    for name, voice in ours.items():
        assert theirs[name]["bos_token"] == voice.bos_token
        assert theirs[name]["cond"].is_contiguous() and theirs[name]["ref_mel"].dtype == torch.float32
        np.testing.assert_array_equal(theirs[name]["cond"].numpy(), voice.cond)
        np.testing.assert_array_equal(theirs[name]["ref_mel"].numpy(), voice.ref_mel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_we_read_torchs_voices(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mel = torch.randn(80, 7).to(dtype)
    shared = torch.randn(3, 12).to(dtype)
    made = {
        "plain": {"bos_token": 3, "cond": shared[:1].clone(), "ref_mel": mel.T[None].contiguous()},
        "views": {"bos_token": torch.tensor(4), "cond": shared[1:2], "ref_mel": mel.T[None]},
        "ones": {"bos_token": torch.tensor([5], dtype=torch.int32), "cond": shared[2:], "ref_mel": mel.T[None, 2:]},
    }
    torch.save(made, tmp_path / "spk_dict.pt")
    found = voices.read_spk_dict(tmp_path / "spk_dict.pt")
    assert [(v.name, v.bos_token) for v in found.values()] == [("plain", 3), ("views", 4), ("ones", 5)]
    for name, voice in found.items():
        np.testing.assert_array_equal(voice.cond, made[name]["cond"].float().numpy())
        np.testing.assert_array_equal(voice.ref_mel, made[name]["ref_mel"].float().numpy())
