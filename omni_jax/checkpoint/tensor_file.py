"""Files in the safetensors format, read and written one tensor at a time.

The format is eight bytes with the length of a JSON header, the header, and the values. It is read here rather than
with its library because that maps whole files into memory, where every page once touched counts as ours, and written
here because that takes all tensors of a file at once; a conversion promises how much memory it takes at most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from omni_jax.errors import CheckpointError

# the format's names of dtypes; it has more, in which no tensor of this model is
_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK_BYTES = 64 * 2**20  # of an array that are copied at a time while it is written


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
        """The values, in a new array.

        Raises:
          CheckpointError: if the file has become shorter since its header was read.
        """
        # as bytes, because numpy gives no buffer of bfloat16 to read into
        data = np.empty(self.nbytes, np.uint8)
        with open(self.file, "rb") as f:
            f.seek(self.offset)
            if f.readinto(data.data) != self.nbytes:
                raise CheckpointError(f"{self.file} ends in the middle of a tensor; fetch the file again")
        return data.view(self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name.

    Raises:
      CheckpointError: if the file cannot be read, is cut short, or holds something that is no model's tensor.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            # the length is what the file says; it is compared with the file's size before as much is read
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or 8 + length > size:
                raise CheckpointError(f"{path} is cut short or no safetensors file ({size} bytes); fetch it again")
            header = json.loads(f.read(length))
            # free text of the program that wrote the file, and no tensor
            header.pop("__metadata__", None)
            tensors = {}
            for name, description in header.items():
                tensors[name] = _parse_tensor(path, 8 + length, name, description)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    except CheckpointError:  # a ValueError too, but with the right message already
        raise
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{path} has a header that is no safetensors header ({e}); fetch it again") from e
    # a download that was cut short may have its whole header, but not all values
    end = 8 + length
    for tensor in tensors.values():
        end = max(end, tensor.offset + tensor.nbytes)
    if end > size:
        raise CheckpointError(f"{path} is cut short: its tensors end at byte {end}, it has {size}; fetch it again")
    return tensors


def _parse_tensor(path: Path, data_offset: int, name: str, description: Mapping[str, Any]) -> StoredTensor:
    dtype = description["dtype"]
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {name} is of dtype {dtype}; only {', '.join(_DTYPES)} can be read")
    # offsets in the file count from the end of the header
    begin, end = description["data_offsets"]
    tensor = StoredTensor(path, data_offset + begin, tuple(description["shape"]), _DTYPES[dtype])
    if begin < 0 or any(size < 0 for size in tensor.shape):
        raise ValueError(f"{name} has a negative offset or size")
    if end - begin != tensor.nbytes:
        raise CheckpointError(f"{path}: {name} has {end - begin} bytes, but its shape takes {tensor.nbytes}")
    return tensor


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; ``make`` is called when its turn comes."""

    # name, shape and dtype stand in the header, which is written before the first value is there
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
    """Writes one file; no more than one tensor is in memory at a time.

    Raises:
      CheckpointError: if a tensor turns out to have another shape or dtype than announced.
    """
    # wide dtypes first, so that each tensor begins at a multiple of its own item size
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    # transformers refuses a file that does not say which library its tensors are for
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        offsets = [offset, offset + tensor.nbytes]
        dtype = _DTYPE_NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.nbytes
    # the values begin at a multiple of 8: the format lets a header end in spaces
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            _write_array(f, tensor)


def _write_array(f: BinaryIO, tensor: NewTensor) -> None:
    array = tensor.make()
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise CheckpointError(
            f"{tensor.name} is {array.dtype}{array.shape}; {tensor.dtype}{tensor.shape} was announced"
        )
    array = np.atleast_1d(array)  # a scalar has no axis to cut into blocks
    # a transposed array is copied here, so it goes in blocks
    block_length = max(1, len(array) * _BLOCK_BYTES // max(1, array.nbytes))
    for start in range(0, len(array), block_length):
        block = np.ascontiguousarray(array[start : start + block_length])
        # as bytes, for the same reason as in ``StoredTensor.read``
        f.write(block.reshape(-1).view(np.uint8).data)
