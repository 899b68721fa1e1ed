"""The loop of a run: data to batches to steps to checkpoints, and back to where it was after any end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from omni_jax.checkpoint.train_checkpoints import MODEL_FOLDER, TrainCheckpoints, step_folder
from omni_jax.checks import printable
from omni_jax.data.config import DataConfig
from omni_jax.data.held_out import read_held_out
from omni_jax.data.pipeline import Batches, RowCounts, batches
from omni_jax.distributed import barrier, gather, is_main_process
from omni_jax.errors import TrainingError
from omni_jax.processing.processor import Processor
from omni_jax.training.device_batches import batch_shard, to_devices
from omni_jax.training.evaluation import Best, Evaluation, read_best, write_best
from omni_jax.training.failure import FailureWatch
from omni_jax.training.flops import parameter_sizes, peak_flops
from omni_jax.training.metrics_log import MetricsLog, plot_loss
from omni_jax.training.objective import Batch, Metrics, Objective, Sample, SampleRequest
from omni_jax.training.objectives import make_objective
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.recipe import Recipe
from omni_jax.training.run_state import (
    begin_phase,
    init_state,
    prepare_workdir,
    restore_state,
    take_shape,
    to_checkpoint,
    trained_components,
)
from omni_jax.training.samples import make_sample_request
from omni_jax.training.step import TrainState, TrainStep, abstract_batch, jit_step, make_step
from omni_jax.training.stop_signal import StopSignal

PREEMPTED = 75  # what a program exits with when it was told to stop and has saved itself (EX_TEMPFAIL: try again)
_MAX_NAMED_ROWS = 20  # of a batch, in an error
PROFILE_FOLDER = "profile"  # in the run's folder
# a loss is a spike where it lies so many standard deviations above the mean of the steps before
_SPIKE_STEPS = 100
_SPIKE_DEVIATIONS = 5.0
_DRAW_EVERY = 60.0  # seconds from one picture of the loss to the next, at least
_CHECK_REJECTS_EVERY = 100  # steps after which several processes add up the rows that they cannot use

# the compiled step of a phase
TrainProgram = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def train(recipe: Recipe, workdir: Path, objective: Objective | None = None) -> bool:
    """Trains to the end, or until it is told to stop; called again with the same folder it goes on.

    Args:
      recipe: what to do.
      workdir: the run's folder, which all processes see.
      objective: what to minimise; the recipe's if None.

    Returns:
      whether the end was reached; if not, SIGTERM came, and the state is saved.

    Raises:
      ConfigError, CheckpointError, InputError: if the recipe, a checkpoint or the data cannot be used.
      TrainingError: if the loss or the gradients are not finite.
    """
    # what a recipe can have wrong shows before anything is written
    recipe.check()
    recipe = take_shape(recipe, workdir)
    objective = objective or make_objective(recipe)
    mesh = recipe.mesh.make()
    shard = batch_shard(mesh, recipe.data.rows)
    recipe = _with_rejects_file(recipe, workdir)
    with contextlib.closing(FailureWatch(workdir)) as failure_watch, jax.set_mesh(mesh), StopSignal() as stop_signal:
        with failure_watch.guard():
            if is_main_process():
                workdir.mkdir(parents=True, exist_ok=True)
                for warning in recipe.find_warnings():
                    print(f"note: {warning}")
                prepare_workdir(recipe, objective, workdir, print)
            # the others read what the main process has just made
            barrier("the run's model")
            # the run's own copy, so that it goes on where ``init`` is gone or has changed
            processor = Processor.load(workdir / MODEL_FOLDER)
            if is_main_process():
                for difference in find_size_differences(recipe.data, processor):
                    print(f"note: {difference}")
            packing = objective.make_packing(recipe.data, processor, recipe.data.streams // shard.count)
            data = batches(recipe.data, packing, process_index=shard.index, process_count=shard.count)
            held_out = []
            if recipe.data.valid:
                held_out = read_held_out(recipe.data, packing, process_index=shard.index, process_count=shard.count)
            sample_request = make_sample_request(recipe, processor, mesh)
            loop = _TrainLoop(recipe, objective, workdir, mesh, data, held_out, sample_request)
        with contextlib.closing(loop):
            # an error must not cost the checkpoint that is being written
            failure_watch.before_end(loop.wait_for_checkpoint)
            with failure_watch.guard():
                return loop.run(stop_signal)


def find_size_differences(data: DataConfig, processor: Processor) -> list[str]:
    """Notes on sizes of pictures that training and the preprocessor differ in; none if the data have no canvases."""
    if not data.canvases:
        return []
    return [
        f"data.{name} is {value}, and the model's preprocessor_config.json says {own}: unless that is changed too, it "
        "will be asked with other sizes than it trains with"
        for name, value, own in processor.settings.pixels.find_differences(data.pixels)
    ]


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
    epochs: tuple[float, ...]  # of the rows


class _TrainLoop:
    """A run from its state to its end.

    The metrics of a step are read after the next one is dispatched, so that the devices never wait for the host.
    """

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective,
        workdir: Path,
        mesh: jax.sharding.Mesh,
        data: Batches,
        held_out: Sequence[Batch],
        sample_request: SampleRequest | None,
    ) -> None:
        self._recipe = recipe
        self._objective = objective
        self._workdir = workdir
        self._mesh = mesh
        self._data = data
        self._sample_request = sample_request
        self._log_file: MetricsLog | None = None  # of the main process
        self._checkpoints = TrainCheckpoints(workdir, objective.components, recipe.checkpoint.keep)
        self._saved_components = trained_components(recipe, objective)

        # by phase; a step must stay the same object, for jit compiles each anew
        self._steps: dict[str, TrainStep] = {}
        # where the run stands: at its beginning, or after the last checkpoint
        self._state = self._first_state()
        self._number = int(self._state.step)
        self._saved_step = self._number  # of the last checkpoint
        self._num_skipped = 0  # steps that were not finite, since this start
        self._is_profiling = False
        self._recent_losses: deque[float] = deque(maxlen=_SPIKE_STEPS)

        # after the state is known: lines of later steps, which come again, are dropped from the file
        if is_main_process():
            self._log_file = MetricsLog(workdir, self._number, recipe.steps, recipe.log_every)
        self._abstract_batch = abstract_batch(recipe.data, objective, mesh, recipe.optimizer.accumulate)
        self._evaluation: Evaluation | None = None
        self._best: Best | None = None
        if held_out:
            abstract_part = abstract_batch(recipe.data, objective, mesh)
            self._evaluation = Evaluation(objective, held_out, abstract_part, recipe.data.valid)
            self._best = read_best(workdir, self._number)
            self._checkpoints.best_step = None if self._best is None else self._best.step
        # of all parameters, whatever trains: FLOPs are counted from them
        shapes = flatten_params(nn.unbox(objective.abstract_params()))
        self._sizes = parameter_sizes({path: leaf.shape for path, leaf in shapes.items()})
        self._last_report = time.perf_counter()
        self._last_drawn = time.monotonic()

    def run(self, stop_signal: StopSignal) -> bool:
        """Trains; returns whether the end was reached."""
        recipe = self._recipe
        previous: _DispatchedStep | None = None  # dispatched, but not yet reported
        program: TrainProgram | None = None
        # a run that has stopped early is not to go on when it is started again
        is_end = self._runs_out_of_patience()
        while self._number < recipe.steps and not is_end:
            if program is None:
                program = self._compile_phase()

            self._start_profile()
            # the devices have the next step before the host waits for the last one
            dispatched = self._dispatch(program)
            self._stop_profile()
            if previous:
                self._report(previous)
            previous = dispatched

            if self._is_phase_end():
                # before the checkpoint, which must hold the state that the next phase begins with
                self._state = begin_phase(self._state, self._step_at(self._number), self._mesh)
                program = None

            if jax.process_count() > 1 and self._number % _CHECK_REJECTS_EVERY == 0:
                self._check_rejects()
            # every process asks once a step, so that all of them stop after the same one
            stop = stop_signal.stops_after(self._number)
            is_end = self._number == recipe.steps
            evaluates = self._evaluation is not None and (is_end or self._number % recipe.eval.every == 0)
            is_best = False
            if stop or is_end or evaluates or self._number % recipe.checkpoint.every == 0:
                self._report(previous)  # first, so that no state is saved that is not finite
                previous = None
            if evaluates:
                is_best = self._evaluate()
                is_end = is_end or self._runs_out_of_patience()
            if stop or is_end or is_best or self._number % recipe.checkpoint.every == 0:
                self._save()
            if stop:
                # the machine goes as soon as this process ends
                self._checkpoints.wait()
                self._log(f"told to stop; saved after step {self._number}. Run the same command to go on")
                return is_end
        self._finish()
        return True

    def wait_for_checkpoint(self) -> None:
        """Waits until the checkpoint that is being written is complete.

        Raises:
          CheckpointError: if it could not be written.
        """
        self._checkpoints.wait()

    def close(self) -> None:
        # a run may end before the last step that is to be traced
        if self._is_profiling:
            self._write_profile()
        # the data first: its workers need not read ahead while a checkpoint is waited for
        self._data.close()
        self._checkpoints.close()
        if self._log_file:
            self._log_file.close()

    def _first_state(self) -> TrainState:
        components = self._objective.components
        restored = restore_state(self._workdir, self._checkpoints, components, self._step_at, self._mesh, self._log)
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
            self._steps[phase.name] = make_step(self._recipe, self._objective, phase, num_steps)
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
        return _DispatchedStep(self._number, metrics, rows, data_wait, self._data.epochs)

    def _start_profile(self) -> None:
        """Starts to trace, if the next step is the first that is to be."""
        if self._recipe.profile is not None and self._number + 1 == self._recipe.profile[0]:
            jax.block_until_ready(self._state)
            options = jax.profiler.ProfileOptions()
            # calls of Python functions are a hundred times as many events as all others; writing them takes a minute
            options.python_tracer_level = 0
            folder = self._workdir / PROFILE_FOLDER
            jax.profiler.start_trace(folder, create_perfetto_trace=is_main_process(), profiler_options=options)
            self._is_profiling = True

    def _stop_profile(self) -> None:
        """Waits for the step that was dispatched last and ends the trace, if it is the last that is to be traced."""
        if self._is_profiling and self._recipe.profile is not None and self._number >= self._recipe.profile[1]:
            jax.block_until_ready(self._state)
            self._write_profile()

    def _write_profile(self) -> None:
        jax.profiler.stop_trace()
        self._is_profiling = False
        self._log(f"traced to {self._workdir / PROFILE_FOLDER}")

    def _next_batches(self) -> tuple[list[Batch], tuple[str, ...]]:
        """The batches of a step, and the names of their rows."""
        parts: list[Batch] = []
        rows: list[str] = []
        for _ in range(self._recipe.optimizer.accumulate):
            parts.append(next(self._data))
            rows += self._data.rows
        return parts, tuple(rows)

    def _check_rejects(self) -> None:
        """Raises InputError if of the rows of all processes too many cannot be used."""
        counts = gather(list(self._data.rejects.counts))
        self._data.rejects.check(RowCounts(sum(read for read, _ in counts), sum(bad for _, bad in counts)))

    def _report(self, step: _DispatchedStep) -> None:
        """Waits for the end of a step and logs its metrics."""
        # one copy to the host for all of them, which waits for the step
        metrics: dict[str, float] = {}
        by_source: dict[str, np.ndarray] = {}
        found: dict[str, Any] = jax.device_get(step.metrics)
        # JSON has no number that is not finite
        own_terms = {name: float(term) if math.isfinite(term) else None for name, term in found.pop("terms").items()}
        for name, value in found.items():
            if np.ndim(value):
                by_source[name] = np.asarray(value)
            else:
                metrics[name] = float(value)
        seconds = time.perf_counter() - self._last_report
        self._last_report += seconds  # and not the time now: what follows belongs to the next step
        is_finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        if not is_finite:
            self._skip(step, metrics)
        # the metrics are the same on every process, so all raise above or none; the main one writes them
        if self._log_file is None:
            return

        # of the step that ended, whose phase may not be that of the next one
        scales = self._step_at(step.number - 1).scales
        flops = self._objective.count_flops(self._sizes, scales, metrics)
        flops_per_device = flops / (max(seconds, 1e-9) * self._mesh.size)
        # docs/training.md, "Metrics", explains the fields
        line = {
            "step": step.number,
            "loss": metrics["loss"] if is_finite else None,
            "grad_norm": metrics["grad_norm"] if is_finite else None,
            "skipped": int(not is_finite),
            "spike": int(self._is_spike(metrics["loss"])),
            "tokens": int(metrics["tokens"]),
            "target_tokens": int(metrics["target_tokens"]),
            "seconds": seconds,
            "data_wait": step.data_wait,
            "device_hours": seconds * self._mesh.size / 3600,
            "learning_rate": metrics["learning_rate"],
            "epochs": [round(epochs, 4) for epochs in step.epochs],
            **own_terms,
        }
        if by_source:
            line["sources"] = self._name_sources(by_source)
        self._log_file.log_step(line, flops_per_device, peak_flops(self._mesh.devices.flat[0]))

    def _is_spike(self, loss: float) -> bool:
        """Whether a loss stands out of those of the steps before, which it then is one of."""
        recent = np.array(self._recent_losses)
        if not math.isfinite(loss):
            return False
        self._recent_losses.append(loss)
        return len(recent) >= _SPIKE_STEPS // 5 and loss > recent.mean() + _SPIKE_DEVIATIONS * recent.std()

    def _name_sources(self, by_source: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """Loss and tokens of each file of rows of which there were any in the batch."""
        found = {}
        for i, path in enumerate(self._recipe.data.train):
            tokens = int(by_source["tokens_by_source"][i])
            if tokens:
                found[path] = {"loss": float(by_source["loss_by_source"][i]), "tokens": tokens}
        return found

    def _skip(self, step: _DispatchedStep, metrics: Mapping[str, float]) -> None:
        """Counts a step that is not finite, and has changed nothing if it may be skipped.

        Raises:
          TrainingError: if it may not.
        """
        error = self._not_finite(step, metrics)
        if self._recipe.on_nonfinite == "stop":
            raise error
        self._num_skipped += 1
        if self._num_skipped > self._recipe.max_skipped:
            raise TrainingError(f"{error}. {self._num_skipped} steps were skipped, over --max-skipped")
        self._log(f"skipped: {error}")

    def _not_finite(self, step: _DispatchedStep, metrics: Mapping[str, float]) -> TrainingError:
        rows = ", ".join(step.rows[:_MAX_NAMED_ROWS])
        if len(step.rows) > _MAX_NAMED_ROWS:
            rows += ", ..."
        return TrainingError(
            f"step {step.number}: the loss is {metrics['loss']}, the norm of the gradients is "
            f"{metrics['grad_norm']}. Its batch holds the rows {rows}. Nothing after step {self._saved_step} is "
            "saved; look at these rows, or lower optimizer.learning-rate"
        )

    def _evaluate(self) -> bool:
        """Takes the loss of the held-out rows, and answers; returns whether the loss is the least so far."""
        assert self._evaluation is not None
        started = time.perf_counter()
        found = self._evaluation.run(self._state)
        samples: list[Sample] = []
        if self._sample_request is not None:
            samples = self._objective.sample(self._state.averaged_params, self._sample_request)
        # of the steps, not of this
        self._last_report += time.perf_counter() - started
        loss = found["loss"]
        before = self._best
        if before is None or loss < before.loss:
            self._best = Best(self._number, loss)
        else:
            self._best = dataclasses.replace(before, since=before.since + 1)
        is_best = self._best.step == self._number
        self._checkpoints.best_step = self._best.step
        if self._log_file:
            self._log_file.log_evaluation({"step": self._number, **found})
            self._log_file.log_samples(self._number, samples)
            write_best(self._workdir, self._best)
        note = "the least so far" if is_best else f"the least was {self._best.loss:.4f} after step {self._best.step}"
        self._log(f"step {self._number}: held-out loss {loss:.4f}, {note}")
        return is_best

    def _runs_out_of_patience(self) -> bool:
        patience = self._recipe.eval.patience
        if not patience or self._best is None or self._best.since < patience:
            return False
        self._log(f"stops early: {patience} evaluations without a smaller held-out loss (eval.patience)")
        return True

    def _save(self) -> None:
        # every process knows where its own streams of rows are; a checkpoint has those of all
        streams: dict[str, Any] = {}
        data: Any = {}  # the settings of the data, equal in all
        for state in gather(self._data.get_state()):
            data = state["data"]
            streams |= state["streams"]
        position = {"data": data, "streams": streams}
        self._checkpoints.save(to_checkpoint(self._state, self._number, position, self._saved_components))
        self._saved_step = self._number
        # where checkpoints follow each other fast, the picture need not be drawn with each
        if self._log_file and time.monotonic() - self._last_drawn > _DRAW_EVERY:
            plot_loss(self._workdir)
            self._last_drawn = time.monotonic()

    def _finish(self) -> None:
        self._checkpoints.wait()
        # the main process completes a checkpoint; no other may end before, or the coordinator would end the run
        barrier("the last checkpoint")
        if self._log_file is None:
            return
        picture = plot_loss(self._workdir)
        drawn = f", the loss is drawn in {picture}" if picture else ""
        self._log(f"done; the model is {step_folder(self._workdir, self._number)}{drawn}")
        if self._best is not None:
            best = step_folder(self._workdir, self._best.step)
            self._log(f"the least held-out loss is {self._best.loss:.4f}, of {best}")

    def _log(self, text: str) -> None:
        if self._log_file:
            self._log_file.print(text)
        elif is_main_process():
            print(printable(text))
