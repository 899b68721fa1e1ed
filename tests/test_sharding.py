"""The mesh, its rules, and a forward pass over eight fake devices, which must run in a process of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from omni_jax.config import OmniConfig
from omni_jax.errors import ConfigError
from omni_jax.models.thinker import Thinker, abstract_params
from omni_jax.sharding import MESH_AXES, RULES, MeshConfig, make_mesh, param_shardings
from tests.processes import finish, start

# every axis above one, and each with others; a sequence axis alone too, for it splits what the others keep whole
MESHES = [{"sequence": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "sequence": 2, "tensor": 2}]
# the small Talker has one head of keys, which no tensor axis divides
REPLY_CASES = [
    {"parts": "thinker", "mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
    {"parts": "all", "mesh": {"data": 2, "fsdp": 4}},
]
SPEECH_MESHES = [{"data": 2, "tensor": 2}]
# float32 sums that several devices share out are added in another order
TOLERANCE = 1e-5


def run(*arguments: str, devices: int = 8) -> list[dict[str, Any]]:
    """What tests/eight_devices.py prints."""
    printed = finish(start("-m", "tests.eight_devices", *arguments, devices=devices))
    return [json.loads(line) for line in printed.splitlines()]


@pytest.mark.long
def test_replies_over_eight_devices_equal_one(tiny_model: Path) -> None:
    results = run("reply", str(tiny_model), json.dumps(REPLY_CASES))
    for case, alone, together in zip(REPLY_CASES, results[::2], results[1::2], strict=True):
        assert (alone["devices"], together["devices"]) == (1, 8)
        assert alone["ids"] == together["ids"]
        assert all(len(tokens) == 12 for tokens, _ in alone["ids"])
        assert bool(alone["ids"][-1][1]) == (case["parts"] == "all")


@pytest.mark.long
def test_forward_over_eight_devices_equals_one() -> None:
    results = run("forward", json.dumps(MESHES))
    assert [r["mesh"] for r in results] == MESHES
    for result in results:
        assert result["devices"] == 8
        assert result["error"] < TOLERANCE, result
        shards_params = {"fsdp", "tensor"} & set(result["mesh"])
        assert (result["sharded"] > 0) == bool(shards_params), result


@pytest.mark.long
def test_sound_over_four_devices_equals_that_of_one(tiny_model: Path) -> None:
    """Of lists and streams, whose rows no device needs from another."""
    results = run("speak", str(tiny_model), json.dumps(SPEECH_MESHES), devices=4)
    assert [r["mesh"] for r in results] == SPEECH_MESHES
    for result in results:
        assert max(result["errors"]) < TOLERANCE, result
        assert result["compilations"] == 0, result
        # between rows the program moves its result and nothing else, over tensor what its layers must
        assert result["between_rows"] == 1 < result["between_heads"], result


def test_every_parameter_names_its_axes() -> None:
    boxes = jax.tree.leaves(
        abstract_params(Thinker(OmniConfig.tiny().thinker_config)),
        is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
    )
    assert boxes
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
        assert all(name in RULES for name in box.names), box.names


def test_a_mesh_of_another_size_than_the_devices() -> None:
    with pytest.raises(ConfigError, match=r"fsdp=3.* needs 3 devices, there are"):
        make_mesh(fsdp=3)


def test_a_mesh_that_does_not_divide_names_every_parameter_and_axis() -> None:
    mesh = AbstractMesh((1, 1, 1, 4), MESH_AXES, axis_types=(AxisType.Auto,) * 4)

    def box(names: tuple[str, ...], *shape: int) -> nn.LogicallyPartitioned:
        return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)

    tree = {"a": {"kernel": box(("embed", "heads"), 8, 6)}, "b": box(("vocab",), 10)}
    with pytest.raises(ConfigError) as e:
        param_shardings(tree, mesh)
    assert "['a']['kernel']: heads of 6 over ('tensor',) = 4" in str(e.value)
    assert "['b']: vocab of 10 over ('tensor',) = 4" in str(e.value)


def test_a_mesh_has_a_device_along_every_axis() -> None:
    with pytest.raises(ConfigError, match=r"mesh.tensor is 0; it must be at least 1"):
        MeshConfig(tensor=0)
    assert MeshConfig(data=2, tensor=4).num_devices == 8


@dataclass(frozen=True)
class _Device:
    """What a mesh asks of a device."""

    id: int
    slice_index: int
    platform: str = "cpu"
    process_index: int = 0
    device_kind: str = "none"


def test_data_goes_over_slices() -> None:
    devices = [_Device(number, number % 2) for number in range(8)]
    mesh = make_mesh(data=4, fsdp=2, devices=devices)
    slices = [[device.slice_index for device in row.flat] for row in mesh.devices]
    # parameters are spread within a slice alone
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(ConfigError, match=r"mesh.data is 1; over 2 slices of TPUs it must be a multiple of 2"):
        make_mesh(fsdp=8, devices=devices)
