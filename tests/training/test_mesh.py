"""The same losses on one device, on four, on two processes of two, and after a change of the mesh on the way."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import omni_jax
from configs import RECIPES
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.config import OmniConfig
from omni_jax.data.examples import Prepare
from omni_jax.data.packing import Budget, OmniPacking, is_repeated
from omni_jax.errors import ConfigError
from omni_jax.models.thinker import Thinker
from omni_jax.sharding import MeshConfig
from omni_jax.training.device_batches import BatchShard, batch_shard, to_devices
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, SAMPLES_FILE, read_metrics
from omni_jax.training.objectives.next_token import NextToken
from omni_jax.training.recipe import Recipe
from omni_jax.training.step import abstract_batch
from tests.processes import finish, start

MODEL = OmniConfig.tiny()
STEPS = 4
MESH = ["--mesh.fsdp", "2", "--mesh.tensor", "2"]
TOLERANCE = 1e-5  # of a loss: float32 sums that several devices share out are added in another order
CHANGES = dict(rows=4, streams=4, tokens=256, audio_blocks=2, canvases=1)
# Adam divides by the size of a gradient, so where that is nothing but rounding its steps are rounding made large
OPTIMIZER = dict(learning_rate=1e-3, eps=1e-5)


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(
        "pretrain2",
        steps=STEPS,
        data={**_rows(make_recipe), **CHANGES},
        optimizer=OPTIMIZER,
        checkpoint={"every": STEPS // 2},
    )


def _rows(make_recipe: Callable[..., Recipe]) -> dict:
    data = make_recipe().data
    return {"train": data.train, "media_root": data.media_root}


@pytest.fixture(scope="module")
def options(recipe: Recipe) -> list[str]:
    about = {"init": recipe.init, "data.train": recipe.data.train[0], "steps": STEPS, "checkpoint.every": STEPS // 2}
    about["data.media-root"] = recipe.data.media_root
    about |= {f"data.{name.replace('_', '-')}": value for name, value in CHANGES.items()}
    about |= {f"optimizer.{name.replace('_', '-')}": value for name, value in OPTIMIZER.items()}
    return ["pretrain2-tiny", *(part for name, value in about.items() for part in (f"--{name}", str(value)))]


def losses(workdir: Path) -> np.ndarray:
    metrics = read_metrics(workdir / METRICS_FILE)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    return np.array([m["loss"] for m in metrics])


@pytest.fixture(scope="module")
def one_device(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert train(recipe, workdir)
    return workdir


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for held-out rows that are text alone, so that the media of their batches are made on the devices."""
    rows = tmp_path_factory.mktemp("valid") / "text.jsonl"
    rows.write_text(json.dumps({"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "It"}]}))
    return ["--data.valid", str(rows), "--eval.every", str(STEPS)]


@pytest.fixture(scope="module")
def four_devices(options: list[str], held_out: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("four") / "run"
    finish(start("train.py", *options, *held_out, *MESH, "--workdir", str(workdir), devices=4))
    return workdir


def test_four_devices(one_device: Path, four_devices: Path) -> None:
    expected = losses(one_device)
    assert np.abs(losses(four_devices) - expected).max() < TOLERANCE * np.abs(expected).max()
    assert expected[-1] < expected[0]  # and the loss falls
    (held_out,) = read_metrics(four_devices / EVALUATIONS_FILE)
    assert held_out["step"] == STEPS and np.isfinite(held_out["loss"])


@pytest.mark.long
def test_two_processes(options: list[str], held_out: list[str], four_devices: Path, tmp_path: Path) -> None:
    """Of two devices each: each reads its own rows, and both write the checkpoints and answer a held-out row."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    each = [*MESH, "--workdir", str(tmp_path / "run")]
    together = ["--distributed", "--coordinator", f"localhost:{port}", "--processes", "2"]
    together += ["--eval.samples", "1", "--eval.max-tokens", "4"]
    runs = [start("train.py", *options, *held_out, *each, *together, "--process", str(i), devices=2) for i in range(2)]
    for process in runs:
        finish(process)
    expected = losses(four_devices)
    assert np.abs(losses(tmp_path / "run") - expected).max() < TOLERANCE * np.abs(expected).max()
    (sample,) = read_metrics(tmp_path / "run" / SAMPLES_FILE)
    # answered as by the same parameters in one process, on one device
    model = omni_jax.load(tmp_path / "run", dtype="float32", components=("thinker",))
    answer = model.generate([{"role": "user", "content": "?"}], max_tokens=4, temperature=0.0).text
    assert (sample["expected"], sample["answer"]) == ("It", answer)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [f"{STEPS // 2:08d}", f"{STEPS:08d}"]


@pytest.mark.long
def test_an_error_in_one_process_ends_both(recipe: Recipe, tmp_path: Path) -> None:
    """With its message and the same exit status; the checkpoint that was written before is whole."""
    rows = tmp_path / "rows.jsonl"
    # one row is too long; it comes to one of the processes, after some steps
    texts = ["once " * 40] * 100 + ["once " * 900]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    options = ["pretrain2-tiny", "--init", str(recipe.init), "--workdir", str(tmp_path / "run"), "--steps", "1000"]
    options += ["--data.train", str(rows), "--data.too-long", "error", "--data.rows", "2", "--data.streams", "2"]
    options += ["--mesh.fsdp", "2", "--checkpoint.every", "4", "--data.audio-blocks", "0", "--data.canvases", "0"]
    together = ["--distributed", "--coordinator", f"localhost:{port}", "--processes", "2"]
    runs = [start("train.py", *options, *together, "--process", str(i), devices=1) for i in range(2)]
    outputs = [process.communicate(timeout=300) for process in runs]
    assert [process.returncode for process in runs] == [1, 1], outputs
    messages = sorted(error.splitlines()[-1] for _, error in outputs)
    assert messages[0].startswith("error in process") and messages[1].startswith("error: "), messages
    assert all("data.too_long is error" in message for message in messages)
    # a whole one, and nothing half written that counts
    assert resolve_checkpoint(tmp_path / "run").name.isdigit()


def test_a_run_goes_on_over_another_mesh(recipe: Recipe, four_devices: Path, tmp_path: Path) -> None:
    """From the middle of a run on four devices to the end on one."""
    workdir = tmp_path / "run"
    shutil.copytree(four_devices, workdir)
    shutil.rmtree(workdir / "checkpoints" / f"{STEPS:08d}")
    assert train(recipe, workdir)
    expected = losses(four_devices)
    assert np.abs(losses(workdir) - expected).max() < TOLERANCE * np.abs(expected).max()


def test_one_process_reads_the_whole_batch() -> None:
    assert batch_shard(MeshConfig().make(), 6) == BatchShard(0, 1)
    with pytest.raises(ConfigError, match="needs 2 devices, there are 1"):
        MeshConfig(fsdp=2).make()


def test_a_batch_without_media_ships_its_text_alone(recipe: Recipe) -> None:
    """Of the published recipe, a host's part of the batch; its empty canvases are made on the devices."""
    data = RECIPES["pretrain2-7b"].data
    packing = OmniPacking(Prepare.__new__(Prepare), Budget.of(dataclasses.replace(data, rows=4, streams=4)), MODEL)
    batch = packing.assemble([packing.new_part()] * 4, first=0, streams=4)
    arrays = jax.tree.leaves(batch)
    assert sum(array.nbytes for array in arrays) > 500e6
    assert sum(array.nbytes for array in arrays if not is_repeated(array)) < 20e6
    # what the devices get is the same, whichever way it comes
    small = dataclasses.replace(data, rows=1, streams=1, tokens=64, canvases=1, windows=2, audio_blocks=1)
    objective = NextToken(Thinker(MODEL.thinker_config), MODEL)
    abstract = abstract_batch(small, objective, recipe.mesh.make())
    empty = objective.abstract_row(small)
    found = to_devices([empty], abstract)
    written = to_devices([jax.tree.map(np.array, empty)], abstract)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(written), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == other.sharding and one.dtype == other.dtype
