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

from omni_jax.checks import shown
from omni_jax.errors import CheckpointError
from omni_jax.plain_files import create_file, resolve_file

# the format's names of dtypes; it has more, in which no tensor of this model is
_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
# of the parts of packed weights alone (``packed_linear``)
_DTYPES["I32"] = np.dtype(np.int32)
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 2**24  # the published 7B has 400,000 in its largest
_MAX_AXES = 8
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
      CheckpointError: if the file cannot be read, is cut short, holds something that is no model's tensor, or its
        tensors do not lie side by side, from the end of the header to that of the file; and if it is a link that leads
        out of its folder.
    """
    try:
        size = resolve_file(path).stat().st_size
        with open(path, "rb") as f:
            # the length is what the file says; it is compared with the file's size before as much is read
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or 8 + length > size:
                raise CheckpointError(f"{path} is cut short or no safetensors file ({size} bytes); fetch it again")
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} has a header of {length:,} bytes; {_MAX_HEADER_BYTES:,} are read at most"
                )
            header = json.loads(f.read(length).decode())
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
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _check_layout(path: Path, tensors: Mapping[str, StoredTensor], begin: int, size: int) -> None:
    """Checks that the tensors of a file of ``size`` bytes fill it from ``begin`` on, each behind the other."""
    # an empty tensor begins where the next one does, so it is sorted before that
    ordered = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    end = begin
    for name, tensor in ordered:
        if tensor.offset != end:
            what = "lies over another tensor" if tensor.offset < end else "lies behind bytes of no tensor"
            raise CheckpointError(f"{path}: {name} {what}, at byte {tensor.offset} and not {end}; fetch the file again")
        end += tensor.nbytes
    # a download that was cut short may have its whole header, but not all values
    if end > size:
        raise CheckpointError(f"{path} is cut short: its tensors end at byte {end}, it has {size}; fetch it again")
    if end < size:
        raise CheckpointError(f"{path} has {size} bytes, but its tensors end at byte {end}; fetch it again")


def _parse_tensor(path: Path, data_offset: int, name: str, description: Mapping[str, Any]) -> StoredTensor:
    dtype = description["dtype"]
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of {name} is {shown(dtype)}")
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {name} is of dtype {dtype[:20]}; only {', '.join(_DTYPES)} can be read")
    shape = _parse_sizes(path, f"{name}: shape", description["shape"])
    offsets = _parse_sizes(path, f"{name}: data_offsets", description["data_offsets"])
    if len(shape) > _MAX_AXES or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name} has a shape of over {_MAX_AXES} axes, or not two data_offsets")
    # they count from the end of the header
    begin, end = offsets
    tensor = StoredTensor(path, data_offset + begin, shape, _DTYPES[dtype])
    if end - begin != tensor.nbytes:
        raise CheckpointError(f"{path}: {name} has {end - begin} bytes, but its shape takes {tensor.nbytes}")
    return tensor


def _parse_sizes(path: Path, what: str, values: Any) -> tuple[int, ...]:
    """A list of whole numbers. To ``isinstance`` True would be one, and 2.0 would pass where it is only compared."""
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise CheckpointError(f"{path}: {what} must be whole numbers from 0 to 2^63, got {shown(values)}")
    return tuple(values)


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
    with create_file(path) as f:
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
