"""The plan of a recipe: it counts what the model has, and divides it as the mesh says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from configs import RECIPES
from omni_jax.checkpoint.table import parameter_count
from omni_jax.errors import ConfigError
from omni_jax.training.plan import plan
from omni_jax.training.recipe import MeshSizes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_is_in_the_plan(name: str) -> None:
    recipe = RECIPES[name]
    rows = plan(recipe)
    assert sum(row.size for row in rows) == parameter_count(recipe.model, ("thinker",))
    assert len({row.path for row in rows}) == len(rows)


def test_the_mesh_divides_what_it_should() -> None:
    recipe = dataclasses.replace(RECIPES["thinker-sft-7b"], mesh=MeshSizes(data=2, fsdp=16, tensor=4))
    rows = {row.path: row for row in plan(recipe)}
    assert rows["decoder/layers/mlp/gate/kernel"].device_shape == (28, 3584 // 16, 18944 // 4)
    assert rows["decoder/head/kernel"].device_shape == (3584 // 16, 152064 // 4)
    assert rows["decoder/norm/scale"].device_shape == (3584,)
    whole, part = (sum(getattr(row, name) for row in rows.values()) for name in ("size", "device_size"))
    assert 1 / 64 <= part / whole < 1.01 / 64  # all but norms and biases are spread over fsdp x tensor


def test_a_mesh_that_does_not_divide() -> None:
    recipe = dataclasses.replace(RECIPES["thinker-sft-7b"], mesh=MeshSizes(tensor=8))
    with pytest.raises(ConfigError, match=r"heads of 28 over \('tensor',\) = 8"):
        plan(recipe)


def test_the_command() -> None:
    command = [sys.executable, "train.py", "thinker-sft-tiny", "--mesh.fsdp", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "decoder/layers/attention/query/kernel" in run.stdout
    assert "218,016 parameters" in run.stdout
    command[-1] = "5"
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.startswith("error: the mesh does not divide")) == (1, True)
