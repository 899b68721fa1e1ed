"""Folders of AWQ and GPTQ in 4 bits: the weights that were packed come out, and what is wrong with them is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omni_jax.checkpoint import store
from omni_jax.checkpoint.convert import to_jax
from omni_jax.checkpoint.export import to_hf
from omni_jax.checkpoint.pytorch import read_headers
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from tools.make_checkpoint import write_checkpoint

GROUP = 8
PACKED = (".self_attn.q_proj", ".self_attn.o_proj", ".mlp.gate_proj", ".mlp.down_proj")
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
}


def pack(numbers: np.ndarray, order: tuple[int, ...], axis: int) -> np.ndarray:
    """Eight numbers along an axis into each int32, the first of ``order`` in its lowest bits."""
    numbers = np.moveaxis(numbers.astype(np.uint32), axis, -1)
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8)
    words = np.zeros(eights.shape[:-1], np.uint32)
    for place, number in enumerate(order):
        words |= eights[..., number] << np.uint32(4 * place)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def pack_weight(
    name: str, method: str, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The parts of a random packed weight, and the weight [out, in]."""
    num_outputs, num_inputs = shape
    num_groups = num_inputs // GROUP
    numbers = rng.integers(0, 16, (num_inputs, num_outputs))
    zeros = rng.integers(1, 16, (num_groups, num_outputs))
    # powers of two, so that no product is rounded
    scales = (2.0 ** rng.integers(-6, -2, (num_groups, num_outputs))).astype(np.float16)
    group = np.arange(num_inputs) // GROUP
    parts = {}
    if method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        parts["qweight"] = pack(numbers, order, axis=1)
        parts["qzeros"] = pack(zeros, order, axis=1)
    else:
        order = tuple(range(8))
        parts["qweight"] = pack(numbers, order, axis=0)
        parts["qzeros"] = pack(zeros - (method == "gptq"), order, axis=1)
        if method == "gptq":
            group = rng.permutation(group)
            parts["g_idx"] = group.astype(np.int32)
    parts["scales"] = scales
    weight = (numbers - zeros[group]) * scales[group].astype(np.float64)
    return {f"{name}.{part}": array for part, array in parts.items()}, weight.T


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "published"
    write_checkpoint(folder, OmniConfig.tiny(), dtype="float32")
    return folder


def make_packed(plain: Path, folder: Path, method: str) -> tuple[Path, Path]:
    """A packed folder, and one with the same weights as they are."""
    rng = np.random.default_rng(0)
    for name in ("packed", "widened"):
        (folder / name).mkdir()
        for file in plain.iterdir():
            if not file.name.startswith("model"):
                (folder / name / file.name).write_bytes(file.read_bytes())
    tensors: dict[str, np.ndarray] = {}
    for file in plain.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, tensor in tensors.items():
        if not name.startswith("token2wav"):
            tensors[name] = tensor.astype(np.float16)
    packed, widened = dict(tensors), dict(tensors)
    for name in tensors:
        module = name.removesuffix(".weight")
        if name.startswith("thinker.model.layers") and module.endswith(PACKED):
            del packed[name]
            parts, weight = pack_weight(module, method, tensors[name].shape, rng)
            packed |= parts
            # what is written is the memory of an array, whatever its strides
            widened[name] = np.ascontiguousarray(weight, np.float16)
    save_file(packed, folder / "packed" / "model.safetensors", {"format": "pt"})
    save_file(widened, folder / "widened" / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = CONFIGS[method]
    (folder / "packed" / "config.json").write_text(json.dumps(config))
    return folder / "packed", folder / "widened"


@pytest.mark.parametrize("method", CONFIGS)
def test_the_weights_come_out(plain: Path, tmp_path: Path, method: str) -> None:
    packed, widened = make_packed(plain, tmp_path, method)
    for folder in (packed, widened):
        to_jax(folder, tmp_path / f"{folder.name}_model")
    found, expected = (store.load(tmp_path / f"{name}_model") for name in ("packed", "widened"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    # on the way back they are plain weights, and the configuration says nothing else
    to_hf(tmp_path / "packed_model", tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def _break_bits(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    config["quantization_config"]["bits"] = 3


def _break_method(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    config["quantization_config"]["quant_method"] = "hqq"


def _drop_config(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    del config["quantization_config"]


def _drop_scales(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    del tensors["thinker.model.layers.0.mlp.gate_proj.scales"]


def _cut_zeros(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    name = "thinker.model.layers.0.mlp.gate_proj.qzeros"
    tensors[name] = tensors[name][:-1]


def _add_numbers(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    name = "thinker.model.norm.weight"
    tensors[name] = np.zeros(tensors[name].shape, np.int32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_bits, "is quantised by 'awq' in 3 bits; AWQ and GPTQ in 4 bits are read"),
        (_break_method, "is quantised by 'hqq'"),
        (_drop_config, "its config.json has no quantization_config"),
        (_drop_scales, "do not fit each other"),
        (_cut_zeros, "do not fit each other"),
        (_add_numbers, "whole numbers that are no part of one"),
    ],
)
def test_what_does_not_fit_is_named(plain: Path, tmp_path: Path, damage: Callable[..., None], message: str) -> None:
    packed, _ = make_packed(plain, tmp_path, "awq")
    config = json.loads((packed / "config.json").read_text())
    tensors = load_file(packed / "model.safetensors")
    damage(packed, config, tensors)
    (packed / "config.json").write_text(json.dumps(config))
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        to_jax(packed, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_no_other_reader_takes_whole_numbers(plain: Path, tmp_path: Path) -> None:
    """A reader that knows nothing of packing refuses them, whatever they are called."""
    packed, widened = make_packed(plain, tmp_path, "awq")
    with pytest.raises(CheckpointError, match=r"its config\.json has no quantization_config"):
        read_headers(packed)
    tensors = load_file(widened / "model.safetensors")
    tensors["thinker.model.norm.weight"] = np.zeros(tensors["thinker.model.norm.weight"].shape, np.int32)
    save_file(tensors, widened / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="whole numbers that are no part of one"):
        read_headers(widened)
