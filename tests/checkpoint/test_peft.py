"""Folders of adapters that cannot be used: each is refused with what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omni_jax.checkpoint import store
from omni_jax.checkpoint.lora import LORA_FILE, LoRAConfig
from omni_jax.checkpoint.peft import CONFIG_FILE, TENSORS_FILE, read_adapter, write_adapter
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from omni_jax.mini_config import mini_config
from tests.adapters import add_adapter

CONFIG = OmniConfig.tiny()
TARGETS = "thinker/decoder/layers/attention/(query|out)"
NAME = "base_model.model.thinker.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def ours(tiny_model: Path, tmp_path: Path) -> Path:
    add_adapter(tiny_model, tmp_path / "ours", TARGETS, rank=2, alpha=3.0)
    return tmp_path / "ours"


@pytest.fixture
def folder(ours: Path, tmp_path: Path) -> Path:
    write_adapter(ours, tmp_path / "peft")
    return tmp_path / "peft"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA alone is read"),
        ({"use_dora": True}, "use_dora is True, which is not supported; it must be False"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is .*, which is not supported"),
        ({"bias": "all"}, "bias is 'all', which is not supported; it must be 'none'"),
        ({"r": 0}, "r is 0; it must be from 1 to 1024"),
        ({"r": 10**9}, "r is 1000000000; it must be from 1 to 1024"),
        ({"r": "2"}, "r is '2'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": 3}, r"lora_A is \[2, 48\]; for this model and rank 3 it must be \[3, 48\]"),
    ],
)
def test_configurations_that_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**values, **changes}))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, CONFIG)


def without(tensors: dict[str, np.ndarray]) -> None:
    del tensors[NAME]


def renamed(tensors: dict[str, np.ndarray]) -> None:
    tensors[NAME.replace("q_proj", "r_proj")] = tensors.pop(NAME)


def unknown(tensors: dict[str, np.ndarray]) -> None:
    tensors["base_model.model.thinker.lm_head.weight"] = tensors.pop(NAME)


def doubled(tensors: dict[str, np.ndarray]) -> None:
    tensors[NAME.replace("thinker.", "")] = tensors[NAME]


def whole_numbers(tensors: dict[str, np.ndarray]) -> None:
    tensors[NAME] = np.ones(tensors[NAME].shape, np.int32)


def none(tensors: dict[str, np.ndarray]) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "has one matrix of two of thinker.model.layers.1.self_attn.q_proj"),
        (renamed, "not all of it is of a linear map of the model\n  1 that is none:\n.*r_proj"),
        (unknown, "not all of it is of a linear map of the model\n  1 that is none:\n.*lm_head.weight"),
        (doubled, "has thinker.model.layers.1.self_attn.q_proj.lora_A twice"),
        (whole_numbers, "not all of it is of a linear map of the model\n  1 that is none:\n.*lora_A"),
        (none, "not all of it is of a linear map of the model"),
    ],
)
def test_tensors_that_are_refused(folder: Path, change: Callable[[dict[str, np.ndarray]], None], message: str) -> None:
    tensors = load_file(folder / TENSORS_FILE)
    change(tensors)
    save_file(tensors, folder / TENSORS_FILE)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, CONFIG)


def test_an_adapter_of_another_model(folder: Path, ours: Path) -> None:
    with pytest.raises(CheckpointError, match="for this model and rank 2 it must be"):
        read_adapter(folder, mini_config())
    with pytest.raises(CheckpointError, match="is an adapter of another model"):
        read_adapter(ours, mini_config())


def test_layers_without_an_adapter_have_zeros(folder: Path) -> None:
    tensors = load_file(folder / TENSORS_FILE)
    for letter in "AB":
        del tensors[NAME.replace("lora_A", f"lora_{letter}")]
    save_file(tensors, folder / TENSORS_FILE)
    query = read_adapter(folder, CONFIG).params["thinker"]["decoder"]["layers"]["attention"]["query"]
    assert query["a"][0].any() and query["b"][0].any()
    assert not query["a"][1].any() and not query["b"][1].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": True}, "rank is True"),
        ({"alpha": -1}, "alpha is -1"),
        ({"modules": []}, r"modules is \[\]; it must be a list of paths"),
        ({"modules": ["thinker/decoder/layers/attention/other"]}, "has no linear map .*/other"),
        ({"rank": 4}, "does not hold the lora that config.json describes"),
    ],
)
def test_checkpoints_that_are_refused(ours: Path, changes: dict[str, Any], message: str) -> None:
    values = json.loads((ours / LORA_FILE).read_text())
    (ours / LORA_FILE).write_text(json.dumps({**values, **changes}))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(ours, CONFIG)


def test_what_is_written_is_read(ours: Path) -> None:
    adapter = LoRAConfig.load(ours)
    assert adapter.to_json() == (ours / LORA_FILE).read_text()
    with pytest.raises(CheckpointError, match="exists already"):
        write_adapter(ours, ours)
    assert "lora" in store.components(ours)
