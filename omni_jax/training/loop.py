"""The loop of a run: data to batches to steps to checkpoints, and back to where it was after any end."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from flax import linen as nn
from jax.experimental import multihost_utils

from omni_jax.batch import TrainBatch
from omni_jax.checkpoint import train_checkpoints as run
from omni_jax.data.pipeline import Batches, batches
from omni_jax.distributed import barrier, gather, is_main_process
from omni_jax.errors import TrainingError
from omni_jax.models.thinker import abstract_params
from omni_jax.processing.processor import Processor
from omni_jax.training import state as states
from omni_jax.training.feed import place, share_of
from omni_jax.training.flops import peak_flops, sizes_of, step_flops
from omni_jax.training.optimizer import flat
from omni_jax.training.progress import Reporter, plot
from omni_jax.training.recipe import Recipe
from omni_jax.training.step import Step, abstract_batch, compiled, make_step

PREEMPTED = 75  # what a program exits with when it was told to stop and has saved itself (EX_TEMPFAIL: try again)
_ROWS_NAMED = 20  # of a batch, in an error


def train(recipe: Recipe, workdir: Path) -> bool:
    """Trains to the end, or until it is told to stop; called again with the same folder it goes on.

    Args:
      recipe: what to do.
      workdir: the run's folder, which all processes see.

    Returns:
      whether the end was reached; if not, SIGTERM came, and the state is saved.

    Raises:
      ConfigError, CheckpointError, InputError: if the recipe, a checkpoint or the data cannot be used.
      TrainingError: if the loss or the gradients are not finite.
    """
    recipe.check()
    mesh = recipe.mesh.make()
    share = share_of(mesh, recipe.data.rows)
    recipe = _with_rejects(recipe, workdir)
    if is_main_process():
        workdir.mkdir(parents=True, exist_ok=True)
        states.prepare(recipe, workdir, print)
    barrier("the run's model")
    processor = Processor.load(workdir / run.MODEL, allow_urls=True)
    data = batches(recipe.data, processor, process_index=share.index, process_count=share.count)
    with jax.set_mesh(mesh), _Signals() as signals:
        loop = _Loop(recipe, workdir, mesh, data)
        try:
            return loop.run(signals)
        finally:
            loop.close()


def _with_rejects(recipe: Recipe, workdir: Path) -> Recipe:
    """Rows that cannot be used are named in the run's folder, unless the recipe names another file."""
    if recipe.data.rejects is not None:
        return recipe
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, rejects=workdir / "rejects.jsonl"))


@dataclass(frozen=True)
class _Pending:
    """A step that the devices may still be busy with."""

    step: int
    metrics: Mapping[str, jax.Array]
    rows: tuple[str, ...]
    data_wait: float


class _Loop:
    def __init__(self, recipe: Recipe, workdir: Path, mesh: jax.sharding.Mesh, data: Batches) -> None:
        self._recipe, self._workdir, self._mesh, self._data = recipe, workdir, mesh, data
        self._reporter: Reporter | None = None
        self._folder = run.RunFolder(workdir, recipe.checkpoint.keep)
        self._steps: dict[str, Step] = {}  # by phase
        restored = states.restored(self._folder, self._step_at, mesh, self._say)
        if restored is None:
            self._state = states.beginning(recipe, workdir, self._step_at(0), mesh)
        else:
            self._state, state_of_data = restored
            data.set_state(state_of_data)
            self._say(f"goes on after step {int(self._state.step)}")
        self._number = self._saved = int(self._state.step)
        if is_main_process():
            self._reporter = Reporter(workdir, self._number, recipe.steps, recipe.log_every)
        self._batch = abstract_batch(recipe.data, recipe.model, mesh, recipe.optimizer.accumulate)
        shapes = flat(nn.unbox(abstract_params(self._step_at(0).model)))
        self._sizes = sizes_of({path: leaf.shape for path, leaf in shapes.items()})
        self._told = time.perf_counter()

    def run(self, signals: _Signals) -> bool:
        pending: _Pending | None = None
        program: Any = None
        while self._number < self._recipe.steps:
            program = program or self._begin_phase()
            begin = time.perf_counter()
            parts, rows = self._next()
            waited = time.perf_counter() - begin
            self._state, metrics = program(self._state, place(parts, self._batch))
            self._number += 1
            if pending:
                self._tell(pending)
            pending = _Pending(self._number, metrics, rows, waited)
            if self._is_another_phase():
                self._state, program = states.next_phase(self._state, self._step_at(self._number), self._mesh), None
            stop = signals.stop_after(self._number)
            if stop or self._number % self._recipe.checkpoint.every == 0 or self._number == self._recipe.steps:
                self._tell(pending)  # first, so that no state is saved that is no numbers
                pending = None
                self._save()
            if stop:
                self._folder.wait()
                self._say(f"told to stop; saved after step {self._number}. Run the same command to go on")
                return self._number == self._recipe.steps
        self._finish()
        return True

    def close(self) -> None:
        self._data.close()
        if self._reporter:
            self._reporter.close()

    def _step_at(self, number: int) -> Step:
        phase, steps = self._recipe.phase_at(number)
        if phase.name not in self._steps:
            self._steps[phase.name] = make_step(self._recipe, phase, steps)
        return self._steps[phase.name]

    def _is_another_phase(self) -> bool:
        if self._number == self._recipe.steps:
            return False
        return self._step_at(self._number) is not self._step_at(self._number - 1)

    def _begin_phase(self) -> Any:
        step, phase = self._step_at(self._number), self._recipe.phase_at(self._number)[0]
        trained = sum(self._sizes[path] for path in step.rates)
        self._say(f"phase {phase.name}: {trained:,} of {sum(self._sizes.values()):,} parameters train")
        return compiled(step, self._state, self._mesh, self._recipe.tpu_options)

    def _next(self) -> tuple[list[TrainBatch], tuple[str, ...]]:
        parts, rows = [], []
        for _ in range(self._recipe.optimizer.accumulate):
            parts.append(next(self._data))
            rows += self._data.rows
        return parts, tuple(rows)

    def _tell(self, pending: _Pending) -> None:
        """Waits for the end of a step and tells of it."""
        metrics = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        seconds = time.perf_counter() - self._told
        self._told += seconds
        if not all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm")):
            named = ", ".join(pending.rows[:_ROWS_NAMED]) + (", ..." if len(pending.rows) > _ROWS_NAMED else "")
            raise TrainingError(
                f"step {pending.step}: the loss is {metrics['loss']}, the norm of the gradients is "
                f"{metrics['grad_norm']}. Its batch holds the rows {named}. Nothing after step {self._saved} is "
                "saved; look at these rows, or lower optimizer.learning-rate"
            )
        if self._reporter is None:
            return
        step = self._step_at(pending.step - 1)
        flops = step_flops(self._recipe.model.thinker_config, self._sizes, step.rates, metrics)
        flops /= max(seconds, 1e-9) * self._mesh.size
        peak = peak_flops(self._mesh.devices.flat[0])
        whole = {name: int(metrics[name]) for name in ("tokens", "learnt")}
        values = {"step": pending.step, "loss": metrics["loss"], "grad_norm": metrics["grad_norm"], **whole}
        times = {"seconds": seconds, "data_wait": pending.data_wait}
        rate = metrics["learning_rate"]
        self._reporter.step({**values, **times, "learning_rate": rate}, flops / peak if peak else None, flops)

    def _save(self) -> None:
        merged: dict[str, Any] = {"data": {}, "streams": {}}
        for part in gather(self._data.get_state()):
            merged["data"] = part["data"]
            merged["streams"] |= part["streams"]
        self._folder.save(states.to_save(self._state, self._number, merged))
        self._saved = self._number

    def _finish(self) -> None:
        self._folder.wait()
        barrier("the last checkpoint")
        if self._reporter is None:
            return
        picture = plot(self._workdir)
        where = self._workdir / run.CHECKPOINTS / f"{self._folder.steps()[-1]:08d}"
        self._say(f"done; the model is {where}" + (f", the loss is drawn in {picture}" if picture else ""))

    def _say(self, text: str) -> None:
        if is_main_process():
            (self._reporter.say if self._reporter else print)(text)


class _Signals:
    """Notices SIGTERM, by which a machine that is taken away says so; all processes stop after the same step."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._before: Any = None

    def __enter__(self) -> _Signals:
        # of several processes, jax notices it (its preemption service)
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._told.set())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def stop_after(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self._told.is_set()
        return multihost_utils.reached_preemption_sync_point(step)
