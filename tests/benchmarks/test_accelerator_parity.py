"""Random parameters that are made on the device: replies of the length that was asked for. No times are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator
from benchmarks.accelerator import AcceleratorPart, RandomSide, StepTimes, time_first_packets
from benchmarks.models import make_params, write_processor
from tests.benchmarks.conftest import CONFIG


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> RandomSide:
    folder: Path = tmp_path_factory.mktemp("accelerator")
    write_processor(folder, CONFIG)
    return RandomSide(folder, CONFIG, jnp.dtype("float32"))


def test_no_parameter_is_constant() -> None:
    shapes = {"norm": {"scale": jax.ShapeDtypeStruct((64,), jnp.bfloat16)}, "bias": jax.ShapeDtypeStruct((64,), "f4")}
    params = make_params(shapes)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), params, shapes)
    assert abs(float(params["norm"]["scale"].mean()) - 1) < 0.1 and abs(float(params["bias"].mean())) < 0.1
    assert all(np.unique(np.asarray(leaf, np.float32)).size > 8 for leaf in jax.tree.leaves(params))


@pytest.mark.long
def test_steps_and_first_packets(
    side: RandomSide, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerator, "PROMPT_TOKENS", 16)
    monkeypatch.setattr(accelerator, "SPOKEN_SECONDS", 1)
    results: dict[str, Any] = {"size": "tiny", "dtype": "float32", "device": "cpu"}
    results[AcceleratorPart.STEPS] = StepTimes((1, 2), 1).measure(side, CONFIG)
    # that replies have the lengths that were asked for, the side checks itself
    results[AcceleratorPart.FIRST_PACKETS] = time_first_packets(side, (1,), 1)
    assert len(results[AcceleratorPart.STEPS]) == 7 and min(results[AcceleratorPart.STEPS].values()) > 0
    (reply,) = results[AcceleratorPart.FIRST_PACKETS]["replies"]
    assert reply["compilations"] == 0 and 0 < reply["ttft"] < reply["audio_ttfp"]
    accelerator.print_results(results)
    printed = capsys.readouterr().out
    assert "Talker step, batch 2" in printed and "to the first packet" in printed
