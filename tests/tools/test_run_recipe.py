"""Recipes that tools run: how long, and over which devices."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from configs import RECIPES
from tools import run_recipe as tool


@pytest.mark.parametrize(
    ("backend", "cores", "rows", "streams", "expected"),
    [("cpu", 2, 2, 2, 2), ("cpu", 8, 4, 2, 2), ("cpu", 3, 4, 4, 2), ("cpu", 8, 1, 1, 1), ("tpu", 8, 8, 8, 1)],
)
def test_cores_are_devices_that_divide_the_rows(
    monkeypatch: pytest.MonkeyPatch, backend: str, cores: int, rows: int, streams: int, expected: int
) -> None:
    monkeypatch.setattr(tool, "find_devices", lambda: (backend, 1, "kind"))
    monkeypatch.setattr(tool, "count_cores", lambda: cores)
    data = dataclasses.replace(RECIPES["thinker-sft-tiny"].data, rows=rows, streams=streams)
    assert tool.choose_devices(data) == expected


def test_a_recipe_runs_for_a_part_of_its_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[tuple[Any, ...], dict[str, str]]] = []
    monkeypatch.setattr(tool, "run", lambda *arguments, environment: ran.append((arguments, dict(environment))))
    monkeypatch.setattr(tool, "find_devices", lambda: ("cpu", 1, "cpu"))
    monkeypatch.setattr(tool, "count_cores", lambda: 2)
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user")
    name = "pretrain1-omni-tiny"
    tool.run_recipe(name, tmp_path, "random", [tmp_path / "a"], [tmp_path / "b"], steps_scale=0.1, evaluations=7)
    ((arguments, environment),) = ran
    text = " ".join(map(str, arguments))
    steps = RECIPES[name].steps // 10
    assert text.startswith(f"train.py {name} --workdir {tmp_path} --init random --steps {steps} ")
    assert f"--phases.0.steps {RECIPES[name].phases[0].steps // 10} " in text
    assert f"--optimizer.warmup {RECIPES[name].optimizer.warmup // 10} " in text
    # the end is one of the evaluations
    assert f"--eval.every {math.ceil(steps / 7)}" in text and "--mesh.data 2" in text
    assert environment["XLA_FLAGS"].startswith("--xla_of_the_user --xla_force_host_platform_device_count=2 ")
