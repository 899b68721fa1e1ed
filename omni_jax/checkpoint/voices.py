"""Voices: what the Talker and Token2Wav take of a speaker (docs/reference.md, 1.9, 7.2 and 8.1).

PyTorch's folder has them in ``spk_dict.pt``, a file of ``torch.save``; a checkpoint of ours has them in ``voices.npz``.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.checkpoint import torch_file
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.plain_files import resolve_file

PUBLISHED_FILE = "spk_dict.pt"
VOICES_FILE = "voices.npz"
DEFAULT = "Chelsie"

_LONGEST_NAME = 100  # characters; names come in requests and are printed in errors
_KEYS = {"bos_token", "cond", "ref_mel"}


@dataclass(frozen=True, eq=False)
class Voice:
    """One speaker.

    Attributes:
      name: what a request calls it.
      bos_token: the id in the Thinker's vocabulary whose embedding begins speech in this voice.
      cond: float32 [1, enc_emb_dim], the speaker's vector.
      ref_mel: float32 [1, T, mel_dim], natural-log mel of a clip of the speaker.
    """

    name: str
    bos_token: int
    cond: np.ndarray
    ref_mel: np.ndarray

    def equals(self, other: Voice) -> bool:
        """Whether name, token and every value of the arrays are the same."""
        if (self.name, self.bos_token) != (other.name, other.bos_token):
            return False
        # exactly equal: a voice that went to PyTorch and back has the same bits
        return np.array_equal(self.cond, other.cond) and np.array_equal(self.ref_mel, other.ref_mel)


def choose(voices: Mapping[str, Voice], name: str | None = None) -> Voice:
    """The voice of that name; if None, Chelsie, or the first of a checkpoint without her.

    Raises:
      InputError: for a name that is not there; it lists those that are.
    """
    if name is None:
        return voices.get(DEFAULT) or next(iter(voices.values()))
    if name not in voices:
        raise InputError(f"voice {name!r} is unknown; this checkpoint has {', '.join(voices)}")
    return voices[name]


def check(voices: Mapping[str, Voice], config: OmniConfig, where: Path) -> None:
    """Checks that a model of this configuration can speak in these voices.

    Args:
      voices: the voices.
      config: the model's configuration.
      where: the file, for the message.

    Raises:
      CheckpointError: with the voice, what does not fit, and what would.
    """
    dit = config.token2wav_config.dit_config
    vocab_size = config.thinker_config.text_config.vocab_size
    # the speaker encoder pads by reflection, which needs one frame more than it adds
    paddings = []
    for kernel, dilation in zip(dit.enc_kernel_sizes, dit.enc_dilations, strict=True):
        paddings.append((kernel - 1) * dilation // 2)
    min_frames = 1 + max(paddings)
    # all that is wrong with a voice is told at once
    for name, voice in voices.items():
        frames, bands = voice.ref_mel.shape[1:]
        wrong = []
        if voice.bos_token >= vocab_size:
            wrong.append(f"bos_token {voice.bos_token}, but the vocabulary has {vocab_size} ids")
        if voice.cond.shape[1] != dit.enc_emb_dim:
            wrong.append(f"cond {list(voice.cond.shape)}, but config.json makes it [1, {dit.enc_emb_dim}]")
        if bands != dit.mel_dim or frames < min_frames:
            expected = f"[1, {min_frames} or more, {dit.mel_dim}]"
            wrong.append(f"ref_mel {list(voice.ref_mel.shape)}, but config.json makes it {expected}")
        if wrong:
            raise CheckpointError(f"{where}: voice {name!r} has {'; '.join(wrong)}")


def read_spk_dict(path: Path) -> dict[str, Voice]:
    """The voices of a published ``spk_dict.pt``, in its order.

    Raises:
      CheckpointError: if the file is missing, damaged, or holds anything but voices.
    """
    found = torch_file.read(path)
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path} holds no voices: it must be a dictionary of them, not {_describe(found)}")
    return {name: _parse_voice(path, name, entry) for name, entry in found.items()}


def is_voice_name(name: str) -> bool:
    """Whether a voice may be called so."""
    return 0 < len(name) <= _LONGEST_NAME and name.isprintable()


def _parse_voice(path: Path, name: str, entry: Any) -> Voice:
    # messages quote no more than the start of a name or a key, which may be as long as the file
    if not is_voice_name(name):
        start = f"{name[:_LONGEST_NAME]!r}{'...' if len(name) > _LONGEST_NAME else ''}"
        raise CheckpointError(f"{path} has a voice named {start}; a name has 1 to {_LONGEST_NAME} printable characters")
    if not isinstance(entry, dict) or set(entry) != _KEYS:
        found = _describe(entry)
        if isinstance(entry, dict):
            found = ", ".join(key[:_LONGEST_NAME] for key in sorted(entry)[:10])
        raise CheckpointError(f"{path}: voice {name!r} must have {', '.join(sorted(_KEYS))}; it has {found}")
    where = f"{path}: voice {name!r}"
    bos_token = _parse_token(where, entry["bos_token"])
    cond = _parse_floats(where, "cond", entry["cond"], 2)
    ref_mel = _parse_floats(where, "ref_mel", entry["ref_mel"], 3)
    return Voice(name, bos_token, cond, ref_mel)


def _parse_token(where: str, value: Any) -> int:
    """An id, written as a number or as a tensor of one."""
    if isinstance(value, np.ndarray | np.generic) and value.size == 1 and value.dtype.kind == "i":
        value = int(value.item())
    # not isinstance, to which True is an int; the upper bound is that of int32, in which ids are on a device
    if type(value) is not int or not 0 <= value < 2**31:
        raise CheckpointError(f"{where} has a bos_token that is no token id but {_describe(value)}")
    return value


def _parse_floats(where: str, key: str, value: Any, axes: int) -> np.ndarray:
    """float32 with ``axes`` axes, the first of which is 1."""
    # numpy calls bfloat16 no kind of float, but V
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fV":
        raise CheckpointError(f"{where} has a {key} that is no tensor of floats but {_describe(value)}")
    if value.ndim != axes or value.shape[0] != 1:
        expected = "[1, width]" if axes == 2 else "[1, frames, mel bands]"
        raise CheckpointError(f"{where} has a {key} of shape {list(value.shape)}; it must be {expected}")
    with np.errstate(over="ignore"):  # a value too large becomes infinite, which is refused below
        floats = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(floats).all():
        raise CheckpointError(f"{where} has a {key} with values that are not finite")
    return floats


def _describe(value: Any) -> str:
    """What a value is, for a message; the value itself may be as long as its writer likes."""
    if isinstance(value, np.ndarray):
        return f"a tensor {value.dtype}{list(value.shape)}"
    if type(value) is int and abs(value) < 10**18:
        return f"the number {value}"
    return f"a {type(value).__name__}"


def write_spk_dict(path: Path, voices: Mapping[str, Voice]) -> None:
    """Writes what ``torch.load(path, weights_only=True)`` and ``read_spk_dict`` read."""
    entries = {}
    for name, voice in voices.items():
        entries[name] = {"bos_token": voice.bos_token, "cond": voice.cond, "ref_mel": voice.ref_mel}
    torch_file.write(path, entries)


def save_voices(folder: Path, voices: Mapping[str, Voice]) -> None:
    """Writes the voices beside a checkpoint of ours, over those that are there."""
    (folder / VOICES_FILE).write_bytes(make_archive(voices))


def make_archive(voices: Mapping[str, Voice]) -> bytes:
    """The contents of the file that ``load_voices`` reads."""
    # Keys are file names within the archive, and not every voice's name can be one. So voices are numbered, and their
    # names are an array.
    arrays: dict[str, Any] = {"names": np.array(list(voices))}
    arrays["bos_tokens"] = np.array([voice.bos_token for voice in voices.values()], np.int64)
    for i, voice in enumerate(voices.values()):
        arrays[f"cond.{i}"] = voice.cond
        arrays[f"ref_mel.{i}"] = voice.ref_mel
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def load_voices(folder: Path) -> dict[str, Voice]:
    """The voices of a checkpoint of ours, in the order they were saved in.

    Raises:
      CheckpointError: if there are none, or the file is damaged.
    """
    path = folder / VOICES_FILE
    voices = {}
    try:
        arrays = _read_arrays(path)
        for i, (name, bos_token) in enumerate(zip(arrays["names"], arrays["bos_tokens"], strict=True)):
            entry = {"bos_token": bos_token, "cond": arrays[f"cond.{i}"], "ref_mel": arrays[f"ref_mel.{i}"]}
            voice = _parse_voice(path, str(name), entry)
            voices[voice.name] = voice
    except CheckpointError:  # a ValueError too, but with the right message already
        raise
    except OSError as e:
        raise CheckpointError(
            f"{folder} has no voices: cannot read {VOICES_FILE} ({e.strerror}). tools/convert.py to-jax makes it of "
            f"the published {PUBLISHED_FILE}; convert again without --components"
        ) from e
    # RuntimeError: a password, an unknown way of compression, or a header that is nested deeply, as is MemoryError
    except (ValueError, KeyError, EOFError, TypeError, RuntimeError, MemoryError, zipfile.BadZipFile) as e:
        raise CheckpointError(f"{path} is damaged ({e}); convert the checkpoint again") from e
    if not voices:
        raise CheckpointError(f"{path} holds no voice; convert the checkpoint again")
    return voices


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file.

    numpy's own reader unfolds whatever an entry unfolds to, and makes room for as much as the header of an array says.
    Here no more is read than the file is long.
    """
    size = resolve_file(path).stat().st_size
    if size > torch_file.LARGEST_FILE:
        raise CheckpointError(f"{path} has {size:,} bytes; a file of voices has {torch_file.LARGEST_FILE:,} at most")
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # entries may lie over each other
        if sum(entry.file_size for entry in entries) > size:
            raise CheckpointError(f"{path} claims to hold more than its {size:,} bytes")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: {entry.filename[:_LONGEST_NAME]!r} is compressed, which no voices are")
            arrays[entry.filename.removesuffix(".npy")] = _parse_array(archive.read(entry))
    return arrays


def _parse_array(data: bytes) -> np.ndarray:
    """An array of numbers or text, as ``.npy`` has it.

    Raises:
      ValueError: if it is none, or has not as many values as its header says.
    """
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of an unknown version")
    try:
        shape, is_transposed, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as e:  # a header is a piece of Python; tokenizer, parser and dtypes raise errors of many types
        raise ValueError(f"an array whose header cannot be read: {type(e).__name__}: {e}") from e
    # an array of objects would be a pickle, which may run a program
    if dtype.kind not in "fiU" or is_transposed:
        raise ValueError(f"an array of {dtype}")
    values = data[file.tell() :]
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != len(values):
        raise ValueError(f"an array {list(shape)} of {dtype} in {len(values)} bytes")
    return np.frombuffer(values, dtype).reshape(shape)
