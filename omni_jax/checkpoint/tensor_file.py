"""Files in the safetensors format, read and written one tensor at a time.

The format is eight bytes with the length of a JSON header, the header, and the numbers. It is read here rather than
with its library because that maps whole files into memory, where every page once touched counts as ours, and written
here because that takes all tensors of a file at once; a conversion promises how much memory it takes at most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from omni_jax.errors import CheckpointError

_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
_BLOCK_BYTES = 64 * 2**20
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, known from the header alone."""

    file: Path
    offset: int  # bytes from the beginning of the file
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The numbers, in an array of their own.

        Raises:
          CheckpointError: if the file has become shorter since its header was read.
        """
        numbers = np.empty(self.nbytes, np.uint8)
        with open(self.file, "rb") as f:
            f.seek(self.offset)
            if f.readinto(numbers.data) != self.nbytes:
                raise CheckpointError(f"{self.file} ends in the middle of a tensor; fetch the file again")
        return numbers.view(self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name.

    Raises:
      CheckpointError: if the file cannot be read, is cut short, or holds something that is no model's tensor.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or 8 + length > size:
                raise CheckpointError(f"{path} is cut short or no safetensors file ({size} bytes); fetch it again")
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _stored(path, 8 + length, name, about) for name, about in header.items()}
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, AttributeError, KeyError, TypeError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{path} has a header that is no safetensors header ({e}); fetch it again") from e
    end = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if end > size:
        raise CheckpointError(f"{path} is cut short: its tensors end at byte {end}, it has {size}; fetch it again")
    return tensors


def _stored(path: Path, data: int, name: str, about: Mapping[str, Any]) -> StoredTensor:
    if about["dtype"] not in _DTYPES:
        raise CheckpointError(f"{path}: {name} is of dtype {about['dtype']}; only {', '.join(_DTYPES)} can be read")
    begin, end = about["data_offsets"]
    tensor = StoredTensor(path, data + begin, tuple(about["shape"]), _DTYPES[about["dtype"]])
    if end - begin != tensor.nbytes:
        raise CheckpointError(f"{path}: {name} has {end - begin} bytes, but its shape takes {tensor.nbytes}")
    return tensor


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; ``make`` is called when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @classmethod
    def of(cls, name: str, tensor: StoredTensor) -> NewTensor:
        """The same tensor in another file."""
        return cls(name, tensor.shape, tensor.dtype, tensor.read)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Iterable[NewTensor]) -> None:
    """Writes one file; no more than one tensor is in memory at a time."""
    # wide numbers first, so that each tensor begins at a multiple of its own width
    tensors = sorted(tensors, key=lambda t: -t.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        begin, end = end, end + t.nbytes
        header[t.name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            array = t.make()
            if array.shape != t.shape or array.dtype != t.dtype:
                raise CheckpointError(f"{t.name} is {array.dtype}{array.shape}; {t.dtype}{t.shape} was announced")
            rows = np.atleast_1d(array)
            count = max(1, len(rows) * _BLOCK_BYTES // max(1, rows.nbytes))
            for start in range(0, len(rows), count):
                # a transposed array is copied here, so not all of it at once
                f.write(np.ascontiguousarray(rows[start : start + count]).reshape(-1).view(np.uint8).data)
