"""Files of ``torch.save`` that hold nothing but dictionaries, strings, numbers and tensors, without PyTorch.

Such a file is a Zip archive: ``NAME/data.pkl`` is a pickle, ``NAME/data/0``, ``NAME/data/1``, ... are the numbers of
its tensors. A pickle is a program for a small machine, and Python's own machine runs whatever the program names. The
one here has only the instructions that data needs. It imports nothing and calls nothing: of the names a program may
give it knows those of a tensor's parts, and any other is an error that says which.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from omni_jax.errors import CheckpointError

# the published file of voices has 0.26 MB and a program of some hundred bytes; more is no such file, but may be a trap
LARGEST_FILE = 64 * 2**20
_LARGEST_PROGRAM = 2**20

_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
}
_STORAGES = {dtype: name for name, dtype in _DTYPES.items()}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_ORDERED = "collections OrderedDict"  # a tensor's hooks, of which it has none
_NAMES = {_TENSOR, _ORDERED, *(f"torch {name}" for name in _DTYPES)}

_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Name:
    """A name that the program gives, module first."""

    text: str


@dataclass(frozen=True, eq=False)
class _Numbers:
    """The numbers of one or more tensors, before they have a shape."""

    values: np.ndarray


def read(path: Path) -> Any:
    """What a file holds; tensors as read-only arrays.

    Raises:
      CheckpointError: if the file cannot be read, is damaged, or holds anything but dictionaries, strings, numbers and
        tensors; what was found is named.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise CheckpointError(f"{path} has {size:,} bytes; a file of voices has {LARGEST_FILE:,} at most")
        with zipfile.ZipFile(path) as archive:
            return _Machine(path, _entries(path, archive)).run()
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    except CheckpointError:
        raise
    except (
        zipfile.BadZipFile,
        EOFError,
        RuntimeError,
    ) as e:  # the last: an archive with a password or a method of late
        raise CheckpointError(f"{path} is damaged or no file of torch.save ({e}); fetch it again") from e
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        what = f"{type(e).__name__}: {e}"
        raise CheckpointError(f"{path} holds a pickle that cannot be followed ({what}); fetch it again") from e


def _entries(path: Path, archive: zipfile.ZipFile) -> Callable[[str], bytes]:
    """How to get an entry of the archive by its name below the folder that holds all."""
    infos = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("/data.pkl") for name in infos if name.endswith("/data.pkl")]
    if len(roots) != 1 or len(infos) != len(archive.infolist()):
        raise CheckpointError(f"{path} is no file of torch.save: it must hold one data.pkl, and no name twice")
    if (claimed := sum(info.file_size for info in infos.values())) > LARGEST_FILE:  # entries may lie over each other
        raise CheckpointError(
            f"{path} claims to hold {claimed:,} bytes; a file of voices holds {LARGEST_FILE:,} at most"
        )

    def entry(name: str) -> bytes:
        info = infos.get(f"{roots[0]}/{name}")
        if info is None:
            raise CheckpointError(f"{path} is not whole: it has no {name}; fetch it again")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise CheckpointError(f"{path}: {name} is compressed, which torch.save never does; not read")
        if name == "data.pkl" and info.file_size > _LARGEST_PROGRAM:
            raise CheckpointError(
                f"{path}: {name} has {info.file_size:,} bytes; a file of voices has {_LARGEST_PROGRAM:,} at most"
            )
        return archive.read(info)

    if f"{roots[0]}/byteorder" in infos and entry("byteorder") != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine; only little-endian files are read")
    return entry


class _Machine:
    """Follows a pickle, as far as it only describes data."""

    def __init__(self, path: Path, entry: Callable[[str], bytes]) -> None:
        self.path = path
        self.entry = entry
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.numbers: dict[str, _Numbers] = {}
        self.nbytes = 0  # of all tensors made so far

    def run(self) -> Any:
        memo: dict[int, Any] = {}
        stack = self.stack
        argument: Any
        for instruction, argument, _ in pickletools.genops(self.entry("data.pkl")):
            match name := instruction.name:
                case "PROTO":
                    pass
                case "MARK":
                    self.marks.append(len(stack))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "EMPTY_DICT":
                    stack.append({})
                case "SETITEM" | "SETITEMS":
                    items = self._top(2) if name == "SETITEM" else self._since_mark()
                    self._fill(items)
                case "TUPLE":
                    stack.append(tuple(self._since_mark()))
                case "GLOBAL":
                    stack.append(self._known(argument))
                case "BINPERSID":
                    stack.append(self._stored(stack.pop()))
                case "REDUCE":
                    stack.append(self._made(*self._top(2)))
                case "STOP":
                    return stack.pop()
                case _ if name in _LITERALS:
                    stack.append(argument)
                case _ if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case _ if name in _TUPLES:
                    stack.append(tuple(self._top(_TUPLES[name])))
                case _:
                    raise self._refusal(f"the pickle instruction {name}")

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} holds {what}; only dictionaries, strings, numbers and tensors are read from such a file, "
            "because anything else may run a program"
        )

    def _top(self, n: int) -> list[Any]:
        """Takes the last ``n`` values off the stack."""
        if n > len(self.stack):
            raise IndexError("not that many values")
        taken = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return taken

    def _since_mark(self) -> list[Any]:
        return self._top(len(self.stack) - self.marks.pop())

    def _fill(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise TypeError("items for what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise self._refusal(f"a dictionary with a {type(key).__name__} as key")
            self.stack[-1][key] = value

    def _known(self, name: str) -> _Name:
        if name not in _NAMES:
            raise self._refusal(f"the name {name.replace(' ', '.')}")
        return _Name(name)

    def _stored(self, reference: Any) -> _Numbers:
        """The numbers that ("storage", kind, key, device, count) refers to."""
        what, kind, key, _, count = reference
        right = isinstance(kind, _Name) and isinstance(key, str) and type(count) is int
        if what != "storage" or not right:
            raise self._refusal("a reference that is none to the numbers of a tensor")
        dtype = _DTYPES[kind.text.removeprefix("torch ")]
        if key not in self.numbers:
            data = self.entry(f"data/{key}")
            if len(data) != count * dtype.itemsize:
                raise CheckpointError(f"{self.path}: data/{key} has {len(data)} bytes, not {count} of {dtype}")
            self.numbers[key] = _Numbers(np.frombuffer(data, dtype))
        if self.numbers[key].values.dtype != dtype:
            raise CheckpointError(f"{self.path}: data/{key} is said to be of two dtypes")
        return self.numbers[key]

    def _made(self, function: Any, arguments: Any) -> Any:
        """What the two functions that are known would make."""
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise self._refusal("a call of what is no function")
        if function.text == _TENSOR:
            return self._tensor(*arguments[:4])
        if function.text == _ORDERED and not arguments:
            return {}
        raise self._refusal(f"a call of {function.text.replace(' ', '.')}")

    def _tensor(self, numbers: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
        counts = (offset, *shape, *strides)
        if not isinstance(numbers, _Numbers) or not all(type(n) is int and n >= 0 for n in counts):
            raise TypeError("a tensor of something else than numbers")
        values = numbers.values
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        size = math.prod(shape)
        if size == 0 or last >= values.size or size > values.size:
            raise CheckpointError(f"{self.path} has a tensor {list(shape)} that {values.size} numbers do not fill")
        self.nbytes += size * values.itemsize
        if self.nbytes > LARGEST_FILE:
            raise CheckpointError(f"{self.path} makes more than {LARGEST_FILE:,} bytes of tensors of its numbers")
        steps = [s * values.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Writes nested dictionaries of strings, 32-bit integers and arrays, for ``torch.load(weights_only=True)``."""
    arrays: list[np.ndarray] = []
    program = b"\x80\x02" + _encoded(value, arrays) + b"."
    entries = {"data.pkl": program, "byteorder": b"little", "version": b"3\n"}
    entries |= {f"data/{i}": np.ascontiguousarray(array).tobytes() for i, array in enumerate(arrays)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}"), data)  # without the time, so that bytes repeat


def _encoded(value: Any, arrays: list[np.ndarray]) -> bytes:
    """The instructions that put ``value`` on the stack; the numbers of arrays are added to ``arrays``."""
    if isinstance(value, str):
        text = value.encode()
        return b"X" + len(text).to_bytes(4, "little") + text
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    if isinstance(value, tuple):
        return b"(" + b"".join(_encoded(item, arrays) for item in value) + b"t"
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_encoded(part, arrays) for item in value.items() for part in item) + b"u"
    if isinstance(value, _Name):
        return b"c" + value.text.replace(" ", "\n").encode() + b"\n"
    if not isinstance(value, np.ndarray) or value.dtype not in _STORAGES:
        raise TypeError(f"cannot write {value!r}")
    arrays.append(value)
    kind = _Name(f"torch {_STORAGES[value.dtype]}")
    numbers = _encoded(("storage", kind, str(len(arrays) - 1), "cpu", value.size), arrays) + b"Q"
    strides = tuple(math.prod(value.shape[axis + 1 :]) for axis in range(value.ndim))
    rest = b"".join(_encoded(x, arrays) for x in (0, value.shape, strides, False))
    hooks = _encoded(_Name(_ORDERED), arrays) + b")R"
    return _encoded(_Name(_TENSOR), arrays) + b"(" + numbers + rest + hooks + b"tR"
