"""Our own checkpoints: a folder with the parameters as Orbax keeps them, beside the files that came with the model.

::

    FOLDER/omni_jax.json            the version of this layout, and which components are here, in which dtypes
    FOLDER/params/thinker/          one Orbax checkpoint (a pytree) for each component
    FOLDER/params/lora/             another one and lora.json, where there is an adapter (checkpoint/lora.py)
    FOLDER/params/speech_tokenizer/ others, of what was trained beside the published model (``UNPUBLISHED``)
    FOLDER/config.json, tokenizer.json, preprocessor_config.json, chat_template.json, ...   as they came
    FOLDER/voices.npz               the voices (checkpoint/voices.py), where Talker or Token2Wav are here
    FOLDER/constants.safetensors    tensors of the published files that are no parameters, kept for the way back

Orbax is used here and nowhere else for parameters. Each component is one ordinary Orbax checkpoint, which Orbax
restores straight into sharded arrays. Writing one is less direct: Orbax wants every array whole, and holds what it has
compressed until the disk has taken it, up to twice an array again. So it is handed arrays that repeat a single zero,
which take no memory, and lays out the checkpoint; then the values are written into its arrays block by block with
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

from omni_jax.checkpoint.array_files import check_arrays
from omni_jax.checkpoint.lora import LORA, LoRAConfig, adapter_shapes
from omni_jax.checkpoint.name_map import COMPONENTS, describe_differences, make_name_table
from omni_jax.checks import shown
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.plain_files import has_file, read_object, unfinished_name

ABOUT_FILE = "omni_jax.json"
FORMAT = 1  # of the folder's layout; another one is refused and not guessed at

# what training makes beside the published model; no config.json describes their shapes
UNPUBLISHED = ("speech_tokenizer", "discriminators", "speaker_verifier")
_KNOWN = (*COMPONENTS, LORA, *UNPUBLISHED)
_DTYPES = ("bfloat16", "float16", "float32")  # that parameters may have
# what is written at a time: few chunks, and these so large that the C library returns their memory at once
_CHUNK_BYTES = 64 * 2**20
_BLOCK_BYTES = 64 * 2**20
# Orbax looks for the file format that it writes by default and says that it is not there
_EXPECTED_MESSAGES = (
    "TensorStore data files not found",
    "Skipping merge of OCDBT",
    "Metadata file does not exist",
    "Waiting for previous save to complete",
    # a tree that a training run has saved beside others; it is read as the tree that it is
    "Failed to resolve handler for checkpointable",
)


@dataclass(frozen=True)
class Leaf:
    """An array that is to be written.

    Attributes:
      path: where it stands in the tree, the component first.
      shape: of the whole array.
      dtype: what it is written in.
      stacked: whether ``read`` gives the layers ``array[0]``, ``array[1]``, ...; otherwise it gives all of it once.
      read: called once, when the leaf's turn comes. Each layer is released before the next is read.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    read: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save(folder: Path, leaves: Sequence[Leaf], write_beside: Callable[[Path], None] = lambda folder: None) -> None:
    """Writes a checkpoint, from one process alone.

    Args:
      folder: a path where nothing is yet; its parent is made if need be.
      leaves: the parameters.
      write_beside: called with the unfinished folder, to write other files into it.

    Raises:
      CheckpointError: if ``folder`` exists.
    """
    with new_folder(folder) as unfinished:
        # first, because small files take no time and may turn out to be wrong
        write_beside(unfinished)

        # one Orbax checkpoint for each component, so that one can be read without the others
        leaves_of: dict[str, list[Leaf]] = {}
        for leaf in leaves:
            leaves_of.setdefault(leaf.path[0], []).append(leaf)
        dtypes_of: dict[str, list[str]] = {}
        for component, component_leaves in leaves_of.items():
            _write_component(unfinished / "params" / component, component_leaves)
            dtypes_of[component] = sorted({str(leaf.dtype) for leaf in component_leaves})

        text = json.dumps({"format": FORMAT, "components": dtypes_of}, indent=2)
        (unfinished / ABOUT_FILE).write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written; after a failure nothing remains of it.

    Args:
      folder: where to; the path may lead through links and parents (``..``), as may every path of this module.

    Raises:
      CheckpointError: if something stands at ``folder``.
    """
    refuse_existing(folder)
    folder = folder.resolve()  # Orbax refuses a path with ".." in it
    # beside the folder: only within one file system is a rename a single step
    partial = unfinished_name(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as e:
        raise CheckpointError(f"cannot make {folder}: {e.strerror or e}") from e
    try:
        yield partial
        # all of it on the disk before the name: after a power failure the name alone might have been kept
        os.sync()
        refuse_existing(folder)  # a rename would take the place of an empty folder that has been made meanwhile
        partial.rename(folder)
    finally:  # gone already where all went well
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(folder: Path) -> None:
    """Checks a folder that is to be made.

    Raises:
      CheckpointError: if something stands at ``folder``.
    """
    if folder.exists() or folder.is_symlink():  # a link that leads nowhere, too
        raise CheckpointError(f"{folder} exists already; give a new folder, or remove it first")


def _write_component(folder: Path, leaves: Sequence[Leaf]) -> None:
    # Orbax lays out the checkpoint with arrays that repeat one zero: of full shape, but without memory of their own
    zeros: dict[tuple[str, ...], np.ndarray] = {}
    stacked: set[tuple[str, ...]] = set()
    for leaf in leaves:
        path = leaf.path[1:]
        zeros[path] = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
        if leaf.stacked:
            stacked.add(path)
    with _orbax_layout(stacked), quiet_orbax():
        ocp.save(str(folder), unflatten_dict(zeros))

    # then the values are written over them; each write is waited for, so that one block is in memory at a time
    for leaf in leaves:
        store = _open_array(folder, leaf.path[1:])
        chunk: Any = store.chunk_layout.write_chunk.shape
        for where, block in _read_blocks(leaf, chunk):
            store[where].write(block).result()


def _open_array(component: Path, path: Sequence[str], cache_bytes: int = 0) -> ts.TensorStore:
    """One array of a component, as Orbax keeps it; up to ``cache_bytes`` of it stay decompressed once they are read."""
    # the folder between has the name that Orbax gives to a single tree
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


def _orbax_layout(stacked: set[tuple[str, ...]]) -> ocp.Context:
    """How Orbax is to lay out arrays; large ones at the paths ``stacked`` are cut along their first axis first."""
    options = ocp.options.ArrayOptions.Saving.StorageOptions

    def choose_options(key: Any, value: Any) -> Any:
        path = tuple(part.key for part in key)
        # the layers of a large stack come one by one, and each is then written into chunks of its own
        by_layer = value.nbytes > _CHUNK_BYTES and path in stacked
        return options(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,)) if by_layer else None

    context = ocp.Context()
    # a folder for each array, which tensorstore can open by its path
    context.array.saving.use_ocdbt = False
    context.array.saving.storage_options = options(chunk_byte_size=_CHUNK_BYTES)
    context.array.saving.scoped_storage_options_creator = choose_options
    # a copy of an array that repeats one zero would take all of its memory
    context.memory.deepcopy_host_arrays = False
    return context


def _read_blocks(leaf: Leaf, chunk: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The array in blocks of full chunks along one axis: where each lies, and its values in the dtype to be written."""
    # along the axis with most chunks; the layers of a stack come along the first
    axis = 0 if leaf.stacked else max(range(len(chunk)), key=lambda axis: leaf.shape[axis] // chunk[axis])
    chunks_in_block = max(1, _BLOCK_BYTES * leaf.shape[axis] // (leaf.nbytes * chunk[axis]))
    length = chunk[axis] * chunks_in_block  # of a block, along the axis
    all_before = (slice(None),) * axis
    layers = leaf.read()
    # an array that is not stacked is read whole and cut; the layers of a stack are read as their block comes
    array = None if leaf.stacked else next(layers)
    for start in range(0, leaf.shape[axis], length):
        where = (*all_before, slice(start, min(start + length, leaf.shape[axis])))
        if array is not None:
            # a copy: what was read may be a transposed view, in another dtype
            yield where, np.array(array[where], leaf.dtype, order="C")
            continue
        block = np.empty((where[0].stop - start, *leaf.shape[1:]), leaf.dtype)
        for i in range(len(block)):
            block[i] = next(layers)
        yield where, block


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps back what Orbax says of files that it looks for and does not need."""
    # It logs by either. A logger's filter does not see what comes from another one, so both need it.
    loggers = (logging.getLogger("absl"), logging.getLogger())

    def is_unexpected(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _EXPECTED_MESSAGES)

    for logger in loggers:
        logger.addFilter(is_unexpected)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_unexpected)


def components(folder: Path) -> dict[str, list[str]]:
    """The components of a checkpoint, and the dtypes in each.

    Raises:
      CheckpointError: if ``folder`` is no checkpoint of ours, or one of another version.
    """
    path = folder / ABOUT_FILE
    if not has_file(path):
        raise CheckpointError(
            f"{folder} is no checkpoint of omni_jax: it has no {ABOUT_FILE}. "
            "tools/convert.py to-jax makes one from a PyTorch folder"
        )
    about = read_object(path)
    version = about.get("format")
    found = about.get("components")
    if version is None or not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it has no format or no components; convert the checkpoint again")
    if version != FORMAT:
        raise CheckpointError(f"{folder} is of format {shown(version)}; this release reads {FORMAT}; convert it again")
    for name, dtypes in found.items():
        # names become paths, so they are ours alone
        if name not in _KNOWN:
            raise CheckpointError(f"{path}: unknown component {shown(name)}; known: {', '.join(_KNOWN)}")
        if not isinstance(dtypes, list) or not dtypes or not all(dtype in _DTYPES for dtype in dtypes):
            raise CheckpointError(
                f"{path}: the dtypes of {name} are {shown(dtypes)}; they must be a list of {', '.join(_DTYPES)}"
            )
    return found


def has_adapter(folder: Path) -> bool:
    """Whether a checkpoint has an adapter beside its components; what is no checkpoint has none."""
    return has_file(folder / ABOUT_FILE) and LORA in components(folder)


def abstract(folder: Path, wanted: Sequence[str] | None = None, dtype: DTypeLike | None = None) -> dict[str, Any]:
    """Shapes and dtypes of the parameters, without their values.

    Args:
      folder: the checkpoint.
      wanted: which components; all that are there if None.
      dtype: what the Thinker and the Talker are to be cast to. Token2Wav keeps its own: it needs float32.

    Returns:
      component -> tree of jax.ShapeDtypeStruct.

    Raises:
      CheckpointError: if a component or a part of one is missing, or does not fit config.json.
    """
    # what is there, by the folder's own account
    found = components(folder)
    wanted = tuple(found) if wanted is None else tuple(wanted)
    absent = [name for name in wanted if name not in found]
    if absent:
        raise CheckpointError(f"{folder} has no {', '.join(absent)}; it has {', '.join(found)}")
    # what should be there, by the model's configuration
    try:
        config = OmniConfig.load(folder)
    except ConfigError as e:
        raise CheckpointError(f"{folder} is incomplete: {e}") from e
    return {name: _abstract_component(folder, config, name, dtype) for name in wanted}


def _abstract_component(folder: Path, config: OmniConfig, component: str, dtype: DTypeLike | None) -> dict[str, Any]:
    path = folder / "params" / component
    expected: dict[str, Any] = {}
    if component in UNPUBLISHED:
        # whoever loads it knows its shapes; here they are those of the files
        expected = dict(check_arrays(path, folder))
    elif component == LORA:
        expected = adapter_shapes(config, LoRAConfig.load(folder))
    else:
        for entry in make_name_table(config, [component]):
            expected["/".join(entry.path[1:])] = entry.leaf_shape
    # Orbax would follow links out of the folder, and tensorstore allocate whatever metadata ask for
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in check_arrays(path, folder).items()}
    # a tree that lacks a parameter would be loaded as it is, so all paths and shapes are compared; those of the files
    # first, before anything of them is opened
    found: dict[str, Any] = {}
    for source in (lambda: shapes, lambda: flatten_dict(tree_shapes(path), sep="/")):
        found = source()
        trouble = describe_differences(expected, found)
        if trouble:
            raise CheckpointError(f"{path} does not hold the {component} that config.json describes:{trouble}")
    keeps_dtype = component not in ("thinker", "talker", LORA) or dtype is None
    leaves = {}
    for name, leaf in found.items():
        leaves[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if keeps_dtype else dtype)
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
      wanted: which components; all that are there if None.
      dtype: what the Thinker and the Talker are cast to; Token2Wav keeps its own.
      shardings: component -> tree of shardings like the tree of parameters, or one sharding for all of its arrays;
        or one for everything. Each host reads only what its devices hold. None: all goes to the first device.

    Returns:
      component -> tree of jax.Array.

    Raises:
      CheckpointError: as ``abstract``, and if values are missing.
    """
    trees = abstract(folder, wanted, dtype)
    # a single sharding stands for that of every array, of all components or of one
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = dict.fromkeys(trees, shardings)
    params = {}
    for name, tree in trees.items():
        placement = shardings[name]
        if isinstance(placement, jax.sharding.Sharding):
            placement = jax.tree.map(lambda _, sharding=placement: sharding, tree)
        # Orbax reads and casts straight into these, so that no host holds more than its devices do
        target = jax.tree.map(_with_sharding, tree, placement)
        params[name] = load_tree(folder / "params" / name, target)
    return params


def load_unpublished(folder: Path, component: str, expected: Any) -> Any:
    """The parameters of a component beside the published model, on the first device.

    Args:
      folder: the checkpoint.
      component: one of ``UNPUBLISHED``.
      expected: tree of what has the shapes that its description gives.

    Raises:
      CheckpointError: if it is missing or damaged, or has other shapes.
    """
    params = load(folder, [component])[component]
    wanted: dict[str, Any] = flatten_dict(expected, sep="/")
    found: dict[str, Any] = flatten_dict(params, sep="/")
    trouble = describe_differences({path: leaf.shape for path, leaf in wanted.items()}, found)
    if trouble:
        raise CheckpointError(f"{folder} does not hold the {component} that {component}.json describes:{trouble}")
    return params


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def tree_shapes(path: Path, name: str = "AUTO") -> dict[str, Any]:
    """Shapes and dtypes of one Orbax checkpoint, a component or a part of a training state.

    Args:
      path: of the checkpoint.
      name: of the tree in it; what Orbax finds there if "AUTO".

    Raises:
      CheckpointError: if it is missing or damaged.
    """
    try:
        with quiet_orbax():
            stored: Any = ocp.metadata(str(path.resolve()), name).metadata
    except Exception as e:  # Orbax has no one kind of error for a folder that is missing or damaged
        raise CheckpointError(f"{path} is missing or damaged ({_first_line(e)}); convert the checkpoint again") from e
    if not isinstance(stored, dict):  # what it gives for a folder whose arrays are not all there
        raise CheckpointError(f"{path} is damaged: the files of some parameter are missing; convert it again")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)


def load_tree(path: Path, target: Any, name: str = "AUTO") -> Any:
    """One Orbax checkpoint, cast and laid out as the abstract arrays of ``target`` say.

    Args:
      path: of the checkpoint.
      target: abstract arrays.
      name: of the tree in it; what Orbax finds there if "AUTO".

    Raises:
      CheckpointError: if values are missing or damaged.
    """
    try:
        with quiet_orbax():
            return ocp.load(str(path.resolve()), target, checkpointable_name=name)
    except Exception as e:  # as above
        raise CheckpointError(f"cannot read the parameters in {path}: {_first_line(e.__cause__ or e)}") from e


def write_context() -> ocp.Context:
    """How an Orbax ``Checkpointer`` is to lay out arrays, so that ``load_tree`` reads them."""
    return _orbax_layout(set())


def open_leaf(folder: Path, path: Sequence[str]) -> Callable[[int | None], np.ndarray]:
    """One array of a checkpoint, to be read layer by layer; the checkpoint is one that ``abstract`` has checked.

    Args:
      folder: the checkpoint.
      path: where the array stands in the tree, the component first.

    Returns:
      a function that reads the layer it is given, or all of the array for None.

    Raises:
      CheckpointError: from that function, if values are missing or damaged.
    """
    component = folder.resolve() / "params" / path[0]
    # opened once to learn how it is cut into chunks, and then again with a cache of the size that follows
    store = _open_array(component, path[1:])
    # Several layers may share a chunk: small layers, and those that a training run has written from devices that each
    # hold a part of all. Such a chunk is not to be decompressed for each of its layers again.
    cache_bytes = 2 * _CHUNK_BYTES
    if store.shape and store.shape[0]:
        layers_in_chunk: int = store.chunk_layout.read_chunk.shape[0]  # type: ignore[index]
        layer_bytes = store.size * store.dtype.numpy_dtype.itemsize // store.shape[0]
        cache_bytes += layers_in_chunk * layer_bytes
    store = _open_array(component, path[1:], cache_bytes)

    def read(layer: int | None) -> np.ndarray:
        try:
            selected: Any = store if layer is None else store[layer]
            return np.asarray(selected.read().result())
        except Exception as e:  # tensorstore has no one kind of error for a file that is missing or damaged
            name = "/".join(path)
            raise CheckpointError(
                f"cannot read {name} in {folder / 'params'}: {_first_line(e)}; convert the checkpoint again"
            ) from e

    return read


def _first_line(error: BaseException) -> str:
    """Orbax and tensorstore go on with pages of settings."""
    return next(iter(str(error).splitlines()), type(error).__name__)
