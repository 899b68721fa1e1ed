"""What each rule of TMRoPE is worth: the same training with one of them changed, scored on questions of timing.

    python tools/ablate_tmrope.py out/ablation --data out/omni-tiny/data \\
        --init out/omni-tiny/language --encoders out/omni-tiny/thinker-sft

The published paper has no such ablation. Every variant begins from the same language model, which has seen neither
videos nor their order, and from the same encoders, which have no part in TMRoPE and do not train. It reads the same
rows in the same order for as many steps; only position ids or the order of tokens differ. A held-out question counts as
right if the most likely token is the right one at every position of the answer, its end included: then greedy decoding
gives exactly this answer. Beside it stands the cross-entropy of answers, which tells variants apart before answers are
right. A run that was stopped goes on. Figures are in OUT/ablation.json.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from configs import RECIPES
from configs.sizes import ADAPTERS, DECODER
from omni_jax import mrope
from omni_jax.batch import PADDING, Spans, TrainBatch
from omni_jax.checkpoint import store
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.config import ThinkerConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.held_out import read_held_out
from omni_jax.data.packing import OmniPacking
from omni_jax.models.thinker import Thinker
from omni_jax.plain_files import replace_file
from omni_jax.processing import layout
from omni_jax.processing.processor import Processor
from omni_jax.segments import Chunk, Grid, Interleaved, interleave
from omni_jax.training.loop import train
from omni_jax.training.objective import Loss, Metrics
from omni_jax.training.objectives.next_token import NextToken, make_next_token
from omni_jax.training.recipe import ParameterGroup, Phase, Recipe
from omni_jax.training.run_state import take_shape
from tools.command_errors import exit_on_error
from tools.pack_checkpoint import Options as PackOptions
from tools.pack_checkpoint import pack_checkpoint
from tools.row_files import read_values, write_values

TIMING_TASKS = ("colour-at-sound", "word-at-shape", "effect", "order", "direction", "narrate")
_WHOLE = 100_000  # seconds of a chunk that holds any video


@dataclass(frozen=True)
class Variant:
    """A rule that is changed.

    Attributes:
      about: which, for people.
      chunk_seconds: of picture and sound that alternate.
      plain: one id for each token, on all axes.
      ordinal: a frame is one time id after the one before it, however long it lasts.
      sound_first: within each chunk.
      frame_rate_factor: what the frame rate is multiplied by where the model answers, not where it trains.
    """

    about: str
    chunk_seconds: int = 2
    plain: bool = False
    ordinal: bool = False
    sound_first: bool = False
    frame_rate_factor: float = 1.0


VARIANTS = {
    "tmrope": Variant("as published"),
    "plain": Variant("(a) one id for each token, on all axes", plain=True),
    "ordinal": Variant("(b) M-RoPE with ordinal time: one id for each frame", ordinal=True),
    "whole": Variant("(c) all pictures, then all sound", chunk_seconds=_WHOLE),
    "sound-first": Variant("(d) in each chunk sound before pictures", sound_first=True),
    "chunks-1": Variant("(e) chunks of one second", chunk_seconds=1),
    "chunks-4": Variant("(e) chunks of four seconds", chunk_seconds=4),
}
# (f) of the published rules, where it answers
FRAME_RATE_FACTORS = {"half-frame-rate": 0.5, "double-frame-rate": 2.0}


@dataclass(frozen=True)
class Options:
    """What is trained."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    init: Path
    """Checkpoint whose language model all begin from, or the folder of a run."""
    encoders: Path
    """The same, whose encoders they have."""
    data: Path
    """Folder of tools/make_world.py with train.jsonl and test.jsonl."""
    steps: int = 400
    seeds: int = 3
    """Runs of each variant; a seed decides the order of the rows."""
    learning_rate: float = 1e-3
    most: int = 200
    """Held-out questions of each task, at most."""


@dataclass(frozen=True, eq=False)
class AblatedNextToken(NextToken):
    """The Thinker's objective under a variant."""

    variant: Variant = VARIANTS["tmrope"]

    def make_packing(self, data: DataConfig, processor: Processor, num_streams: int) -> OmniPacking:
        changed = copy.copy(processor)
        thinker = dataclasses.replace(processor.config.thinker_config, seconds_per_chunk=self.variant.chunk_seconds)
        changed.config = dataclasses.replace(processor.config, thinker_config=thinker)
        return super().make_packing(data, changed, num_streams)

    def loss(self, params: Any, batch: TrainBatch, denominators: Metrics, key: jax.Array, trained: Any) -> Loss:
        return super().loss(params, change_ids(batch, self.variant), denominators, key, trained)


def change_ids(batch: TrainBatch, variant: Variant) -> TrainBatch:
    """The batch with the position ids of a variant; traced."""
    spans = batch.inputs.spans
    if variant.plain:
        spans = _count_tokens(spans, jnp.asarray(batch.inputs.segment_ids))
    elif variant.ordinal:
        spans = spans.replace(seconds=jnp.full_like(spans.seconds, 1 / 25))  # type: ignore[attr-defined]
    return batch.replace(inputs=batch.inputs.replace(spans=spans))  # type: ignore[attr-defined]


def _count_tokens(spans: Spans, segment_ids: Int[jax.Array, "B S"]) -> Spans:
    """Spans that count the tokens of each example from 0."""
    position = jnp.arange(segment_ids.shape[1])  # [S]
    is_first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)  # [B, S]
    example_start = jax.lax.cummax(jnp.where(is_first, position, 0), axis=1)  # [B, S]
    begin = jnp.asarray(spans.begin)  # [B, N]
    inside = jnp.minimum(begin, segment_ids.shape[1] - 1)  # [B, N]; spans that are not used begin at S
    start = begin - jnp.take_along_axis(example_start, inside, axis=1)  # [B, N]
    return spans.replace(start=start, height=jnp.zeros_like(begin))  # type: ignore[attr-defined]


@contextlib.contextmanager
def layout_of(variant: Variant) -> Iterator[None]:
    """Videos are laid out in the order and at the frame rate of the variant."""

    def sound_first(segment: Interleaved, config: ThinkerConfig) -> list[Chunk]:
        ordered: list[Chunk] = []
        for chunk in interleave(segment, config):
            # before the picture of the same chunk, which is the one before it
            place = len(ordered) - 1 if chunk.is_audio and ordered and not ordered[-1].is_audio else len(ordered)
            ordered.insert(place, chunk)
        return ordered

    cells = layout.VisionInput.cells

    def cells_at_frame_rate(video: layout.VisionInput, merge: int) -> Grid:
        grid = cells(video, merge)
        return dataclasses.replace(grid, seconds=grid.seconds / variant.frame_rate_factor)

    with contextlib.ExitStack() as patches:
        if variant.sound_first:
            # tokens and their ids are laid out by the same function, in two modules
            for module in (layout, mrope):
                patches.enter_context(mock.patch.object(module, "interleave", sound_first))
        if variant.frame_rate_factor != 1:
            patches.enter_context(mock.patch.object(layout.VisionInput, "cells", cells_at_frame_rate))
        yield


def make_recipe(options: Options, rows: Path, seed: int) -> Recipe:
    """The recipe of the joint stage, for the rows of timing."""
    recipe = RECIPES["pretrain2-omni-tiny"]
    return dataclasses.replace(
        recipe,
        init=options.out / "base",
        phases=(Phase("decoder", (ParameterGroup(DECODER), ParameterGroup(ADAPTERS))),),
        steps=options.steps,
        seed=seed,
        data=dataclasses.replace(recipe.data, train=(str(rows),), seed=seed),
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=options.learning_rate),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare(
    model: Thinker, variant: Variant, params: Any, batch: TrainBatch
) -> tuple[Bool[jax.Array, "B S"], Float[jax.Array, "B S"]]:
    """Where the most likely token is the right one, or none is asked for; and the nats of tokens that are asked for."""
    logits = jnp.asarray(model.apply({"params": params}, change_ids(batch, variant).inputs), jnp.float32)  # [B, S, V]
    asked = jnp.asarray(batch.weights) > 0  # [B, S]
    targets = jnp.where(asked, batch.targets, 0)  # [B, S]
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]  # [B, S]
    return (jnp.argmax(logits, axis=-1) == batch.targets) | ~asked, jnp.where(asked, nats, 0)


def score_answers(
    objective: AblatedNextToken, params: Any, recipe: Recipe, rows: Path, processor: Processor
) -> dict[str, float]:
    """How held-out questions are answered.

    Returns:
      {"asked": of all questions, "right": of those with the right answer, "tokens": of answers, "nats": of these}.
    """
    data = dataclasses.replace(recipe.data, valid=(str(rows),))
    with layout_of(objective.variant):
        batches = read_held_out(data, objective.make_packing(data, processor, data.streams))
    counts: dict[str, float] = {"asked": 0, "right": 0, "tokens": 0, "nats": 0.0}
    for batch in batches:
        right, nats = map(np.asarray, _compare(objective.model, objective.variant, params, batch))
        counts["nats"] += float(nats.sum())
        counts["tokens"] += int((np.asarray(batch.weights) > 0).sum())
        for row, segments in enumerate(np.asarray(batch.inputs.segment_ids)):
            for segment in np.unique(segments[segments != PADDING]):
                counts["asked"] += 1
                counts["right"] += int(right[row][segments == segment].all())
    return counts


class Ablation:
    """All variants and seeds."""

    def __init__(self, options: Options) -> None:
        """Writes what all begin from, and the rows of timing.

        Raises:
          InputError: if a file of rows cannot be read.
          CheckpointError, ConfigError: if language model and encoders do not fit each other.
        """
        self._options = options
        self._path = options.out / "ablation.json"
        self._found: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            self._found = json.loads(self._path.read_text(encoding="utf-8"))
        base = options.out / "base"
        if not base.exists():
            pack_checkpoint(PackOptions(options.encoders, base, components=("thinker",), decoder=options.init))
        # beside their media, which they name from there
        rows = [values for values in read_values(options.data / "train.jsonl") if values["task"] in TIMING_TASKS]
        self._train = write_values(options.data / "train_timing.jsonl", rows)
        held_out = read_values(options.data / "test.jsonl")
        self._held_out: dict[str, Path] = {}
        for task in TIMING_TASKS:
            of_task = [values for values in held_out if values["task"] == task][: options.most]
            self._held_out[task] = write_values(options.data / f"test_{task}.jsonl", of_task)

    def run(self) -> None:
        """Trains and scores what has not been."""
        for seed in range(self._options.seeds):
            for name, variant in VARIANTS.items():
                factors = {name: 1.0} | (FRAME_RATE_FACTORS if name == "tmrope" else {})
                wanted = [scored for scored in factors if f"{scored} {seed}" not in self._found]
                if wanted:
                    workdir = self._options.out / f"{name}-{seed}"
                    print(f"{name}, seed {seed}: {variant.about}")
                    self._train_variant(workdir, variant, seed)
                    for scored in wanted:
                        own = dataclasses.replace(variant, frame_rate_factor=factors[scored])
                        self._found[f"{scored} {seed}"] = self._score(workdir, own, seed)
                        replace_file(self._path, (json.dumps(self._found, indent=2) + "\n").encode())
        show(self._found)

    def _objective(self, recipe: Recipe, variant: Variant) -> AblatedNextToken:
        made = make_next_token(recipe)
        return AblatedNextToken(made.model, made.config, made.options, made.num_sources, variant)

    def _train_variant(self, workdir: Path, variant: Variant, seed: int) -> None:
        recipe = make_recipe(self._options, self._train, seed)
        with layout_of(variant):
            if not train(recipe, workdir, self._objective(take_shape(recipe, workdir), variant)):
                raise SystemExit("told to stop; run the same command to go on")

    def _score(self, workdir: Path, variant: Variant, seed: int) -> dict[str, Any]:
        recipe = take_shape(make_recipe(self._options, self._train, seed), workdir)
        folder = resolve_checkpoint(workdir)
        params = store.load(folder, ["thinker"])["thinker"]
        processor = Processor.load(folder)
        objective = self._objective(recipe, variant)
        return {
            task: score_answers(objective, params, recipe, rows, processor) for task, rows in self._held_out.items()
        }


def mean_and_interval(accuracies: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds, and half of the interval that has the expected share with a probability of 95 % (t)."""
    if len(accuracies) < 2:
        return float(np.mean(accuracies)), float("nan")
    error = np.std(accuracies, ddof=1) / np.sqrt(len(accuracies))
    return float(np.mean(accuracies)), float(student_t.ppf(0.975, len(accuracies) - 1) * error)


def summarise(found: dict[str, dict[str, Any]], variant: str, task: str, of: str, by: str) -> str:
    """The mean over seeds of the ratio of two counts, with its interval; empty without a run."""
    runs = [counts[task] for key, counts in found.items() if key.rsplit(" ", 1)[0] == variant]
    if not runs:
        return ""
    mean, half = mean_and_interval([counts[of] / counts[by] for counts in runs])
    scale, digits = (100, 1) if of == "right" else (1, 3)
    interval = "" if np.isnan(half) else f" ± {scale * half:.{digits}f}"
    return f"{scale * mean:.{digits}f}{interval}"


MEASURES = {"right answers in percent": ("right", "asked"), "nats per token of an answer": ("nats", "tokens")}


def show(found: dict[str, dict[str, Any]]) -> None:
    """Prints the measures of each variant, over its seeds."""
    for title, (of, by) in MEASURES.items():
        table = Table("variant", *TIMING_TASKS, title=title)
        for name in (*VARIANTS, *FRAME_RATE_FACTORS):
            table.add_row(name, *(summarise(found, name, task, of, by) for task in TIMING_TASKS))
        Console().print(table)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    with exit_on_error():
        Ablation(options).run()


if __name__ == "__main__":
    main()
