"""The checkpoints of a training run: the steps of an Orbax ``Checkpointer``, each of them a model that can be loaded.

::

    WORKDIR/model/                  what training does not change: config.json, the tokenizer, the voices, and the
                                    components of which nothing trains, as they were where the run began
    WORKDIR/checkpoints/00001000/   a checkpoint like any other (checkpoint/store.py): it can be loaded and converted
                                    to PyTorch, and another run can begin from it
        params/<component>/         the parameters, trained and frozen
        optimizer/moments/          count and both moments of Adam
        run.json                    the step, and where the data goes on
        files.json                  the length of every file

Orbax (``orbax.checkpoint.v1.training.Checkpointer``) numbers the steps, writes them while training goes on, gives a
step its name when all of it is written, keeps the latest and removes what a killed run left unfinished. What it cannot:

* It sees that a step was committed, not that a file was lost or cut short afterwards: its list of checkpoints breaks
  where metadata is missing. So ``files.json`` is checked first, and Orbax is shown only steps that are whole.
* It loads checkpointables only from the top of a step, but a model has its parameters in ``params/<component>``. So
  each tree is saved under the path that ``store`` reads, and read by ``store``.
* It keeps the state of a grain iterator in a file for each process, which another number of processes cannot read. So
  the states of all processes are gathered into ``run.json``.

The files of ``model`` are put into a step before it has its name; arrays are hard links, so they take their room once,
and any folder may be moved or removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

from omni_jax.checkpoint import store, voices
from omni_jax.checkpoint.array_files import check_arrays
from omni_jax.checkpoint.model_files import CONSTANTS_FILE, TOKEN2WAV_FILE, side_files
from omni_jax.checkpoint.store import ABOUT_FILE, FORMAT
from omni_jax.distributed import barrier, is_main_process
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.plain_files import copy_file, has_file, link_folder, read_object, resolve_file

CHECKPOINTS_FOLDER = "checkpoints"
MODEL_FOLDER = "model"
RUN_FILE = "run.json"
FILES_FILE = "files.json"
# two folders deep: a folder right below a step Orbax takes for a checkpointable, and not for a checkpoint to load
_MOMENTS = Path("optimizer") / "moments"
# Several processes wait for each other at barriers that Orbax names after the last part of a tree's path, and two trees
# of one name would wait at one barrier. So each component's tree has its name; ``store`` reads a single tree of any.
_MOMENTS_TREE = "moments"
_STEP_DIGITS = 8
# Orbax writes these when it commits, after ``files.json``
_COMMIT_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")
REFERENCE_FILE = "reference.json"  # of a training on preferences: the fingerprint of what it began from
# what a checkpoint has for the sake of its run alone
RUN_FILES = (RUN_FILE, FILES_FILE, REFERENCE_FILE, *_COMMIT_FILES)


@dataclass(frozen=True)
class TrainCheckpoint:
    """What a checkpoint holds.

    Attributes:
      step: steps of the run that came before.
      params: a tree of parameters for each component of which something trains.
      moments: of the optimizer: ``count``, and trees with the paths of the part of ``params`` that trains.
      data: where the data goes on, of JSON's types.
    """

    step: int
    params: Any
    moments: Any
    data: Mapping[str, Any]


# from a step and the dtypes of the parameters by path, the abstract arrays to restore into
MakeTarget = Callable[[int, Mapping[str, np.dtype]], TrainCheckpoint]


def step_folder(workdir: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return workdir / CHECKPOINTS_FOLDER / f"{step:0{_STEP_DIGITS}d}"


def resolve_checkpoint(init: Path) -> Path:
    """The checkpoint that ``init`` means: itself, or the latest of a run's folder that is whole.

    Raises:
      CheckpointError: if it is a run's folder without any.
    """
    if not (init / CHECKPOINTS_FOLDER).is_dir():
        return init
    # the latest may have been damaged since it was written
    for folder in reversed(_list_steps(init / CHECKPOINTS_FOLDER)):
        if not find_damage(folder):
            return folder
    raise CheckpointError(f"{init} is the folder of a run without a whole checkpoint; let it run until it has one")


def find_damage(folder: Path) -> str:
    """What is wrong with the files of a run's checkpoint; empty if nothing is."""
    try:
        sizes = read_object(folder / FILES_FILE)
    except CheckpointError as e:
        return f"{FILES_FILE} cannot be read ({e})"
    # lengths alone, which take no time; contents that cannot be decoded show when they are loaded
    for name, size in sizes.items():
        try:
            found = resolve_file(folder / name, folder).stat().st_size
        except (OSError, ValueError):  # ValueError: a null character, or what is outside of the folder
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return ""


def prepare_model(
    workdir: Path, init: Path, trained: Sequence[str], extra_files: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Makes ``WORKDIR/model`` from the checkpoint that a run begins from, unless it is there; one process does it.

    Args:
      workdir: the run's folder.
      init: the checkpoint.
      trained: components of which something trains; each checkpoint of the run has its own.
      extra_files: texts of further files that each checkpoint of the run has, by name.

    Raises:
      CheckpointError: if ``init`` is no checkpoint.
    """
    if (workdir / MODEL_FOLDER).exists():
        return
    components = store.components(init)
    for name in trained:
        components.pop(name, None)
    files = side_files(init)
    # of what was trained beside the published model, NAME.json says what it is like
    descriptions = [f"{name}.json" for name in store.UNPUBLISHED]
    for name in (CONSTANTS_FILE, TOKEN2WAV_FILE, voices.VOICES_FILE, voices.PUBLISHED_FILE, *descriptions):
        if has_file(init / name):
            files.append(init / name)
    with store.new_folder(workdir / MODEL_FOLDER) as unfinished:
        for file in files:
            copy_file(file, unfinished / file.name)
        for name, text in extra_files.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        for name in components:
            link_folder(init / "params" / name, unfinished / "params" / name, init)
        _write_json(unfinished / ABOUT_FILE, {"format": FORMAT, "components": components})


def read_dtypes(folder: Path, components: Sequence[str]) -> dict[str, np.dtype]:
    """Dtypes of the parameters of a checkpoint's components, by path.

    Raises:
      CheckpointError: if it lacks one, or has another than its config.json describes.
    """
    leaves: dict[str, Any] = flatten_dict(store.abstract(folder, components), sep="/")
    return {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()}


class TrainCheckpoints:
    """Saves and restores the states of a run. Of several processes, all call each method, in the same order.

    Call ``restore`` before the first ``save``.
    """

    def __init__(self, workdir: Path, components: Sequence[str], keep: int) -> None:
        """Opens the folder of a run.

        Args:
          workdir: the run's folder, which ``prepare_model`` has been called for.
          components: that the run reads, whether they train or not.
          keep: how many of the latest checkpoints stay.
        """
        self._workdir = workdir
        self._components = tuple(components)
        self._keep = keep
        self._parent = workdir / CHECKPOINTS_FOLDER
        self.best_step: int | None = None  # of a checkpoint that stays, however old it is
        self._checkpointer: ocp.training.Checkpointer | None = None
        self._saving: TrainCheckpoint | None = None  # what Orbax is writing in the background
        # what stays open as long as the checkpointer does
        self._open_contexts = contextlib.ExitStack()

    def restore(self, make_target: MakeTarget, log: Callable[[str], None]) -> TrainCheckpoint | None:
        """The latest checkpoint that is whole; None if there is none.

        Later ones, which are damaged, are removed: the run makes them again.

        Args:
          make_target: gives the arrays to restore into.
          log: is told of each checkpoint that is damaged.

        Raises:
          CheckpointError: if there are checkpoints and all are damaged.
          ConfigError: if the run trained other parameters.
        """
        # the latest that can be read. A ConfigError is no damage: it ends the run, and nothing is removed.
        folders = _list_steps(self._parent)
        restored = None
        for folder in reversed(folders):
            try:
                restored = self._read(folder, make_target)
                break
            except CheckpointError as e:
                log(f"checkpoint {folder} is damaged and not used: {e}")
        if folders and restored is None:
            raise CheckpointError(
                f"all checkpoints in {self._parent} are damaged; remove that folder to begin from the start"
            )

        barrier("restored")  # nobody may still read what is removed next
        if restored is not None and is_main_process():
            for folder in folders:
                # an earlier one is incomplete where a kill came while it was being removed
                if int(folder.name) > restored.step or find_damage(folder):
                    shutil.rmtree(folder)
        # Orbax lists the steps when it opens the folder; every process must find the same ones, and whole ones alone
        barrier("removed damaged checkpoints")
        self._checkpointer = self._make_checkpointer()
        return restored

    def save(self, state: TrainCheckpoint) -> None:
        """Begins to write a state, after the one before is written. The arrays may be changed when it returns.

        Raises:
          CheckpointError: if the one before could not be written, or there is one of this step.
        """
        assert self._checkpointer is not None, "restore comes first"
        self.wait()
        # before Orbax begins: its thread calls ``_complete``, which reads this
        self._saving = state
        trees = {f"{_MOMENTS}/{_MOMENTS_TREE}": state.moments}
        for name, params in state.params.items():
            trees[f"params/{name}/{name}"] = params
        try:
            # ``force`` ignores Orbax's own policy of when to save; it does not write over a step that is there
            self._checkpointer.save_checkpointables_async(state.step, trees, force=True)
        except Exception as e:  # Orbax has no one kind of error for a disk that is full or a path that is taken
            raise self._failure(e) from e

    def wait(self) -> None:
        """Waits until what was started is written.

        Raises:
          CheckpointError: if it could not be.
        """
        if self._checkpointer is None:
            return
        try:
            self._checkpointer.wait()
        except Exception as e:  # as above
            raise self._failure(e) from e

    def close(self) -> None:
        """Waits for what was started and ends the threads that write; an error of theirs is not told any more."""
        if self._checkpointer is not None:
            with contextlib.suppress(Exception):
                self._checkpointer.close()
        self._open_contexts.close()

    def _failure(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"a checkpoint in {self._parent} could not be written: {error}")

    def _make_checkpointer(self) -> ocp.training.Checkpointer:
        context = store.write_context()
        # called when all arrays are written, before the folder gets the name of its step. A function and not the
        # method: Orbax copies its context deeply, and would copy the object of a method with it
        context.asynchronous.post_finalization_callback = lambda: self._complete()
        # for as long as it is open: it logs from its threads too
        self._open_contexts.enter_context(store.quiet_orbax())
        preservation: Any = _KeepLatestAndBest(self)
        directory: Any = self._parent.absolute()
        return ocp.training.Checkpointer(
            directory,
            context=context,
            preservation_policy=preservation,
            step_name_format=ocp.path.step.standard_name_format(step_format_fixed_length=_STEP_DIGITS),
            cleanup_tmp_directories=True,
        )

    def keeps(self, steps: Sequence[int]) -> list[bool]:
        """Which of the checkpoints of these steps, oldest first, stay."""
        kept = set(steps[-self._keep :])
        return [step in kept or step == self.best_step for step in steps]

    def _complete(self) -> None:
        """Puts the other files of a model, ``run.json`` and ``files.json`` beside the arrays."""
        state = self._saving
        if state is None or not is_main_process():
            return
        model = self._workdir / MODEL_FOLDER
        # Orbax writes into a folder of this name with an ending, which it takes off when the step is complete
        (unfinished,) = self._parent.glob(f"{step_folder(self._workdir, state.step).name}.*")
        for file in model.iterdir():
            if file.is_file():
                copy_file(file, unfinished / file.name)
        link_folder(model / "params", unfinished / "params", model)

        # of the arrays only dtypes are read: the step after may have taken their memory already
        components = store.components(model)
        for name, params in state.params.items():
            components[name] = sorted({str(np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(params)})
        _write_json(unfinished / ABOUT_FILE, {"format": FORMAT, "components": components})
        _write_json(unfinished / RUN_FILE, {"step": state.step, "data": state.data})

        # last, because it has the length of everything else
        sizes = {}
        for file in sorted(unfinished.rglob("*")):
            name = str(file.relative_to(unfinished))
            if file.is_file() and name not in _COMMIT_FILES:
                sizes[name] = file.stat().st_size
        _write_json(unfinished / FILES_FILE, sizes)
        os.sync()  # a machine that loses its power after the name is given must have the numbers too
        self._saving = None

    def _read(self, folder: Path, make_target: MakeTarget) -> TrainCheckpoint:
        """The checkpoint in a folder; a CheckpointError says that another is to be tried."""
        # what can be checked without an array comes first
        if damage := find_damage(folder):
            raise CheckpointError(damage)
        try:
            about = read_object(folder / RUN_FILE)
            step = int(about["step"])
            data = dict(about["data"])
        except (ValueError, KeyError, TypeError, OverflowError) as e:  # OverflowError: of Infinity
            raise CheckpointError(f"{RUN_FILE} cannot be read ({e!r})") from e

        # moments are kept for what trains, so their paths say what the run has trained
        target = make_target(step, read_dtypes(folder, self._components))
        check_arrays(folder / _MOMENTS, folder)
        saved_moments = store.tree_shapes(folder / _MOMENTS, _MOMENTS_TREE)
        if set(saved_moments) != set(target.moments):
            raise ConfigError(
                f"{folder} is of a run with another optimizer (--optimizer.kind, --optimizer.ema): it has "
                f"{', '.join(saved_moments)}, and {', '.join(target.moments)} are needed; go on with the same one, or "
                "begin a new run from it"
            )
        # each of the trees has the paths of what trains
        first = next(name for name in target.moments if name != "count")
        saved_paths = set(flatten_dict(saved_moments[first]))
        target_paths = set(flatten_dict(target.moments[first]))
        if saved_paths != target_paths:
            raise ConfigError(
                f"{folder} is of a run that trains other parameters ({len(saved_paths)}, not {len(target_paths)}); "
                "go on with the same recipe, or begin a new run from it: another --workdir, and --init with this one"
            )
        params = {}
        for name, tree in target.params.items():
            params[name] = store.load_tree(folder / "params" / name, tree)
        moments = store.load_tree(folder / _MOMENTS, target.moments, _MOMENTS_TREE)
        return dataclasses.replace(target, params=params, moments=moments, data=data)


class _KeepLatestAndBest:
    """Orbax asks it which checkpoints stay."""

    def __init__(self, checkpoints: TrainCheckpoints) -> None:
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return self._checkpoints.keeps([checkpoint.step for checkpoint in checkpoints])


def _list_steps(parent: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    if not parent.is_dir():
        return []
    folders = []
    for path in parent.iterdir():
        # what Orbax has not completed has an ending after the number
        if re.fullmatch(r"\d+", path.name):
            folders.append(path)
    return sorted(folders)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
