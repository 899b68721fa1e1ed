"""Voices: what the Talker and Token2Wav are given of a speaker (sections 1.9, 7.2 and 8.1).

PyTorch's folder has them in ``spk_dict.pt``, a file of ``torch.save``; a checkpoint of ours has them in ``voices.npz``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.checkpoint import torch_file
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError

PUBLISHED_FILE = "spk_dict.pt"
VOICES_FILE = "voices.npz"
DEFAULT = "Chelsie"

_LONGEST_NAME = 100
_KEYS = {"bos_token", "cond", "ref_mel"}


@dataclass(frozen=True, eq=False)
class Voice:
    """One speaker.

    Attributes:
      name: what a request asks for.
      bos_token: the id in the Thinker's vocabulary whose embedding begins speech in this voice.
      cond: float32 [1, enc_emb_dim], the speaker's vector.
      ref_mel: float32 [1, T, mel_dim], natural-log mel of a clip of the speaker.
    """

    name: str
    bos_token: int
    cond: np.ndarray
    ref_mel: np.ndarray

    def equals(self, other: Voice) -> bool:
        """Whether the other is the same, number by number."""
        same = (self.name, self.bos_token) == (other.name, other.bos_token)
        return same and np.array_equal(self.cond, other.cond) and np.array_equal(self.ref_mel, other.ref_mel)


def choose(voices: Mapping[str, Voice], name: str | None = None) -> Voice:
    """The voice of that name; without one Chelsie, or the first where there is none.

    Raises:
      InputError: for a name that is not there; it lists those that are.
    """
    if name is None:
        return voices.get(DEFAULT) or next(iter(voices.values()))
    if name not in voices:
        raise InputError(f"voice {name!r} is unknown; this checkpoint has {', '.join(voices)}")
    return voices[name]


def check(voices: Mapping[str, Voice], config: OmniConfig, where: Path) -> None:
    """Sees to it that a model of this configuration can speak in these voices.

    Args:
      voices: the voices.
      config: the model's configuration.
      where: the file, for the message.

    Raises:
      CheckpointError: with the voice, what does not fit, and what would.
    """
    dit, vocabulary = config.token2wav_config.dit_config, config.thinker_config.text_config.vocab_size
    # the speaker encoder pads by reflection, which takes one frame more than it adds
    kernels = zip(dit.enc_kernel_sizes, dit.enc_dilations, strict=True)
    shortest = 1 + max((kernel - 1) * dilation // 2 for kernel, dilation in kernels)
    for name, voice in voices.items():
        frames, bands = voice.ref_mel.shape[1:]
        wrong = []
        if voice.bos_token >= vocabulary:
            wrong.append(f"bos_token {voice.bos_token}, but the vocabulary has {vocabulary} ids")
        if voice.cond.shape[1] != dit.enc_emb_dim:
            wrong.append(f"cond {list(voice.cond.shape)}, but config.json makes it [1, {dit.enc_emb_dim}]")
        if bands != dit.mel_dim or frames < shortest:
            expected = f"[1, {shortest} or more, {dit.mel_dim}]"
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
        raise CheckpointError(f"{path} holds no voices: a dictionary of them is expected, this is {_kind(found)}")
    return {name: _voice(path, name, entry) for name, entry in found.items()}


def _voice(path: Path, name: str, entry: Any) -> Voice:
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        start = f"{name[:_LONGEST_NAME]!r}{'...' if len(name) > _LONGEST_NAME else ''}"
        raise CheckpointError(f"{path} has a voice named {start}; a name has 1 to {_LONGEST_NAME} printable characters")
    if not isinstance(entry, dict) or set(entry) != _KEYS:
        held = ", ".join(key[:_LONGEST_NAME] for key in sorted(entry)[:10]) if isinstance(entry, dict) else _kind(entry)
        raise CheckpointError(f"{path}: voice {name!r} must have {', '.join(sorted(_KEYS))}; it has {held}")
    where = f"{path}: voice {name!r}"
    cond, mel = _floats(where, "cond", entry["cond"], 2), _floats(where, "ref_mel", entry["ref_mel"], 3)
    return Voice(name, _token(where, entry["bos_token"]), cond, mel)


def _token(where: str, value: Any) -> int:
    """An id, written as a number or as a tensor of one."""
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind == "i":
        value = int(value.item())
    if type(value) is not int or not 0 <= value < 2**31:
        raise CheckpointError(f"{where} has a bos_token that is no token id but {_kind(value)}")
    return value


def _floats(where: str, key: str, value: Any, axes: int) -> np.ndarray:
    """float32 with ``axes`` axes, the first of which is 1."""
    # numpy calls bfloat16 no kind of float, but V
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fV":
        raise CheckpointError(f"{where} has a {key} that is no tensor of floats but {_kind(value)}")
    if value.ndim != axes or value.shape[0] != 1:
        expected = "[1, width]" if axes == 2 else "[1, frames, mel bands]"
        raise CheckpointError(f"{where} has a {key} of shape {list(value.shape)}; it must be {expected}")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is told below
        floats = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(floats).all():
        raise CheckpointError(f"{where} has a {key} with numbers that are not finite")
    return floats


def _kind(value: Any) -> str:
    """What a value is, for a message; the value itself may be as long as its writer likes."""
    if isinstance(value, np.ndarray):
        return f"a tensor {value.dtype}{list(value.shape)}"
    if type(value) is int and abs(value) < 10**18:
        return f"the number {value}"
    return f"a {type(value).__name__}"


def write_spk_dict(path: Path, voices: Mapping[str, Voice]) -> None:
    """Writes what ``torch.load(path, weights_only=True)`` and ``read_spk_dict`` read."""
    entries = {n: {"bos_token": v.bos_token, "cond": v.cond, "ref_mel": v.ref_mel} for n, v in voices.items()}
    torch_file.write(path, entries)


def save_voices(folder: Path, voices: Mapping[str, Voice]) -> None:
    """Writes the voices beside a checkpoint of ours, over those that are there."""
    arrays = {f"{key}.{i}": getattr(v, key) for i, v in enumerate(voices.values()) for key in ("cond", "ref_mel")}
    ids = np.array([v.bos_token for v in voices.values()], np.int64)
    np.savez(folder / VOICES_FILE, names=np.array(list(voices)), bos_tokens=ids, **arrays)


def load_voices(folder: Path) -> dict[str, Voice]:
    """The voices of a checkpoint of ours, in the order they were saved in.

    Raises:
      CheckpointError: if there are none, or the file is damaged.
    """
    path = folder / VOICES_FILE
    try:
        with np.load(path, allow_pickle=False) as arrays:
            named = list(zip(map(str, arrays["names"]), map(int, arrays["bos_tokens"]), strict=True))
            found = [Voice(n, b, arrays[f"cond.{i}"], arrays[f"ref_mel.{i}"]) for i, (n, b) in enumerate(named)]
    except OSError as e:
        raise CheckpointError(
            f"{folder} has no voices: cannot read {VOICES_FILE} ({e.strerror}). tools/convert.py to-jax makes it of "
            f"the published {PUBLISHED_FILE}; convert again without --components"
        ) from e
    except (ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as e:
        raise CheckpointError(f"{path} is damaged ({e}); convert the checkpoint again") from e
    if not found:
        raise CheckpointError(f"{path} holds no voice; convert the checkpoint again")
    return {voice.name: voice for voice in found}
