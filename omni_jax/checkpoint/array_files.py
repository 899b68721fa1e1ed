"""Arrays of our checkpoints as they lie in a folder: what their metadata say, checked before tensorstore takes it.

A folder may come from anywhere, and tensorstore allocates what metadata ask for: a chunk of 64 TiB, of which a file
has a few bytes, ends the process. So what is read has the layout that ``store`` writes, and no chunk is larger than its
array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_jax.checks import check_int, shown
from omni_jax.errors import CheckpointError, InputError
from omni_jax.plain_files import list_files, read_object

ARRAY_FILE = "zarr.json"

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4, "uint32": 4, "int64": 8, "bool": 1}
_MAX_AXES = 16
_MAX_LENGTH = 2**40  # of an axis; shapes are compared with the model's before anything is read
_MAX_CHUNKS = 2**16  # of an array, or of a file; a stack of layers has some hundred on each of many hosts
# What a file of chunks may have over the bytes of the array in it: an index, and data that do not compress.
_MAX_EXTRA = 2**21
# other layouts that Orbax reads, of which nothing here would be checked
_OTHER_LAYOUTS = (".zarray", "manifest.ocdbt")
_KEYS = frozenset(
    "chunk_grid chunk_key_encoding codecs data_type fill_value node_type shape zarr_format attributes dimension_names "
    "storage_transformers".split()
)


def check_arrays(folder: Path, root: Path) -> dict[str, tuple[int, ...]]:
    """Checks the metadata and the sizes of all files of arrays in a folder, one that Orbax wrote as ``store`` tells it.

    Args:
      folder: of a tree's checkpoint, a component or a part of a training state.
      root: a stranger's folder, which no link may lead out of.

    Returns:
      The shape of each array, by its path in the tree (``a/b/c``).

    Raises:
      CheckpointError: for metadata that ask for more than the array has, another layout, a link, or no array at all.
    """
    arrays: dict[Path, int] = {}  # folder -> the most bytes that a file of its chunks may have
    shapes = {}
    files = list_files(folder, root)
    for file in files:
        if file.name in _OTHER_LAYOUTS:
            raise CheckpointError(f"{file} is of a layout that is not read; convert the checkpoint again")
        if file.name == ARRAY_FILE:
            shape, num_bytes = _read_array(file)
            arrays[file.parent] = num_bytes + _MAX_EXTRA
            name = file.parent.name.replace(".", "/")
            if name in shapes:
                raise CheckpointError(f"{file}: there is another array of this name; convert the checkpoint again")
            shapes[name] = shape
        elif file.name in ("_METADATA", "_CHECKPOINT_METADATA", "_sharding"):
            read_object(file)
    if not shapes:
        raise CheckpointError(f"{folder} is missing or damaged: it has no arrays; convert the checkpoint again")
    for file in files:
        for parent in file.parents:
            if parent in arrays and file.stat().st_size > arrays[parent]:
                raise CheckpointError(
                    f"{file} has {file.stat().st_size:,} bytes; for this array it may have {arrays[parent]:,}"
                )
    return shapes


def _read_array(file: Path) -> tuple[tuple[int, ...], int]:
    """The shape of an array, and the bytes that a chunk has."""
    values = read_object(file)
    try:
        unknown = sorted(set(values) - _KEYS)
        if unknown or values.get("zarr_format") != 3 or values.get("node_type") != "array":
            raise InputError("it is no array of zarr 3")
        shape = _read_sizes("shape", values.get("shape"), [_MAX_LENGTH] * _MAX_AXES, 0)
        dtype = values.get("data_type")
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise InputError(f"data_type is {shown(dtype)}; known: {', '.join(DTYPE_BYTES)}")
        # an axis without length has chunks of 1 all the same
        chunk = _read_chunks("chunk_grid", values.get("chunk_grid"), [max(length, 1) for length in shape])
        _check_codecs("codecs", values.get("codecs"), chunk, may_shard=True)
    except InputError as e:
        raise CheckpointError(f"{file}: {e}; convert the checkpoint again") from e
    return tuple(shape), math.prod(chunk) * DTYPE_BYTES[dtype]


def _read_chunks(name: str, grid: Any, lengths: Sequence[int]) -> list[int]:
    """The shape of the chunks of a regular grid over an array, or a part of it, that has these lengths."""
    if (
        not isinstance(grid, Mapping)
        or grid.get("name") != "regular"
        or not isinstance(grid.get("configuration"), dict)
    ):
        raise InputError(f"{name} is {shown(grid)}; it must be a regular one")
    return _read_chunk_shape(f"{name}: chunk_shape", grid["configuration"].get("chunk_shape"), lengths)


def _read_chunk_shape(name: str, value: Any, lengths: Sequence[int]) -> list[int]:
    chunk = _read_sizes(name, value, lengths, 1)
    if len(chunk) != len(lengths):
        raise InputError(f"{name} is {shown(value)}; it must have {len(lengths)} lengths")
    count = math.prod(-(-length // size) for length, size in zip(lengths, chunk, strict=True))
    if count > _MAX_CHUNKS:
        raise InputError(f"{name} is {shown(value)}, which makes {count} chunks; there may be {_MAX_CHUNKS}")
    return chunk


def _read_sizes(name: str, value: Any, limits: Sequence[int], least: int) -> list[int]:
    """A list of whole numbers, each at most the limit that stands in its place."""
    if not isinstance(value, list) or len(value) > len(limits):
        raise InputError(f"{name} is {shown(value)}; it must be a list of {len(limits)} lengths at most")
    sizes = []
    for item, limit in zip(value, limits, strict=False):
        sizes.append(check_int(name, item, least, limit))
    return sizes


def _check_codecs(name: str, codecs: Any, chunk: Sequence[int], *, may_shard: bool) -> None:
    """Only what the arrays of ``store`` have: little-endian numbers and zstd, in shards or not, and check sums."""
    if not isinstance(codecs, list) or not codecs or len(codecs) > 4:
        raise InputError(f"{name} is {shown(codecs)}; it must be a list of up to 4")
    for codec in codecs:
        kind = codec.get("name") if isinstance(codec, Mapping) else None
        options = codec.get("configuration", {}) if isinstance(codec, Mapping) else None
        if not isinstance(options, Mapping):
            raise InputError(f"{name}: {shown(codec)} is no codec that is known")
        if kind == "sharding_indexed" and may_shard:
            inner = _read_chunk_shape(f"{name}: chunk_shape", options.get("chunk_shape"), chunk)
            _check_codecs(f"{name}: codecs", options.get("codecs"), inner, may_shard=False)
            _check_codecs(f"{name}: index_codecs", options.get("index_codecs"), inner, may_shard=False)
        elif kind not in ("bytes", "zstd", "crc32c"):
            raise InputError(f"{name}: {shown(kind)} is no codec that is known")
