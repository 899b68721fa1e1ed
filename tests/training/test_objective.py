"""The seam: another objective with rows, batches and a loss of its own goes through the same loop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from omni_jax.batch import AudioBlocks
from omni_jax.checkpoint import store
from omni_jax.checkpoint.train_checkpoints import step_folder
from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.examples import Reject
from omni_jax.data.sources import Row
from omni_jax.models.thinker import Thinker, abstract_params
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from omni_jax.training.objective import Loss, Metrics, Objective
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.recipe import ParameterGroup, Phase, Recipe

MAX_LABELS = 6
CONFIG = OmniConfig.tiny()


@struct.dataclass
class CtcBatch:
    """A block of sound in each row, and what is said in it."""

    audio: AudioBlocks
    labels: Any = struct.field(metadata={"logical_axes": ("batch", None)})  # int32 [B, MAX_LABELS]; 0: none


@dataclass(frozen=True)
class CtcExample:
    name: str
    mel: np.ndarray
    labels: np.ndarray
    num_tokens: int = 1


class CtcPart:
    """One example a part."""

    def __init__(self) -> None:
        self.example: CtcExample | None = None

    @property
    def full(self) -> bool:
        return self.example is not None

    @property
    def names(self) -> list[str]:
        return [] if self.example is None else [self.example.name]

    def place(self, example: CtcExample) -> bool:
        if self.full:
            return False
        self.example = example
        return True


def prepare_row(row: Row) -> list[CtcExample] | Reject:
    """A sound that is drawn from the row's seed."""
    assert isinstance(row.contents, bytes)
    values = json.loads(row.contents)
    c = CONFIG.thinker_config.audio_config
    mel = np.random.default_rng(values["seed"]).standard_normal((c.block_frames, c.num_mel_bins), np.float32)
    labels = np.zeros(MAX_LABELS, np.int32)
    labels[: len(values["labels"])] = values["labels"]
    return [CtcExample(row.name, mel, labels)]


class CtcPacking:
    @property
    def prepare(self) -> Callable[[Row], list[CtcExample] | Reject]:
        return prepare_row

    def new_part(self) -> CtcPart:
        return CtcPart()

    def assemble(self, parts: Sequence[CtcPart], *, first: int, streams: int) -> CtcBatch:
        c = CONFIG.thinker_config.audio_config
        mel = np.zeros((len(parts), c.block_frames, c.num_mel_bins), np.float32)
        length = np.zeros(len(parts), np.int32)
        labels = np.zeros((len(parts), MAX_LABELS), np.int32)
        for i, part in enumerate(parts):
            if part.example is not None:
                mel[i], labels[i], length[i] = part.example.mel, part.example.labels, c.block_frames
        return CtcBatch(AudioBlocks(mel, length), labels)


@dataclass(frozen=True, eq=False)
class Ctc(Objective):
    """The audio encoder learns to name what it hears, through the frozen head of the language model."""

    model: Thinker

    components = ("thinker",)
    dtype = jnp.float32

    def abstract_params(self) -> dict[str, Any]:
        return {"thinker": abstract_params(self.model)}

    def init_params(self, component: str, key: jax.Array) -> Any:
        raise AssertionError(component)

    def make_packing(self, data: DataConfig, processor: Any, num_streams: int) -> CtcPacking:
        return CtcPacking()

    def abstract_row(self, data: DataConfig) -> CtcBatch:
        return CtcPacking().assemble([CtcPart()], first=0, streams=1)

    def denominators(self, batch: CtcBatch) -> Metrics:
        return {"rows": jnp.maximum(jnp.sum(batch.audio.length > 0), 1)}

    def loss(
        self, params: Mapping[str, Any], batch: CtcBatch, denominators: Metrics, key: Any, trained: Collection[str]
    ) -> Loss:
        thinker = params["thinker"]
        features = self.model.apply({"params": thinker}, batch.audio, method="encode_audio")
        num_rows = len(batch.labels)
        logits = jnp.asarray(features).reshape(num_rows, -1, features.shape[-1]) @ thinker["decoder"]["head"]["kernel"]
        # a number of its own for each batch of each step, which a resumed run must draw again
        logits += 1e-3 * jax.random.normal(key, logits.shape)
        is_real = jnp.asarray(batch.audio.length) > 0
        losses = optax.ctc_loss(logits, jnp.zeros(logits.shape[:2]), batch.labels, batch.labels == 0)
        mean = jnp.sum(jnp.where(is_real, losses, 0)) / denominators["rows"]
        return Loss(mean, {"loss": mean})

    def count_work(self, batch: CtcBatch) -> Metrics:
        rows = jnp.sum(batch.audio.length > 0)
        return {"tokens": rows, "target_tokens": rows}

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        return 6.0 * sum(sizes[path] for path in trained) * counts["tokens"]

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        return {}


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Recipe:
    rows = tmp_path / "ctc.jsonl"
    lines = [json.dumps({"seed": n, "labels": [n + 1, n + 2, 2 * n + 5]}) for n in range(4)]
    rows.write_text("\n".join(lines))
    return make_recipe(
        data={"train": (str(rows),), "valid": (str(rows),), "rows": 2, "streams": 2},
        phases=(Phase("encoder", (ParameterGroup("thinker/audio_encoder/(?!bos_eos).*"),)),),
        optimizer={"learning_rate": 3e-3, "accumulate": 2, "warmup": 0},
        eval={"every": 4},
        checkpoint={"every": 4},
        steps=8,
    )


def test_an_encoder_is_trained_on_another_loss(recipe: Recipe, tmp_path: Path) -> None:
    objective = Ctc(Thinker(CONFIG.thinker_config))
    assert train(recipe, tmp_path / "run", objective)
    losses = [values["loss"] for values in read_metrics(tmp_path / "run" / METRICS_FILE)]
    held_out = [values["loss"] for values in read_metrics(tmp_path / "run" / EVALUATIONS_FILE)]
    assert losses[-1] < 0.8 * losses[0] and held_out[1] < held_out[0]
    # the rows that it trains on are those of the held-out loss, all of them in each step
    assert held_out[0] == pytest.approx(losses[4], rel=0.02)
    before, after = (
        flatten_params(store.load(step_folder(tmp_path / "run", step), ["thinker"])["thinker"]) for step in (4, 8)
    )
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed and all(path.startswith("audio_encoder/") for path in changed)


@pytest.mark.long
def test_it_goes_on_with_the_same_random_numbers(recipe: Recipe, tmp_path: Path) -> None:
    objective = Ctc(Thinker(CONFIG.thinker_config))
    assert train(recipe, tmp_path / "run", objective)
    # the schedule is that of all steps, so what comes after a checkpoint is made again
    expected = read_metrics(tmp_path / "run" / METRICS_FILE)
    shutil.rmtree(step_folder(tmp_path / "run", 8))
    assert train(recipe, tmp_path / "run", objective)
    found = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [values["loss"] for values in found] == [values["loss"] for values in expected]


def test_the_loop_knows_no_model() -> None:
    package = Path(train.__code__.co_filename).parent
    for name in ("step", "run_state", "loop", "objective", "evaluation", "dry_run"):
        assert "omni_jax.models" not in (package / f"{name}.py").read_text(encoding="utf-8"), name
