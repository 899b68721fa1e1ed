"""What a loss may ask of the loop beside gradients: groups of parameters that alternate, statistics, averages."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from omni_jax.checkpoint import store
from omni_jax.checkpoint.train_checkpoints import step_folder
from omni_jax.data.config import DataConfig
from omni_jax.data.examples import Reject
from omni_jax.data.sources import Row
from omni_jax.errors import ConfigError
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from omni_jax.training.objective import Loss, Metrics, Objective
from omni_jax.training.recipe import ParameterGroup, Phase, Recipe

WIDTH = 3
STEPS = 6
RATE = 0.1
DECAY = 0.5  # a step later than the last the average would reach it: (1 + n) / (10 + n) < 0.5 for n < 8
TOLERANCE = 1e-6  # a few float32 operations on numbers of about 1


@struct.dataclass
class NumberBatch:
    numbers: Any = struct.field(metadata={"logical_axes": ("batch",)})  # float32 [B]


@dataclass(frozen=True)
class NumberExample:
    name: str
    number: float
    num_tokens: int = 1


class NumberPart:
    def __init__(self) -> None:
        self.examples: list[NumberExample] = []

    @property
    def full(self) -> bool:
        return bool(self.examples)

    @property
    def names(self) -> list[str]:
        return [example.name for example in self.examples]

    def place(self, example: NumberExample) -> bool:
        if self.full:
            return False
        self.examples.append(example)
        return True


def prepare_number(row: Row) -> list[NumberExample] | Reject:
    assert isinstance(row.contents, bytes)
    return [NumberExample(row.name, json.loads(row.contents)["number"])]


class NumberPacking:
    @property
    def prepare(self) -> Callable[[Row], list[NumberExample] | Reject]:
        return prepare_number

    def new_part(self) -> NumberPart:
        return NumberPart()

    def assemble(self, parts: Sequence[NumberPart], *, first: int, streams: int) -> NumberBatch:
        numbers = np.zeros(len(parts), np.float32)
        for i, part in enumerate(parts):
            if part.examples:
                numbers[i] = part.examples[0].number
        return NumberBatch(numbers)

    def measure_fill(self, batch: NumberBatch) -> dict[str, float]:
        return {}


@dataclass(frozen=True, eq=False)
class Rivals(Objective):
    """One vector moves towards another, which moves away from it; a third counts what they have seen."""

    components = ("discriminators",)
    dtype = jnp.float32

    def abstract_params(self) -> dict[str, Any]:
        leaf = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
        boxed = nn.LogicallyPartitioned(leaf, (None,))  # type: ignore[arg-type]
        return {"discriminators": {"critic": boxed, "maker": boxed, "total": boxed}}

    def init_params(self, component: str, key: jax.Array) -> Any:
        return {"critic": jnp.arange(1.0, 4.0), "maker": jnp.zeros(WIDTH), "total": jnp.zeros(WIDTH)}

    def make_packing(self, data: DataConfig, processor: Any, num_streams: int) -> NumberPacking:
        return NumberPacking()

    def abstract_row(self, data: DataConfig) -> NumberBatch:
        return NumberPacking().assemble([NumberPart()], first=0, streams=1)

    def denominators(self, batch: NumberBatch) -> Metrics:
        return {"rows": jnp.float32(batch.numbers.size)}

    def optimizer_groups(self, paths: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        critics = tuple(path for path in paths if path.endswith("critic"))
        makers = tuple(path for path in paths if path.endswith("maker"))
        return critics, makers

    def loss(
        self, params: Mapping[str, Any], batch: NumberBatch, denominators: Metrics, key: Any, trained: Collection[str]
    ) -> Loss:
        tree = params["discriminators"]
        gap = jnp.sum(jnp.square(tree["critic"] - tree["maker"])) * jnp.sum(batch.numbers) / denominators["rows"]
        if "discriminators/critic" in trained:
            # what the gap was before the maker is updated
            return Loss(-0.01 * gap, {"critic_loss": gap})
        return Loss(gap, {"loss": gap}, {"sum": jnp.sum(batch.numbers)})

    def apply_statistics(self, params: Any, statistics: Metrics, key: jax.Array) -> dict[str, jax.Array]:
        return {"discriminators/total": params["discriminators"]["total"] + statistics["sum"]}

    def count_work(self, batch: NumberBatch) -> Metrics:
        return {"tokens": jnp.int32(batch.numbers.size), "target_tokens": jnp.int32(batch.numbers.size)}

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        return 0.0

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        return {}


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Recipe:
    rows = tmp_path / "numbers.jsonl"
    rows.write_text('{"number": 1.0}\n{"number": 1.0}\n')
    return make_recipe(
        data={"train": (str(rows),), "valid": (str(rows),), "rows": 2, "streams": 2},
        phases=(Phase("both", (ParameterGroup("discriminators/(critic|maker)"),)),),
        optimizer={
            "learning_rate": RATE, "final_fraction": 1.0, "warmup": 0, "weight_decay": 0.0, "clip": 0.5, "ema": DECAY,
            "accumulate": 2,
        },
        eval={"every": STEPS},
        checkpoint={"every": 3},
        steps=STEPS,
    )  # fmt: skip


def replay(recipe: Recipe) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[float], list[float]]:
    """The run by hand: what trains, its average, and the losses of both."""
    config = recipe.optimizer
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip), optax.scale_by_adam(config.b1, config.b2, config.eps)
    )
    params = {"critic": jnp.arange(1.0, 4.0), "maker": jnp.zeros(WIDTH)}
    average = dict(params)
    states = {name: optimizer.init(params[name]) for name in params}
    losses: dict[str, list[float]] = {"critic": [], "maker": []}
    for count in range(STEPS):
        for name, factor in (("critic", -0.01), ("maker", 1.0)):
            gap = params["critic"] - params["maker"]
            losses[name].append(float(jnp.sum(gap**2)))
            gradient = 2 * factor * (gap if name == "critic" else -gap)
            update, states[name] = optimizer.update(gradient, states[name])
            params[name] = params[name] - RATE * update
        decay = min(DECAY, (1 + count) / (10 + count))
        for name, value in params.items():
            average[name] = decay * average[name] + (1 - decay) * value
    return params, average, losses["critic"], losses["maker"]


def test_groups_alternate_and_averages_are_kept(recipe: Recipe, tmp_path: Path) -> None:
    assert train(recipe, tmp_path / "run", Rivals())
    _, average, critic_losses, maker_losses = replay(recipe)
    lines = read_metrics(tmp_path / "run" / METRICS_FILE)
    # the maker's loss is of the critic that has just been updated, so that the two differ
    assert [line["critic_loss"] for line in lines] == pytest.approx(critic_losses, rel=1e-5)
    assert [line["loss"] for line in lines] == pytest.approx(maker_losses, rel=1e-5)
    assert critic_losses[0] != pytest.approx(maker_losses[0], rel=1e-3)
    # a checkpoint has the average, which is what held-out rows are evaluated with
    found = store.load(step_folder(tmp_path / "run", STEPS), ["discriminators"])["discriminators"]
    for name, value in average.items():
        np.testing.assert_allclose(found[name], value, atol=TOLERANCE)
    (evaluated,) = read_metrics(tmp_path / "run" / EVALUATIONS_FILE)
    gap = np.sum(np.square(np.asarray(average["critic"]) - np.asarray(average["maker"])))
    assert evaluated["loss"] == pytest.approx(float(gap), rel=1e-5)
    # two accumulated batches of two rows in each step
    np.testing.assert_array_equal(found["total"], np.full(WIDTH, STEPS * 4.0))


def test_a_run_goes_on_from_its_own_parameters(recipe: Recipe, tmp_path: Path) -> None:
    """The averages of a checkpoint are not what the next step begins from."""
    assert train(recipe, tmp_path / "run", Rivals())
    expected = read_metrics(tmp_path / "run" / METRICS_FILE)
    saved = store.load(step_folder(tmp_path / "run", STEPS), ["discriminators"])["discriminators"]
    shutil.rmtree(step_folder(tmp_path / "run", STEPS))
    assert train(recipe, tmp_path / "run", Rivals())
    found = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    again = store.load(step_folder(tmp_path / "run", STEPS), ["discriminators"])["discriminators"]
    for name, value in saved.items():
        np.testing.assert_array_equal(again[name], value)


def test_what_freezes_stays_the_average(make_recipe: Callable[..., Recipe], recipe: Recipe, tmp_path: Path) -> None:
    phases = (
        Phase("both", (ParameterGroup("discriminators/(critic|maker)"),), steps=3),
        Phase("maker", (ParameterGroup("discriminators/maker"),)),
    )
    two = make_recipe(
        data={"train": recipe.data.train, "rows": 2, "streams": 2},
        phases=phases,
        optimizer={"learning_rate": RATE, "warmup": 0, "ema": DECAY},
        checkpoint={"every": 3},
        steps=STEPS,
    )
    assert train(two, tmp_path / "run", Rivals())
    early, late = (
        store.load(step_folder(tmp_path / "run", step), ["discriminators"])["discriminators"] for step in (3, STEPS)
    )
    np.testing.assert_array_equal(early["critic"], late["critic"])
    assert not np.array_equal(early["maker"], late["maker"])


def test_a_step_that_is_not_finite_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    rows = tmp_path / "bad.jsonl"
    rows.write_text('{"number": Infinity}\n')
    data = dataclasses.replace(recipe.data, train=(str(rows),), valid=())
    bad = dataclasses.replace(recipe, data=data, on_nonfinite="skip", steps=3)
    assert train(bad, tmp_path / "run", Rivals())
    found = store.load(step_folder(tmp_path / "run", 3), ["discriminators"])["discriminators"]
    for name, value in Rivals().init_params("discriminators", jax.random.key(0)).items():
        np.testing.assert_array_equal(found[name], value)


def test_averages_must_be_there_from_the_start(recipe: Recipe, tmp_path: Path) -> None:
    assert train(recipe, tmp_path / "run", Rivals())
    without = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, ema=0.0))
    with pytest.raises(ConfigError, match=r"optimizer\.ema"):
        train(without, tmp_path / "run", Rivals())
