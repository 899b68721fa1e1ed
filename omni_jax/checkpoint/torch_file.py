"""Files of ``torch.save`` that hold nothing but dictionaries, strings, numbers and tensors, without PyTorch.

Such a file is a Zip archive: ``NAME/data.pkl`` is a pickle, ``NAME/data/0``, ``NAME/data/1``, ... are the storages of
its tensors. A pickle is a program for a stack machine, and Python's own machine runs whatever the program names. The
one here has only the instructions that data needs. It imports nothing and calls nothing: it knows the names of a
tensor's parts, and any other name is an error.
"""

from __future__ import annotations

import itertools
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from omni_jax.errors import CheckpointError
from omni_jax.plain_files import resolve_file

# the published file of voices has 0.26 MB and a program of some hundred bytes; more is no such file, but may be a trap
LARGEST_FILE = 64 * 2**20
_LARGEST_PROGRAM = 2**20

# The only names that a program may give, with a space between module and name as ``pickletools`` has them. These are
# the classes of storages, which stand for the dtype of a tensor.
_DTYPES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
}
_STORAGES = {dtype: name for name, dtype in _DTYPES.items()}
# and these the two functions that a program may ask for; their results are made here, without calling them
_TENSOR = "torch._utils _rebuild_tensor_v2"
_ORDERED = "collections OrderedDict"  # a tensor's hooks, of which it has none
_NAMES = {_TENSOR, _ORDERED, *_DTYPES}

# instructions that push a fixed value, that push their argument, and that make a tuple of so many values
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Name:
    """A name that the program gives, module first."""

    text: str


@dataclass(frozen=True, eq=False)
class _Storage:
    """The values of one or more tensors, before they have a shape."""

    values: np.ndarray


def read(path: Path) -> Any:
    """What a file holds; tensors as read-only arrays.

    Raises:
      CheckpointError: if the file cannot be read, is damaged, or holds anything but dictionaries, strings, numbers and
        tensors; what was found is named.
    """
    try:
        # before anything of it is in memory
        size = resolve_file(path).stat().st_size
        if size > LARGEST_FILE:
            raise CheckpointError(f"{path} has {size:,} bytes; a file of voices has {LARGEST_FILE:,} at most")
        with zipfile.ZipFile(path) as archive:
            return _PickleMachine(path, _open_entries(path, archive)).run()
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    except CheckpointError:  # a ValueError too, but with the right message already
        raise
    except (zipfile.BadZipFile, EOFError, RuntimeError) as e:  # RuntimeError: a password, or an unknown method
        raise CheckpointError(f"{path} is damaged or no file of torch.save ({e}); fetch it again") from e
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        # a program that takes what it never pushed, or gives an instruction values of the wrong kind
        what = f"{type(e).__name__}: {e}"
        raise CheckpointError(f"{path} holds a pickle that cannot be followed ({what}); fetch it again") from e


def _open_entries(path: Path, archive: zipfile.ZipFile) -> Callable[[str], bytes]:
    """A function that reads an entry of the archive by its name below the archive's one folder."""
    infos = {info.filename: info for info in archive.infolist()}
    # the folder is named after the file as it was when it was saved, so it is found by what lies in it
    roots = []
    for name in infos:
        if name.endswith("/data.pkl"):
            roots.append(name.removesuffix("/data.pkl"))
    if len(roots) != 1 or len(infos) != len(archive.infolist()):
        raise CheckpointError(f"{path} is no file of torch.save: it must hold one data.pkl, and no name twice")
    claimed = sum(info.file_size for info in infos.values())
    if claimed > LARGEST_FILE:  # entries may lie over each other
        raise CheckpointError(
            f"{path} claims to hold {claimed:,} bytes; a file of voices holds {LARGEST_FILE:,} at most"
        )

    def read_entry(name: str) -> bytes:
        info = infos.get(f"{roots[0]}/{name}")
        if info is None:
            raise CheckpointError(f"{path} is not whole: it has no {name}; fetch it again")
        # a compressed entry could unfold into far more than the file's size
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise CheckpointError(f"{path}: {name} is compressed, which torch.save never does; not read")
        if name == "data.pkl" and info.file_size > _LARGEST_PROGRAM:
            raise CheckpointError(
                f"{path}: {name} has {info.file_size:,} bytes; a file of voices has {_LARGEST_PROGRAM:,} at most"
            )
        return archive.read(info)

    if f"{roots[0]}/byteorder" in infos and read_entry("byteorder") != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine; only little-endian files are read")
    return read_entry


class _PickleMachine:
    """Interprets a pickle, as far as it only describes data."""

    def __init__(self, path: Path, read_entry: Callable[[str], bytes]) -> None:
        self.path = path
        self.read_entry = read_entry
        self.stack: list[Any] = []
        self.mark_positions: list[int] = []
        self.storages: dict[str, _Storage] = {}
        self.nbytes = 0  # of all tensors made so far

    def run(self) -> Any:
        memo: dict[int, Any] = {}  # values that the program refers to again, by their number
        stack = self.stack
        argument: Any
        # genops splits the bytes into instructions and runs none of them
        for instruction, argument, _ in pickletools.genops(self.read_entry("data.pkl")):
            match name := instruction.name:
                case "PROTO":
                    pass  # the version of the format, which changes no instruction known here
                case "MARK":
                    self.mark_positions.append(len(stack))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "EMPTY_DICT":
                    stack.append({})
                case "SETITEM" | "SETITEMS":
                    items = self._pop_values(2) if name == "SETITEM" else self._pop_to_mark()
                    self._set_items(items)
                case "TUPLE":
                    stack.append(tuple(self._pop_to_mark()))
                case "GLOBAL":  # a name, which Python would import
                    stack.append(self._check_name(argument))
                case "BINPERSID":  # a reference out of the pickle: torch.save's storages
                    stack.append(self._load_storage(stack.pop()))
                case "REDUCE":  # a call, of a function with its arguments
                    stack.append(self._call_function(*self._pop_values(2)))
                case "STOP":
                    return stack.pop()
                case _ if name in _LITERALS:
                    stack.append(argument)
                case _ if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case _ if name in _TUPLES:
                    stack.append(tuple(self._pop_values(_TUPLES[name])))
                case _:
                    raise self._make_refusal(f"the pickle instruction {name}")

    def _make_refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} holds {what}; only dictionaries, strings, numbers and tensors are read from such a file, "
            "because anything else may run a program"
        )

    def _pop_values(self, n: int) -> list[Any]:
        """Takes the last ``n`` values off the stack."""
        if n > len(self.stack):
            raise IndexError("not that many values")
        taken = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return taken

    def _pop_to_mark(self) -> list[Any]:
        return self._pop_values(len(self.stack) - self.mark_positions.pop())

    def _set_items(self, items: list[Any]) -> None:
        """Puts key, value, key, value, ... into the dictionary on top of the stack."""
        if not isinstance(self.stack[-1], dict):
            raise TypeError("items for what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise self._make_refusal(f"a dictionary with a {type(key).__name__} as key")
            self.stack[-1][key] = value

    def _check_name(self, name: str) -> _Name:
        if name not in _NAMES:
            raise self._make_refusal(f"the name {name.replace(' ', '.')}")
        return _Name(name)

    def _load_storage(self, reference: Any) -> _Storage:
        """The storage that ("storage", type, key, device, count) refers to."""
        what, kind, key, _, count = reference  # the device does not matter here
        is_well_typed = isinstance(kind, _Name) and isinstance(key, str) and type(count) is int
        if what != "storage" or not is_well_typed:
            raise self._make_refusal("a reference to something else than the storage of a tensor")
        # read once and kept, since several tensors may be views of one storage
        dtype = _DTYPES[kind.text]
        if key not in self.storages:
            data = self.read_entry(f"data/{key}")
            if len(data) != count * dtype.itemsize:
                raise CheckpointError(f"{self.path}: data/{key} has {len(data)} bytes, not {count} of {dtype}")
            self.storages[key] = _Storage(np.frombuffer(data, dtype))
        if self.storages[key].values.dtype != dtype:
            raise CheckpointError(f"{self.path}: data/{key} is used with two dtypes")
        return self.storages[key]

    def _call_function(self, function: Any, arguments: Any) -> Any:
        """The result of one of the two functions that are known, which are not called."""
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise self._make_refusal("a call of what is no function")
        if function.text == _TENSOR:
            # what follows the fourth, requires_grad and hooks, does not change the values
            return self._build_tensor(*arguments[:4])
        if function.text == _ORDERED and not arguments:
            return {}
        raise self._make_refusal(f"a call of {function.text.replace(' ', '.')}")

    def _build_tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
        """A view of a storage. Offset and strides count values; numbers come from the file and are all checked."""
        counts = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(map(_is_count, counts)):
            raise TypeError("a tensor of something else than a storage")
        values = storage.values
        last = offset
        for length, stride in zip(shape, strides, strict=True):
            last += (length - 1) * stride
        size = math.prod(shape)
        # the last value that strides reach must lie in the storage. A tensor no larger than its storage cannot claim
        # memory that the file does not have, which strides of 0 could otherwise do
        if size == 0 or last >= values.size or size > values.size:
            raise CheckpointError(f"{self.path} has a tensor {list(shape)} that {values.size} values do not fill")
        # many tensors of one storage are many copies of it once they are used
        self.nbytes += size * values.itemsize
        if self.nbytes > LARGEST_FILE:
            raise CheckpointError(f"{self.path} makes more than {LARGEST_FILE:,} bytes of tensors of its storages")
        byte_strides = [stride * values.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(values[offset:], shape, byte_strides, writeable=False)


def _is_count(value: Any) -> bool:
    """Whether it is an integer from 0 on; a bool, which ``isinstance`` would admit, is none."""
    return type(value) is int and value >= 0


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Writes nested dictionaries of strings, 32-bit integers and arrays, for ``torch.load(weights_only=True)``."""
    arrays: list[np.ndarray] = []
    # PROTO 2, the value, STOP
    program = b"\x80\x02" + _encode(value, arrays) + b"."
    # torch.load looks for these three by name; 3 is the version of the archive's layout
    entries = {"data.pkl": program, "byteorder": b"little", "version": b"3\n"}
    for i, array in enumerate(arrays):
        entries[f"data/{i}"] = np.ascontiguousarray(array).tobytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}"), data)  # without the time, so that bytes repeat


def _encode(value: Any, arrays: list[np.ndarray]) -> bytes:
    """The instructions that put ``value`` on the stack; arrays among it are appended to ``arrays``."""
    # BINUNICODE: the length in bytes, then UTF-8
    if isinstance(value, str):
        text = value.encode()
        return b"X" + len(text).to_bytes(4, "little") + text
    # NEWTRUE, NEWFALSE; before the numbers, since a bool is an int
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    # BININT
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    # MARK, the items, TUPLE
    if isinstance(value, tuple):
        return b"(" + _encode_each(value, arrays) + b"t"
    # EMPTY_DICT, MARK, key, value, key, value, ..., SETITEMS
    if isinstance(value, Mapping):
        return b"}(" + _encode_each(itertools.chain.from_iterable(value.items()), arrays) + b"u"
    # GLOBAL: module and name, each on a line
    if isinstance(value, _Name):
        return b"c" + value.text.replace(" ", "\n").encode() + b"\n"
    if not isinstance(value, np.ndarray) or value.dtype not in _STORAGES:
        raise TypeError(f"cannot write {value!r}")
    # _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, backward_hooks), as torch.save writes it
    arrays.append(value)
    kind = _Name(_STORAGES[value.dtype])
    # the reference to the storage, BINPERSID
    storage = _encode(("storage", kind, str(len(arrays) - 1), "cpu", value.size), arrays) + b"Q"
    # values are written in C order; strides count values and not bytes
    strides = tuple(math.prod(value.shape[axis + 1 :]) for axis in range(value.ndim))
    rest = _encode_each((0, value.shape, strides, False), arrays)
    # no hooks: a call (REDUCE) of OrderedDict with EMPTY_TUPLE
    hooks = _encode(_Name(_ORDERED), arrays) + b")R"
    # the function, MARK, its arguments, TUPLE, REDUCE
    return _encode(_Name(_TENSOR), arrays) + b"(" + storage + rest + hooks + b"tR"


def _encode_each(values: Iterable[Any], arrays: list[np.ndarray]) -> bytes:
    """The instructions that put several values on the stack, the first at the bottom."""
    return b"".join(_encode(value, arrays) for value in values)
