"""The checkpoints of a training run.

::

    WORKDIR/model/                  what training does not change: config.json, the tokenizer, the voices, the Talker
                                    and Token2Wav of the checkpoint that the run began from
    WORKDIR/checkpoints/00001000/   a checkpoint like any other (checkpoint/store.py): it can be loaded and converted
                                    to PyTorch, and another run can begin from it
        params/thinker/             what is trained, and what is frozen
        moments/                    of the optimizer, an Orbax checkpoint like the parameters
        run.json                    the step, and where the data goes on

The arrays of ``model`` are hard links in every checkpoint, so they take their room once, and any folder may be moved
away or removed. Arrays are written while training goes on. A checkpoint has its name only when all of it is on the
disk; ``files.json`` then says how long each file must be, so that what is lost later is noticed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from omni_jax.checkpoint import store, voices
from omni_jax.checkpoint.convert import CONSTANTS_FILE, side_files
from omni_jax.checkpoint.store import ABOUT_FILE, FORMAT
from omni_jax.distributed import barrier, is_main_process
from omni_jax.errors import CheckpointError, ConfigError

CHECKPOINTS = "checkpoints"
MODEL = "model"
_RUN_FILE, _FILES_FILE, _MOMENTS = "run.json", "files.json", "moments"
_THINKER = Path("params") / "thinker"
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Saved:
    """A state as it is saved and restored: trees of arrays, and what is of JSON's types."""

    step: int
    params: Any
    moments: Any
    data: Mapping[str, Any]


def resolve(init: Path) -> Path:
    """The checkpoint that ``init`` means: itself, or the last whole one of a run's folder.

    Raises:
      CheckpointError: if it is a run's folder without any.
    """
    if not (init / CHECKPOINTS).is_dir():
        return init
    for folder in reversed(_folders(init / CHECKPOINTS)):
        if not damage(folder):
            return folder
    raise CheckpointError(f"{init} is the folder of a run without a whole checkpoint; let it run until it has one")


def _folders(parent: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if re.fullmatch(r"\d+", path.name))


def damage(folder: Path) -> str:
    """What is wrong with the files of a run's checkpoint; empty if nothing is."""
    try:
        files: dict[str, int] = json.loads((folder / _FILES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        return f"{_FILES_FILE} cannot be read ({e})"
    for name, size in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return ""


def start(workdir: Path, init: Path) -> None:
    """Makes ``WORKDIR/model`` from the checkpoint that a run begins from, unless it is there; one process does it.

    Raises:
      CheckpointError: if ``init`` is no checkpoint.
    """
    if (workdir / MODEL).exists():
        return
    parts = {name: kinds for name, kinds in store.components(init).items() if name != "thinker"}
    extra = [init / name for name in (CONSTANTS_FILE, voices.VOICES_FILE, voices.PUBLISHED_FILE)]
    with store.new_folder(workdir / MODEL) as unfinished:
        for file in [*side_files(init), *(path for path in extra if path.is_file())]:
            shutil.copyfile(file, unfinished / file.name)
        for name in parts:
            _link_all(init / "params" / name, unfinished / "params" / name)
        _write(unfinished / ABOUT_FILE, {"format": FORMAT, "components": parts})


def _link_all(source: Path, target: Path) -> None:
    """One more name for each file of a folder; a copy of it where the file system has no such thing."""
    for file in source.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, place)
            except OSError:
                shutil.copyfile(file, place)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


class RunFolder:
    """Saves and restores the states of a run. Of several processes, all call each method, in the same order."""

    def __init__(self, workdir: Path, keep: int) -> None:
        """``keep`` is how many of the latest states stay."""
        self._model, self._parent = workdir / MODEL, workdir / CHECKPOINTS
        self._keep = keep
        self._first = is_main_process()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        if self._first:
            self._parent.mkdir(parents=True, exist_ok=True)
            for left in self._parent.glob(f"{_PARTIAL}*"):  # by a run that was killed
                shutil.rmtree(left)
        barrier("the run's folder")

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, oldest first."""
        return [int(folder.name) for folder in _folders(self._parent)]

    def save(self, saved: Saved) -> None:
        """Begins to write a state, as soon as the one before is written. The arrays may be changed when it returns.

        Raises:
          CheckpointError: if the one before could not be written.
        """
        self.wait()
        name = f"{saved.step:08d}"
        partial, folder = self._parent / f"{_PARTIAL}{name}", self._parent / name
        if self._first:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)  # what is left of it was found to be damaged
            (partial / _THINKER).parent.mkdir(parents=True)
        barrier(f"checkpoint {name}")
        waits = [store.save_tree(partial / _THINKER, saved.params), store.save_tree(partial / _MOMENTS, saved.moments)]
        kinds = sorted({str(np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(saved.params)})

        def finish() -> None:
            try:
                for wait in waits:
                    wait()
                if self._first:
                    self._complete(partial, folder, kinds, saved)
            except BaseException as e:  # told by the next call, in the thread that can do something about it
                self._failure = e

        self._thread = threading.Thread(target=finish, name=f"checkpoint {name}")
        self._thread.start()

    def _complete(self, partial: Path, folder: Path, kinds: list[str], saved: Saved) -> None:
        """Puts the other files to the arrays, gives the checkpoint its name, and removes those that are too old."""
        for file in self._model.iterdir():
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
        _link_all(self._model / "params", partial / "params")
        _write(
            partial / ABOUT_FILE, {"format": FORMAT, "components": {"thinker": kinds, **store.components(self._model)}}
        )
        _write(partial / _RUN_FILE, {"step": saved.step, "data": saved.data})
        files = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
        _write(partial / _FILES_FILE, files)
        os.sync()
        partial.rename(folder)
        for old in _folders(self._parent)[: -self._keep]:
            # its name first, so that a kill leaves nothing that looks like a checkpoint
            shutil.rmtree(old.rename(self._parent / f"{_PARTIAL}{old.name}"))

    def wait(self) -> None:
        """Waits until what was started is written.

        Raises:
          CheckpointError: if it could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise CheckpointError(f"a checkpoint in {self._parent} could not be written: {failure}") from failure

    def restore(self, target: Callable[[int, Mapping[str, Any]], Saved], say: Callable[[str], None]) -> Saved | None:
        """The latest state that is whole; None if there is no checkpoint.

        Args:
          target: from a step and the dtypes of the Thinker's parameters by path, the abstract arrays to restore into.
          say: is told of each checkpoint that is damaged and passed over.

        Raises:
          CheckpointError: if there are checkpoints and all are damaged.
          ConfigError: if the run trained other parameters.
        """
        folders = _folders(self._parent)
        for folder in reversed(folders):
            try:
                return self._read(folder, target)
            except CheckpointError as e:
                say(f"checkpoint {folder} is damaged and not used: {e}")
        if folders:
            raise CheckpointError(
                f"all checkpoints in {self._parent} are damaged; remove that folder to begin from the start"
            )
        return None

    def _read(self, folder: Path, target: Callable[[int, Mapping[str, Any]], Saved]) -> Saved:
        if trouble := damage(folder):
            raise CheckpointError(trouble)
        about = json.loads((folder / _RUN_FILE).read_text(encoding="utf-8"))
        wish = target(about["step"], dtypes(folder))
        trained, wanted = (set(flatten_dict(t["mu"])) for t in (store.tree_shapes(folder / _MOMENTS), wish.moments))
        if trained != wanted:
            raise ConfigError(
                f"{folder} is of a run that trains other parameters ({len(trained)}, not {len(wanted)}); go on with "
                "the same recipe, or begin a new run from it: another --workdir, and --init with this one"
            )
        params = store.load_tree(folder / _THINKER, wish.params)
        moments = store.load_tree(folder / _MOMENTS, wish.moments)
        return dataclasses.replace(wish, params=params, moments=moments, data=about["data"])


def dtypes(folder: Path) -> dict[str, np.dtype]:
    """Of the parameters of a checkpoint's Thinker, by path.

    Raises:
      CheckpointError: if it has none, or not the one that its config.json describes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(store.abstract(folder, ["thinker"])["thinker"])
    return {"/".join(key.key for key in path): np.dtype(leaf.dtype) for path, leaf in leaves}
