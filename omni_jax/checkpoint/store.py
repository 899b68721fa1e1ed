"""Our own checkpoints: a folder with the parameters as Orbax keeps them, beside the files that came with the model.

::

    FOLDER/omni_jax.json            the version of this layout, and which components are here, in which dtypes
    FOLDER/params/thinker/          one Orbax checkpoint (a pytree) for each component
    FOLDER/config.json, tokenizer.json, preprocessor_config.json, chat_template.json, ...   as they came
    FOLDER/voices.npz               the voices (checkpoint/voices.py), where Talker or Token2Wav are here
    FOLDER/constants.safetensors    tensors of the published files that are no parameters, kept for the way back

Orbax is used here and nowhere else for parameters. Each component is one ordinary Orbax checkpoint, which Orbax
restores straight into sharded arrays. Writing one is less direct: Orbax wants every array whole, and holds what it has
compressed until the disk has taken it, up to twice an array again. So it is handed arrays that repeat a single zero,
which take no memory, and lays out the checkpoint; then the numbers are put into its arrays block by block with
tensorstore, which is what Orbax keeps arrays with. For that each array is a Zarr folder of its own and not a part of
Orbax's usual single file. Large arrays are cut into chunks of at most 64 MiB, stacked layers apart, so that a host that
needs a part of an array later reads little more than that part.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from omni_jax.checkpoint.name_map import differences, table
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, ConfigError

ABOUT_FILE = "omni_jax.json"
FORMAT = 1

# what is written at a time: few chunks, and these so large that the C library gives their memory back at once
_CHUNK_BYTES = 64 * 2**20
_BLOCK_BYTES = 64 * 2**20
# Orbax looks for the file format that it writes by default and says that it is not there
_NOISE = (
    "TensorStore data files not found",
    "Skipping merge of OCDBT",
    "Metadata file does not exist",
    "Waiting for previous save to complete",
)


@dataclass(frozen=True)
class Leaf:
    """An array that is to be written.

    Attributes:
      path: where it stands in the tree, the component first.
      shape: of the whole array.
      dtype: what it is written in.
      stacked: whether ``pieces`` gives ``array[0]``, ``array[1]``, ...; otherwise it gives the whole array once.
      pieces: called once, when the leaf's turn comes. Each piece is let go of before the next is asked for.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save(folder: Path, leaves: Sequence[Leaf], beside: Callable[[Path], None] = lambda unfinished: None) -> None:
    """Writes a checkpoint, from one process alone.

    Args:
      folder: a path where nothing is yet; its parent is made if need be.
      leaves: the parameters.
      beside: called with the unfinished folder, to put files into it.

    Raises:
      CheckpointError: if ``folder`` exists.
    """
    with new_folder(folder) as unfinished:
        beside(unfinished)
        parts: dict[str, list[Leaf]] = {}
        for leaf in leaves:
            parts.setdefault(leaf.path[0], []).append(leaf)
        for component, part in parts.items():
            _write_component((unfinished / "params" / component).absolute(), part)
        about = {name: sorted({str(leaf.dtype) for leaf in part}) for name, part in parts.items()}
        text = json.dumps({"format": FORMAT, "components": about}, indent=2)
        (unfinished / ABOUT_FILE).write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written; after a failure nothing is left.

    Raises:
      CheckpointError: if something stands at ``folder``.
    """
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        os.sync()
        partial.rename(folder)
    finally:  # gone already where all went well
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(folder: Path) -> None:
    """Raises CheckpointError if something stands at ``folder``."""
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; give a new folder, or remove it first")


def _write_component(folder: Path, leaves: Sequence[Leaf]) -> None:
    zeros = {leaf.path[1:]: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for leaf in leaves}
    with _layout({leaf.path[1:] for leaf in leaves if leaf.stacked}), quiet_orbax():
        ocp.save(str(folder), unflatten_dict(zeros))
    for leaf in leaves:
        store = _open(folder, leaf.path[1:])
        chunk: Any = store.chunk_layout.write_chunk.shape
        for where, block in _blocks(leaf, chunk):
            store[where].write(block).result()


def _open(component: Path, path: Sequence[str], cache_bytes: int = 0) -> ts.TensorStore:
    """One array of a component, as Orbax keeps it; so many bytes of it, once read, are kept unpacked."""
    (array,) = component.glob(f"*/{'.'.join(path)}/zarr.json")
    spec = {
        "driver": "zarr3",
        # not waiting for the disk file by file: all of them are waited for together before the folder gets its name
        "kvstore": {"driver": "file", "path": str(array.parent), "file_io_sync": False},
        # by itself it leaves chunks of zeros out and takes any that are missing for zeros, where Orbax sees damage
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        "context": {"cache_pool": {"total_bytes_limit": cache_bytes}},
    }
    return ts.open(spec, open=True).result()


def _layout(stacked: set[tuple[str, ...]]) -> ocp.Context:
    """How Orbax is to lay out arrays; large ones at the paths ``stacked`` are cut along their first axis first."""
    options = ocp.options.ArrayOptions.Saving.StorageOptions

    def per_leaf(key: Any, value: Any) -> Any:
        by_layer = value.nbytes > _CHUNK_BYTES and tuple(part.key for part in key) in stacked
        return options(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,)) if by_layer else None

    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.storage_options = options(chunk_byte_size=_CHUNK_BYTES)
    context.array.saving.scoped_storage_options_creator = per_leaf
    context.memory.deepcopy_host_arrays = False
    return context


def _blocks(leaf: Leaf, chunk: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The array in runs of whole chunks along one axis: where a run lies, and the run in the dtype to be written."""
    # along the axis with most chunks; a stack's pieces come along the first
    axis = 0 if leaf.stacked else max(range(len(chunk)), key=lambda a: leaf.shape[a] // chunk[a])
    length = chunk[axis] * max(1, _BLOCK_BYTES * leaf.shape[axis] // (leaf.nbytes * chunk[axis]))
    before = (slice(None),) * axis
    pieces = leaf.pieces()
    whole = None if leaf.stacked else next(pieces)
    for start in range(0, leaf.shape[axis], length):
        where = (*before, slice(start, min(start + length, leaf.shape[axis])))
        if whole is not None:
            yield where, np.array(whole[where], leaf.dtype, order="C")
            continue
        block = np.empty((where[0].stop - start, *leaf.shape[1:]), leaf.dtype)
        for i in range(len(block)):
            block[i] = next(pieces)
        yield where, block


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps back what Orbax says of files that it looks for and does not need."""
    loggers = (logging.getLogger("absl"), logging.getLogger())  # it logs by either

    def wanted(record: logging.LogRecord) -> bool:
        return not any(noise in record.getMessage() for noise in _NOISE)

    for logger in loggers:
        logger.addFilter(wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)


def components(folder: Path) -> dict[str, list[str]]:
    """The components of a checkpoint, and the dtypes in each.

    Raises:
      CheckpointError: if ``folder`` is no checkpoint of ours, or one of another version.
    """
    try:
        about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        version, parts = about["format"], dict(about["components"])
    except OSError as e:
        raise CheckpointError(
            f"{folder} is no checkpoint of omni_jax: cannot read {ABOUT_FILE} ({e.strerror}). "
            "tools/convert.py to-jax makes one from a PyTorch folder"
        ) from e
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{folder / ABOUT_FILE} is damaged ({e}); convert the checkpoint again") from e
    if version != FORMAT:
        raise CheckpointError(f"{folder} is of format {version}; this release reads {FORMAT}; convert it again")
    return parts


def abstract(folder: Path, wanted: Sequence[str] | None = None, dtype: DTypeLike | None = None) -> dict[str, Any]:
    """Shapes and dtypes of the parameters, without their numbers.

    Args:
      folder: the checkpoint.
      wanted: which components; without it, all that are there.
      dtype: what the Thinker and the Talker are to be cast to. Token2Wav keeps its own: it needs float32.

    Returns:
      component -> tree of jax.ShapeDtypeStruct.

    Raises:
      CheckpointError: if a component or a part of one is missing, or does not fit config.json.
    """
    here = components(folder)
    wanted = tuple(here) if wanted is None else tuple(wanted)
    if absent := [name for name in wanted if name not in here]:
        raise CheckpointError(f"{folder} has no {', '.join(absent)}; it has {', '.join(here)}")
    try:
        config = OmniConfig.load(folder)
    except ConfigError as e:
        raise CheckpointError(f"{folder} is not whole: {e}") from e
    return {name: _abstract_component(folder, config, name, dtype) for name in wanted}


def _abstract_component(folder: Path, config: OmniConfig, component: str, dtype: DTypeLike | None) -> dict[str, Any]:
    path = str((folder / "params" / component).absolute())
    found: dict[str, Any] = flatten_dict(tree_shapes(Path(path)), sep="/")
    expected = {"/".join(e.path[1:]): e.leaf_shape for e in table(config, [component])}
    if trouble := differences(expected, {name: tuple(leaf.shape) for name, leaf in found.items()}):
        raise CheckpointError(f"{path} does not hold the {component} that config.json describes:{trouble}")
    keeps = component == "token2wav" or dtype is None
    leaves = {k: jax.ShapeDtypeStruct(v.shape, v.dtype if keeps else dtype) for k, v in found.items()}
    return unflatten_dict(leaves, sep="/")


def load(
    folder: Path,
    wanted: Sequence[str] | None = None,
    *,
    dtype: DTypeLike | None = None,
    shardings: Mapping[str, Any] | jax.sharding.Sharding | None = None,
) -> dict[str, Any]:
    """The parameters, as arrays on the devices.

    Args:
      folder: the checkpoint.
      wanted: which components; without it, all that are there.
      dtype: what the Thinker and the Talker are cast to; Token2Wav keeps its own.
      shardings: component -> tree of shardings like the tree of parameters, or one sharding for all of its arrays;
        or one for everything. Each host reads only what its devices hold. Without it, all goes to the first device.

    Returns:
      component -> tree of jax.Array.

    Raises:
      CheckpointError: as ``abstract``, and if numbers are missing.
    """
    trees = abstract(folder, wanted, dtype)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = dict.fromkeys(trees, shardings)
    params = {}
    for name, tree in trees.items():
        wish = shardings[name]
        places = jax.tree.map(lambda _, s=wish: s, tree) if isinstance(wish, jax.sharding.Sharding) else wish
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)
        params[name] = load_tree(folder / "params" / name, target)
    return params


def tree_shapes(path: Path) -> dict[str, Any]:
    """Shapes and dtypes of one Orbax checkpoint, a component or a part of a training state.

    Raises:
      CheckpointError: if it is missing or damaged.
    """
    try:
        with quiet_orbax():
            stored: Any = ocp.metadata(str(path.absolute())).metadata
    except Exception as e:  # Orbax has no one kind of error for a folder that is missing or damaged
        raise CheckpointError(f"{path} is missing or damaged ({_first_line(e)}); convert the checkpoint again") from e
    if not isinstance(stored, dict):  # what it gives for a folder whose arrays are not all there
        raise CheckpointError(f"{path} is damaged: the files of some parameter are missing; convert it again")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)


def load_tree(path: Path, target: Any) -> Any:
    """One Orbax checkpoint, cast and laid out as the abstract arrays of ``target`` say.

    Raises:
      CheckpointError: if numbers are missing or damaged.
    """
    try:
        with quiet_orbax():
            return ocp.load(str(path.absolute()), target)
    except Exception as e:  # as above
        raise CheckpointError(f"cannot read the parameters in {path}: {_first_line(e.__cause__ or e)}") from e


def write_context() -> ocp.Context:
    """How an Orbax ``Checkpointer`` is to lay out arrays, so that ``load_tree`` reads them."""
    return _layout(set())


def open_leaf(folder: Path, path: Sequence[str]) -> Callable[[int | None], np.ndarray]:
    """One array of a checkpoint, to be read layer by layer; the checkpoint is one that ``abstract`` found whole.

    Args:
      folder: the checkpoint.
      path: where the array stands in the tree, the component first.

    Returns:
      a function that reads the layer it is given, or all of the array for None.

    Raises:
      CheckpointError: from that function, if numbers are missing or damaged.
    """
    where = (folder / "params" / path[0]).absolute(), path[1:]
    store = _open(*where)
    # layers share chunks, which are not to be unpacked for each of them anew: small layers, and those that a run of
    # training has written from devices that each hold a part of all
    layers: int = store.chunk_layout.read_chunk.shape[0] if store.shape else 1  # type: ignore[index]
    slab = store.size * store.dtype.numpy_dtype.itemsize * layers // max(store.shape[0], 1) if store.shape else 0
    store = _open(*where, cache_bytes=2 * _CHUNK_BYTES + slab)

    def read(layer: int | None) -> np.ndarray:
        try:
            part: Any = store if layer is None else store[layer]
            return np.asarray(part.read().result())
        except Exception as e:  # tensorstore has no one kind of error for a file that is missing or damaged
            where = f"{'/'.join(path)} in {folder / 'params'}"
            raise CheckpointError(f"cannot read {where}: {_first_line(e)}; convert the checkpoint again") from e

    return read


def _first_line(error: BaseException) -> str:
    """Orbax and tensorstore go on with pages of settings."""
    return next(iter(str(error).splitlines()), type(error).__name__)
