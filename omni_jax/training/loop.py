"""The loop of a run: data to batches to steps to checkpoints, and back to where it was after any end."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from flax import linen as nn
from jax.experimental import multihost_utils

from omni_jax.batch import TrainBatch
from omni_jax.checkpoint.train_checkpoints import MODEL_FOLDER, TrainCheckpoints, step_folder
from omni_jax.checks import printable
from omni_jax.data.pipeline import Batches, batches
from omni_jax.distributed import barrier, gather, is_main_process
from omni_jax.errors import TrainingError
from omni_jax.models.thinker import abstract_params
from omni_jax.processing.processor import Processor
from omni_jax.training.device_batches import batch_shard, to_devices
from omni_jax.training.flops import count_step_flops, parameter_sizes, peak_flops
from omni_jax.training.metrics_log import MetricsLog, plot_loss
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.recipe import Recipe
from omni_jax.training.run_state import begin_phase, init_state, prepare_workdir, restore_state, to_checkpoint
from omni_jax.training.step import Metrics, TrainState, TrainStep, abstract_batch, jit_step, make_step

PREEMPTED = 75  # what a program exits with when it was told to stop and has saved itself (EX_TEMPFAIL: try again)
_MAX_NAMED_ROWS = 20  # of a batch, in an error

# the compiled step of a phase
TrainProgram = Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]


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
    # what a recipe can have wrong shows before anything is written
    recipe.check()
    mesh = recipe.mesh.make()
    shard = batch_shard(mesh, recipe.data.rows)
    recipe = _with_rejects_file(recipe, workdir)
    if is_main_process():
        workdir.mkdir(parents=True, exist_ok=True)
        prepare_workdir(recipe, workdir, print)
    # the others read what the main process has just made
    barrier("the run's model")
    # the run's own copy, so that it goes on where ``init`` is gone or has changed
    processor = Processor.load(workdir / MODEL_FOLDER)
    data = batches(recipe.data, processor, process_index=shard.index, process_count=shard.count)
    with jax.set_mesh(mesh), _StopSignal() as stop_signal:
        loop = _TrainLoop(recipe, workdir, mesh, data)
        try:
            return loop.run(stop_signal)
        finally:
            loop.close()


def _with_rejects_file(recipe: Recipe, workdir: Path) -> Recipe:
    """Rows that cannot be used are named in the run's folder, unless the recipe names another file."""
    if recipe.data.rejects is not None:
        return recipe
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, rejects=workdir / "rejects.jsonl"))


@dataclass(frozen=True)
class _DispatchedStep:
    """A step that the devices may still be busy with."""

    number: int
    metrics: Mapping[str, jax.Array]
    rows: tuple[str, ...]
    data_wait: float  # seconds


class _TrainLoop:
    """A run from its state to its end.

    The metrics of a step are read after the next one is dispatched, so that the devices never wait for the host.
    """

    def __init__(self, recipe: Recipe, workdir: Path, mesh: jax.sharding.Mesh, data: Batches) -> None:
        self._recipe = recipe
        self._workdir = workdir
        self._mesh = mesh
        self._data = data
        self._log_file: MetricsLog | None = None  # of the main process
        self._checkpoints = TrainCheckpoints(workdir, recipe.checkpoint.keep)

        # by phase; a step must stay the same object, for jit compiles each anew
        self._steps: dict[str, TrainStep] = {}
        # where the run stands: at its beginning, or after the last checkpoint
        self._state = self._first_state()
        self._number = int(self._state.step)
        self._saved_step = self._number  # of the last checkpoint

        # after the state is known: lines of later steps, which come again, are dropped from the file
        if is_main_process():
            self._log_file = MetricsLog(workdir, self._number, recipe.steps, recipe.log_every)
        self._abstract_batch = abstract_batch(recipe.data, recipe.model, mesh, recipe.optimizer.accumulate)
        # of all parameters, whatever trains: FLOPs are counted from them
        shapes = flatten_params(nn.unbox(abstract_params(self._step_at(0).model)))
        self._sizes = parameter_sizes({path: leaf.shape for path, leaf in shapes.items()})
        self._last_report = time.perf_counter()

    def run(self, stop_signal: _StopSignal) -> bool:
        """Trains; returns whether the end was reached."""
        recipe = self._recipe
        previous: _DispatchedStep | None = None  # dispatched, but not yet reported
        program: TrainProgram | None = None
        while self._number < recipe.steps:
            if program is None:
                program = self._compile_phase()

            # the devices have the next step before the host waits for the last one
            dispatched = self._dispatch(program)
            if previous:
                self._report(previous)
            previous = dispatched

            if self._is_phase_end():
                # before the checkpoint, which must hold the state that the next phase begins with
                self._state = begin_phase(self._state, self._step_at(self._number), self._mesh)
                program = None

            # every process asks once a step, so that all of them stop after the same one
            stop = stop_signal.stops_after(self._number)
            if stop or self._number % recipe.checkpoint.every == 0 or self._number == recipe.steps:
                self._report(previous)  # first, so that no state is saved that is not finite
                previous = None
                self._save()
            if stop:
                # the machine goes as soon as this process ends
                self._checkpoints.wait()
                self._log(f"told to stop; saved after step {self._number}. Run the same command to go on")
                return self._number == recipe.steps
        self._finish()
        return True

    def close(self) -> None:
        # the data first: its workers need not read ahead while a checkpoint is waited for
        self._data.close()
        self._checkpoints.close()
        if self._log_file:
            self._log_file.close()

    def _first_state(self) -> TrainState:
        restored = restore_state(self._checkpoints, self._step_at, self._mesh, self._log)
        if restored is None:
            return init_state(self._recipe, self._workdir, self._step_at(0), self._mesh)
        state, data_state = restored
        # refuses other data settings, under which the batches would be others
        self._data.set_state(data_state)
        self._log(f"goes on after step {int(state.step)}")
        return state

    def _step_at(self, number: int) -> TrainStep:
        """The step that follows ``number`` others."""
        phase, num_steps = self._recipe.phase_at(number)
        if phase.name not in self._steps:
            self._steps[phase.name] = make_step(self._recipe, phase, num_steps)
        return self._steps[phase.name]

    def _is_phase_end(self) -> bool:
        if self._number == self._recipe.steps:
            return False  # no phase follows the end of the run
        return self._step_at(self._number) is not self._step_at(self._number - 1)

    def _compile_phase(self) -> TrainProgram:
        step = self._step_at(self._number)
        phase, _ = self._recipe.phase_at(self._number)
        trained = 0
        for path in step.scales:
            trained += self._sizes[path]
        self._log(f"phase {phase.name}: {trained:,} of {sum(self._sizes.values()):,} parameters train")
        return jit_step(step, self._state, self._mesh, self._recipe.tpu_options)

    def _dispatch(self, program: TrainProgram) -> _DispatchedStep:
        """Starts the next step on the devices."""
        started = time.perf_counter()
        parts, rows = self._next_batches()
        data_wait = time.perf_counter() - started
        # not waited for; the program takes the memory of the old state
        self._state, metrics = program(self._state, to_devices(parts, self._abstract_batch))
        self._number += 1
        return _DispatchedStep(self._number, metrics, rows, data_wait)

    def _next_batches(self) -> tuple[list[TrainBatch], tuple[str, ...]]:
        """The batches of a step, and the names of their rows."""
        parts = []
        rows: list[str] = []
        for _ in range(self._recipe.optimizer.accumulate):
            parts.append(next(self._data))
            rows += self._data.rows
        return parts, tuple(rows)

    def _report(self, step: _DispatchedStep) -> None:
        """Waits for the end of a step and logs its metrics."""
        # one copy to the host for all of them, which waits for the step
        metrics = {name: float(value) for name, value in jax.device_get(step.metrics).items()}
        seconds = time.perf_counter() - self._last_report
        self._last_report += seconds  # and not the time now: what follows belongs to the next step
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise self._not_finite(step, metrics)
        # the metrics are the same on every process, so all raise above or none; the main one writes them
        if self._log_file is None:
            return

        # of the step that ended, whose phase may not be that of the next one
        scales = self._step_at(step.number - 1).scales
        flops = count_step_flops(self._recipe.model.thinker_config, self._sizes, scales, metrics)
        flops_per_device = flops / (max(seconds, 1e-9) * self._mesh.size)
        # docs/training.md, "Metrics", explains the fields
        line = {
            "step": step.number,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "tokens": int(metrics["tokens"]),
            "target_tokens": int(metrics["target_tokens"]),
            "seconds": seconds,
            "data_wait": step.data_wait,
            "learning_rate": metrics["learning_rate"],
        }
        self._log_file.log_step(line, flops_per_device, peak_flops(self._mesh.devices.flat[0]))

    def _not_finite(self, step: _DispatchedStep, metrics: Mapping[str, float]) -> TrainingError:
        rows = ", ".join(step.rows[:_MAX_NAMED_ROWS])
        if len(step.rows) > _MAX_NAMED_ROWS:
            rows += ", ..."
        return TrainingError(
            f"step {step.number}: the loss is {metrics['loss']}, the norm of the gradients is "
            f"{metrics['grad_norm']}. Its batch holds the rows {rows}. Nothing after step {self._saved_step} is "
            "saved; look at these rows, or lower optimizer.learning-rate"
        )

    def _save(self) -> None:
        # every process knows where its own streams of rows are; a checkpoint has those of all
        streams: dict[str, Any] = {}
        data: Any = {}  # the settings of the data, equal in all
        for state in gather(self._data.get_state()):
            data = state["data"]
            streams |= state["streams"]
        position = {"data": data, "streams": streams}
        self._checkpoints.save(to_checkpoint(self._state, self._number, position))
        self._saved_step = self._number

    def _finish(self) -> None:
        self._checkpoints.wait()
        # the main process completes a checkpoint; no other may end before, or the coordinator would end the run
        barrier("the last checkpoint")
        if self._log_file is None:
            return
        picture = plot_loss(self._workdir)
        drawn = f", the loss is drawn in {picture}" if picture else ""
        self._log(f"done; the model is {step_folder(self._workdir, self._number)}{drawn}")

    def _log(self, text: str) -> None:
        if self._log_file:
            self._log_file.print(text)
        elif is_main_process():
            print(printable(text))


class _StopSignal:
    """Notices SIGTERM, by which a machine that is taken away says so; all processes stop after the same step."""

    def __init__(self) -> None:
        self._received = threading.Event()
        self._previous_handler: Any = None

    def __enter__(self) -> _StopSignal:
        # Of several processes, jax notices it (its preemption service). Only the main thread may set a handler.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            # it only takes note: the step that goes on is finished and saved
            self._previous_handler = signal.signal(signal.SIGTERM, lambda *_: self._received.set())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def stops_after(self, step: int) -> bool:
        """Whether the run is to stop after a step; the same on all processes."""
        if jax.process_count() == 1:
            return self._received.is_set()
        # the signal reaches processes at different times; this agrees on a step that none has passed
        return multihost_utils.reached_preemption_sync_point(step)
